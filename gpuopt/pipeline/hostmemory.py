"""This process and those it started -> the most host memory they have held, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Of ru_maxrss: bytes on macOS, KiB on Linux (getrusage(2))."""

_M_MMAP_THRESHOLD = -3
"""mallopt(3)."""
_OWN_PAGES_BYTES = 2**20


def return_at_once() -> None:
    """From now on, what this process frees of 1 MiB or more goes back to the system at once.

    glibc gives large blocks pages of their own, but raises what it calls large to 32 MiB as it sees such blocks freed, and keeps the others: weights that are moved from
    one place to another tensor by tensor then take their memory twice.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)


def peak_bytes() -> int:
    """The peak of this process or of the largest it started and that has ended (a linker, an assembler), whichever is more, and the peaks of those that still run
    (compile workers).

    The larger and not the sum: Linux charges a process that was forked with its parent's memory before exec (exec_mmap in fs/exec.c raises its maxrss to it).
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT
    return max(own, ended) + sum(_high_water(pid) for pid in _descendants())


def _descendants() -> list[str]:
    """Process ids below this one that are alive now; none where the kernel does not tell (other systems, CONFIG_PROC_CHILDREN off)."""
    found: list[str] = []
    queue = ["self"]
    while queue:
        for told in Path("/proc", queue.pop(), "task").glob("*/children"):
            try:
                below = told.read_text(encoding="ascii").split()
            except OSError:  # it has just ended
                continue
            found += below
            queue += below
    return found


def _high_water(pid: str) -> int:
    """VmHWM of a process that may have ended by now."""
    try:
        lines = Path("/proc", pid, "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
