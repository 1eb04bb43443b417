"""One private folder a command, for what its children leave for each other; gone when the command ends.

A folder belongs to the process that holds the lock in it, so what a killed command left is known for sure and swept by a later one. Nothing here ever fails a
command: without a folder (a read-only cache, a file system without locks) children simply share nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "GPUOPT_REFERENCES"
"""How a child finds the folder; empty where there is none."""
LOCK = "owner.lock"
_WAIT_S = 5.0
"""For another command that makes or sweeps a folder at this moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owned:
    path: Path
    lock: int
    """Held, hence open, for as long as this process lives."""


_owned: dict[tuple[int, Path], _Owned] = {}
"""By process id: after a fork the folder is still the parent's."""
_making = threading.Lock()


def environment(root: Path) -> dict[str, str]:
    """What a child is told. The folder is made under `root` (the cache) on the first call of a process, after those of dead processes were swept."""
    with _making:
        key = (os.getpid(), root)
        if key not in _owned or not _owned[key].path.is_dir():
            try:
                _owned[key] = _made(root / "references")
            except OSError:
                return {VARIABLE: ""}  # also over one that this process itself was given
        return {VARIABLE: str(_owned[key].path)}


def folder() -> Path | None:
    """The folder this process was given, if it is private; None where there is none to share through."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    path = Path(text)
    return path if _is_private(path) else None


def _made(parent: Path) -> _Owned:
    """Raises OSError, BlockingIOError among them."""
    parent.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(parent):
        raise PermissionError(f"{parent} is not private")
    # One at a time: a folder whose lock is not taken yet must not look like a dead one's.
    gate = locked(parent / ".lock", wait_s=_WAIT_S)
    try:
        _sweep(parent)
        path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
        owned = _Owned(path=path, lock=locked(path / LOCK, wait_s=0.0))
    finally:
        os.close(gate)
    atexit.register(_removed, owned, os.getpid())
    return owned


def _removed(owned: _Owned, pid: int) -> None:
    if os.getpid() != pid:  # a fork runs the handlers of its parent
        return
    shutil.rmtree(owned.path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(owned.lock)


def _sweep(parent: Path) -> None:
    for entry in os.scandir(parent):
        if not entry.is_dir(follow_symlinks=False):
            continue
        try:
            lock = locked(Path(entry.path, LOCK), wait_s=0.0)
        except OSError:
            continue  # somebody lives
        shutil.rmtree(entry.path, ignore_errors=True)
        os.close(lock)


def locked(path: Path, *, wait_s: float) -> int:
    """An exclusive lock as an open file. Raises BlockingIOError after `wait_s`."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                os.close(handle)
                raise
        time.sleep(0.02)


def _is_private(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
