"""A number of bytes -> host memory of exactly that size, near a GPU and locked for it; and how much of it a process may have.

PyTorch's own pinned allocator rounds a block up to a power of two, up to 1.92 times the memory (pytorch#150517). Anonymous pages that are registered afterwards cost what was asked
for. They are unregistered before they are freed: a GPU that copies from pages somebody else got meanwhile reads that one's bytes.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.errors import OutOfMemory, UsageError

PORTABLE = 1
"""cudaHostRegisterPortable: locked for every context of the process."""
_UNLIMITED = 1 << 60
"""Version 1 of cgroups says so with a number near 2^63, version 2 with `max`."""
_HUGE = 2 << 20
_TOUCHED = 64 << 20
"""Bytes of pages touched at once: fewer pages than torch cuts its work at."""


def _nothing() -> None:
    return None


class Pages:
    """Anonymous memory of its own. Locked by `pin`, and then copied from without the host's help."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OutOfMemory where the system has no such room, UsageError for nothing."""
        if num_bytes <= 0:
            raise UsageError(f"{num_bytes} bytes of host memory cannot be had", fix="ask for one byte or more")
        try:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise OutOfMemory(
                f"the host has no {num_bytes:,} bytes for weights ({error})", fix="--disk DIR keeps what does not fit on a disk"
            ) from error
        if num_bytes >= _HUGE:
            # Pages of 2 MiB are fewer to fault in and to lock. A kernel built without them says EINVAL, which costs nothing but time.
            with suppress(OSError, AttributeError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        # The tensor and its views own the mapping: closing it by hand would pull the pages from under them, for frombuffer does not keep the buffer exported.
        self._bytes: torch.Tensor | None = torch.frombuffer(pages, dtype=torch.uint8)
        self.num_bytes = num_bytes
        self._unlock: Callable[[], None] | None = None
        self._settle: Callable[[], None] = _nothing

    @property
    def bytes(self) -> torch.Tensor:
        """uint8, page-aligned, zeros at first."""
        if self._bytes is None:
            raise ValueError("host memory was read after it was closed")
        return self._bytes

    def touch(self) -> None:
        """Have the system give all pages now, to this thread's node."""
        for start in range(0, self.num_bytes, _TOUCHED):  # in pieces that torch does not share out among its threads
            self.bytes[start : start + _TOUCHED : mmap.PAGESIZE].zero_()

    @property
    def pinned(self) -> bool:
        """Locked now."""
        return self._unlock is not None

    def pin(
        self, cudart: Any, discard: Callable[[], None], unpinned: Callable[[], None] = _nothing, settle: Callable[[], None] = _nothing
    ) -> int:
        """Lock the pages: 0, or the error's number of CUDA (2 is "out of memory"), and then they stay as they are.

        `discard` clears the error: CUDA repeats it at the next kernel launch, which is somebody else's. `unpinned` is told when they are not locked any more.
        `settle` waits for copies: called where nobody closed the pages and the garbage collector does.
        """
        address = self.bytes.data_ptr()
        code = int(cudart.cudaHostRegister(address, self.num_bytes, PORTABLE))
        if code:
            discard()
            return code

        def unlock() -> None:
            if int(cudart.cudaHostUnregister(address)):
                discard()
            unpinned()

        self._unlock, self._settle = unlock, settle
        return 0

    def pretend(self, unpinned: Callable[[], None]) -> None:
        """Count as locked, for a device that is simulated."""
        self._unlock = unpinned

    def unpin(self) -> None:
        """Not locked from here on; the bytes stay. No copy may be under way. Harmless twice."""
        unlock, self._unlock = self._unlock, None
        if unlock is not None:
            unlock()

    def close(self) -> None:
        """Unlock, then let go; whoever holds a view of the bytes keeps the pages, unlocked. Harmless twice."""
        self.unpin()
        self._bytes = None

    def __del__(self) -> None:
        # Locked pages that are freed without this stay known to CUDA under an address that somebody else gets. Half-made objects have none; at exit the driver does it.
        # The bytes stay: whoever is collected together with these pages may yet give them back to a module.
        if getattr(self, "_unlock", None) is not None and not sys.is_finalizing():
            self._settle()
            self.unpin()


def available_bytes(root: str = "/") -> int:
    """Host memory this process may still have: the least of what the system says and what each of its control groups (versions 1 and 2) leaves. Page cache counts as free.

    Containers show the memory of the whole machine in /proc/meminfo and kill who believes it (sglang#35641).
    """
    return min([_system_bytes(root), *_group_bytes(root)])


def _system_bytes(root: str) -> int:
    fields: dict[str, int] = {}
    for line in (Path(root) / "proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    return fields.get("MemAvailable", fields["MemFree"])  # kernels before 3.14


def anonymous_bytes(root: str = "/") -> int:
    """Memory of this process that no file stands behind: what it could give back by letting go of tensors. 0 where the system does not say."""
    fields: dict[str, int] = {}
    try:
        for line in (Path(root) / "proc/self/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmRSS"):
                fields[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return fields.get("RssAnon", fields.get("VmRSS", 0))  # some sandboxes do not tell the two apart


def _group_bytes(root: str) -> Iterator[int]:
    try:
        lines = (Path(root) / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mount = Path(root) / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for top in (mount, mount / "unified"):
                yield from _left(top, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _left(mount / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(top: Path, path: str, limit_file: str, usage_file: str, cache_field: str) -> Iterator[int]:
    """What each group from the process's own up to the top leaves. Within a container the path is the host's and does not exist here: the top is the container's group then."""
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:depth])
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None and limit < _UNLIMITED:
            yield max(0, limit - max(0, usage - _cache(folder / "memory.stat", cache_field)))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or the word `max`
        return None


def _cache(file: Path, field: str) -> int:
    try:
        rows = (line.split() for line in file.read_text(encoding="ascii").splitlines())
        return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == field), 0)
    except (OSError, ValueError):
        return 0


def node_of(pci_address: str, root: str = "/") -> int | None:
    """The NUMA node a device hangs on, by its PCI address `0000:1a:00.0`; None where the system does not say (one node, virtual machines)."""
    node = _number(Path(root) / "sys/bus/pci/devices" / pci_address.lower() / "numa_node")
    return node if node is not None and node >= 0 else None


def cpus_of(node: int, root: str = "/") -> frozenset[int]:
    """CPUs of a NUMA node; empty where the system does not say."""
    try:
        text = (Path(root) / f"sys/devices/system/node/node{node}/cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return frozenset()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@contextmanager
def near(pci_address: str | None, root: str = "/") -> Iterator[int | None]:
    """While entered, the calling thread runs on the CPUs next to a device, so pages that it touches first (or locks) lie in that node's memory. Yields the node, or None for no change."""
    node = node_of(pci_address, root) if pci_address else None
    if node is None or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    wanted = cpus_of(node, root) & before
    if not wanted or wanted == before:
        yield node if wanted else None
        return
    try:
        os.sched_setaffinity(0, wanted)
    except OSError:  # a sandbox that forbids it: slower by a hop, not wrong
        yield None
        return
    try:
        yield node
    finally:
        os.sched_setaffinity(0, before)
