"""Children that want to load a model at the same time -> as many of them at once as host memory holds, the one with the longest build first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

SHARE = 0.8
"""Of what is free: a process brings its libraries along, and who copies a file reads it into the cache of the same memory."""
UNLIMITED = 2**62


class Door:
    """`with door.passing(key) as inside:` lets `key` load; `inside.weighs(bytes)` tells how much it was, `inside.leave()` that it is out of host memory.

    Nobody knows what a model weighs before it was loaded once, so `first` goes alone; the others follow as its weight allows. Leaving the `with` leaves the door too:
    whoever fails holds nobody up.
    """

    def __init__(self, first: str | None, *, available: Callable[[], int] | None = None) -> None:
        self._available = available or free_bytes
        self._first = first
        self._bytes = 0
        self._inside = 0
        self._changed = threading.Condition()

    @contextmanager
    def passing(self, key: str) -> Iterator[Inside]:
        """Waits for its turn."""
        with self._changed:
            while not self._fits(key):
                self._changed.wait()
            self._inside += 1
        inside = Inside(self, key)
        try:
            yield inside
        finally:
            inside.leave()

    def _fits(self, key: str) -> bool:
        if self._first is not None and key != self._first:
            return False
        return self._inside == 0 or self._available() * SHARE >= (self._inside + 1) * self._bytes

    def _weighs(self, key: str, size: int) -> None:
        with self._changed:
            self._bytes = max(self._bytes, size)
            self._open(key)

    def _left(self, key: str) -> None:
        with self._changed:
            self._inside -= 1
            self._open(key)

    def _open(self, key: str) -> None:
        if key == self._first:
            self._first = None
        self._changed.notify_all()


class Inside:
    """One that was let in."""

    def __init__(self, door: Door, key: str) -> None:
        self._door, self._key, self._is_in = door, key, True

    def weighs(self, size: int) -> None:
        """It is loaded, and holds so many bytes."""
        self._door._weighs(self._key, size)

    def leave(self) -> None:
        """Its weights are elsewhere, or it has failed. Harmless twice."""
        if self._is_in:
            self._is_in = False
            self._door._left(self._key)


def free_bytes(root: Path = Path("/")) -> int:
    """Host memory that can still be had: of the machine, or of the container if that has less; UNLIMITED where neither says."""
    found = [UNLIMITED]
    with suppress(OSError, ValueError):
        found.append(_numbers(root / "proc/meminfo").get("MemAvailable", UNLIMITED // 1024) * 1024)
    v2, v1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    for limit, used, kept in (
        (v2 / "memory.max", v2 / "memory.current", v2 / "memory.stat"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat"),
    ):
        with suppress(OSError, ValueError):  # `max` is no number: no limit
            # Files that were read count as used, and are dropped where somebody needs the memory.
            found.append(int(limit.read_text()) - int(used.read_text()) + _numbers(kept).get("inactive_file", 0))
    return max(0, min(found))


def _numbers(file: Path) -> Mapping[str, int]:
    """`NAME: 123 kB` and `name 123`, a line each."""
    rows = (line.replace(":", " ").split() for line in file.read_text(encoding="ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
