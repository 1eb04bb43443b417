"""A packed folder -> units in locked buffers, read ahead of the forward that copies them.

Several threads read one unit at a time, in pieces, past the page cache where the file system allows it. A few buffers go round: free, being read, ready, held by a copy, free.
What comes next is what came next last time, at first the order of the plan; another order costs a wait, never a wrong byte.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.core.streaming import Unit
from gpuopt.streaming import packed
from gpuopt.streaming.diskrate import DiskRate, measure_disk
from gpuopt.streaming.engines import Engine, HostBuffer
from gpuopt.streaming.packed import Packed
from gpuopt.streaming.reading import NUM_THREADS, PAGE_BYTES, PIECE_BYTES
from gpuopt.trust.policy import printable

__all__ = ["DiskRate", "Ring", "measure_disk"]

JOIN_S = 5.0
"""A read that takes longer than this hangs in the kernel, where no thread can be stopped."""
_LEAST_PIECE_BYTES = 2**20
"""Of one read: below it a drive answers requests, not bytes."""
STUCK_S = 60.0
"""Without a byte: a network disk that is gone answers with nothing at all."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """Memory that units pass through."""

    home: HostBuffer
    event: Any
    copied: bool = True
    """False from the release until somebody has waited for `event`: a copy may still read the bytes."""


@dataclass(slots=True, eq=False)
class _Load:
    """A unit on its way from the disk."""

    unit: Unit
    buffer: _Buffer
    pieces: deque[tuple[int, int]]
    """Offset and length of what no thread has taken yet."""
    under_way: int = 0
    checksum: int = 0
    waiting: bool = False
    """A thread waits for the last copy out of the buffer."""
    dropped: bool = False
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Nobody writes to the buffer, nor will."""
        return self.under_way == 0 and not self.waiting and (not self.pieces or self.dropped or self.error is not None)


@dataclass(slots=True)
class _Reads:
    """What was read so far, and in how long: the time in which at least one read was under way."""

    num_bytes: int = 0
    seconds: float = 0.0
    under_way: int = 0
    since: float = 0.0
    last: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        now = time.monotonic()
        if self.under_way == 0:
            self.since = self.last = now
        self.under_way += 1

    def end(self, num_bytes: int) -> None:
        self.last = time.monotonic()
        self.under_way -= 1
        self.num_bytes += num_bytes
        if self.under_way == 0:
            self.seconds += self.last - self.since

    @property
    def rate(self) -> float | None:
        seconds = self.seconds + (self.last - self.since if self.under_way else 0.0)
        return self.num_bytes / seconds if seconds > 0 else None


class Ring:
    """The source of units that are on a disk. One thread calls it; its own threads read.

    Counters: `misses` (units that were not on their way when they were asked for), `waited_s` (the caller stood still), `bytes_per_s`.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path | str | Packed,
        units: Sequence[Unit],
        num_buffers: int = 3,
        num_threads: int = NUM_THREADS,
        *,
        stuck_s: float = STUCK_S,
    ) -> None:
        """`units` in the order of a forward; each is checked against its checksum the first time it is read.

        Raises what `packed.opened` raises, UsageError for a unit that is not in the folder, ResourceError where buffers cannot be locked.
        """
        if num_buffers < 2 or num_threads < 1 or not units:
            raise UsageError("a ring needs a unit, two buffers and a thread", fix="--disk with at least one unit on it")
        self._engine = engine
        self._owned = None if isinstance(folder, Packed) else packed.opened(folder)
        self._packed = folder if isinstance(folder, Packed) else self._owned
        assert self._packed is not None
        self.num_threads = num_threads
        self._stuck_s = stuck_s
        self._units = {unit.name: unit for unit in units}
        self._condition = threading.Condition()
        self._free: deque[_Buffer] = deque()
        self._buffers: list[_Buffer] = []
        self._loads: dict[str, _Load] = {}
        """On their way or ready, in the order in which they are expected; not yet asked for."""
        self._dropped: list[_Load] = []
        """Given up, with a read still under way."""
        self._held: dict[str, tuple[_Buffer, int]] = {}
        """Asked for and not yet released, and how often."""
        names = [unit.name for unit in units]
        self._after = dict(zip(names, [*names[1:], names[0]], strict=True))
        self._last: str | None = None
        self._fetching = False
        """The caller waits for a buffer: what becomes free is not for what is merely expected."""
        self._unchecked = set(names)
        self._reads = _Reads()
        self._closed = False
        self.misses = 0
        self.waited_s = 0.0
        self.notes: list[str] = []
        self._threads: list[threading.Thread] = []
        try:
            known = {unit.name for unit in self._packed.units}
            lacking = [name for name in names if name not in known]
            if lacking:
                raise UsageError(f"{printable(str(self._packed.folder))} holds no unit {printable(lacking[0])}", fix="pack this model")
            largest = max(packed.file_bytes(unit) for unit in units)
            for _ in range(num_buffers):
                home = engine.home(largest, pin=True)
                self._buffers.append(_Buffer(home=home, event=engine.event()))
                if not home.pinned:
                    raise ResourceError(
                        f"{num_buffers} buffers of {largest:,} bytes cannot be locked, and copies from the disk go through them",
                        fix="raise the limit on locked memory of this container, or --granularity sub for smaller units",
                    )
        except BaseException:  # what was made so far is locked memory and open files
            self._let_go()
            raise
        self._free.extend(self._buffers)
        with self._condition:
            self._read_ahead(names[0])
        for index in range(num_threads):
            thread = threading.Thread(target=self._serve, name=f"gpuopt-disk-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # --- the source, called by one thread ----------------------------------------------------------------------------------------------------

    def bytes_for_copy(self, unit: Unit | str) -> torch.Tensor:
        """All bytes of the unit's slab, in locked memory that stays as it is until `release`. Waits until they are read.

        Raises BadInput or ResourceError, naming file and offset, when they cannot be.
        """
        name = unit if isinstance(unit, str) else unit.name
        num_bytes = self._units[name].num_bytes
        with self._condition:
            self._require_open()
            if self._last is not None:
                self._after[self._last] = name
            self._last = name
            if name in self._held:
                buffer, times = self._held[name]
                self._held[name] = (buffer, times + 1)
                return buffer.home.bytes[:num_bytes]
            load = self._loads.get(name)
            if load is None:
                self.misses += 1
                load = self._fetch(name)
            else:
                for skipped in list(itertools.takewhile(lambda other: other != name, self._loads)):
                    self._drop(skipped)
            self._read_ahead(self._after[name])
            self._await(lambda: load.is_over, load.unit)
            del self._loads[name]
            if load.error is not None:
                self._last = None
                self._free.append(load.buffer)
                raise load.error
            self._held[name] = (load.buffer, 1)
            self._read_ahead(self._after[name])
            return load.buffer.home.bytes[:num_bytes]

    def release(self, unit: Unit | str) -> None:
        """The copy of the unit is queued. Its buffer is read into again once that copy is done."""
        name = unit if isinstance(unit, str) else unit.name
        with self._condition:
            buffer, times = self._held[name]
            if times > 1:
                self._held[name] = (buffer, times - 1)
                return
            del self._held[name]
            self._engine.record_copy(buffer.event)
            buffer.copied = False
            self._free.append(buffer)
            self._read_ahead(self._after.get(self._last or name, name))

    def read(self, unit: Unit | str) -> torch.Tensor:
        """The true bytes in memory of their own, past the ring."""
        name = unit if isinstance(unit, str) else unit.name
        assert self._packed is not None
        target = torch.empty(self._units[name].num_bytes, dtype=torch.uint8)
        self._packed.read_into(name, target, num_threads=self.num_threads)
        return target

    def abort(self) -> None:
        """A forward ended midway: everything held is free again, and reading starts over at the front. Waits for the copies that are queued."""
        self._engine.drain()
        with self._condition:
            for buffer, _ in self._held.values():
                self._free.append(buffer)
            self._held.clear()
            self._last = None
            if not self._closed:
                self._read_ahead(next(iter(self._units)))

    @property
    def bytes_read(self) -> int:
        """Since it was made, read ahead in vain included."""
        return self._reads.num_bytes

    @property
    def bytes_per_s(self) -> float | None:
        """While at least one read was under way; None before the first is done."""
        with self._condition:
            return self._reads.rate

    def close(self) -> None:
        """End the threads, wait for queued copies, free the buffers. Harmless twice. A read that hangs in the kernel keeps its memory: see `notes`."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify_all()
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = sum(thread.is_alive() for thread in self._threads)
        if hanging:  # its memory must not become somebody else's while the kernel may write to it
            self.notes.append(
                f"{hanging} reads of {self._packed.folder if self._packed else ''} hang; their buffers stay locked until the process ends"
            )
            _hanging.append(self)
            return
        self._engine.drain()
        self._let_go()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- under the lock ----------------------------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("a ring was used after it was closed")

    def _read_ahead(self, name: str) -> None:
        """Put every free buffer to work on what is expected, `name` first."""
        for expected in self._loads:
            if expected != name:
                continue
            name = self._after[next(reversed(self._loads))]  # it is on its way, and so are those behind it
            break
        while self._free and name not in self._loads and name not in self._held:
            self._begin(name)
            name = self._after[name]

    def _begin(self, name: str) -> _Load:
        unit = self._units[name]
        buffer = next((b for b in self._free if b.copied), self._free[0])
        self._free.remove(buffer)
        total = packed.file_bytes(unit)
        step = self._piece_bytes(total)
        pieces = deque((start, min(step, total - start)) for start in range(0, total, step))
        load = self._loads[name] = _Load(unit=unit, buffer=buffer, pieces=pieces)
        self._condition.notify_all()
        return load

    def _piece_bytes(self, total: int) -> int:
        """Small enough that all threads have something to read where only one unit is on its way; whole pages."""
        share = -(-total // self.num_threads // PAGE_BYTES) * PAGE_BYTES
        return max(_LEAST_PIECE_BYTES, min(PIECE_BYTES, share))

    def _fetch(self, name: str) -> _Load:
        """What nobody expected: it goes first, in the buffer of what is expected last when none is free."""
        while not self._free:
            if self._loads:
                self._drop(next(reversed(self._loads)))
            elif not self._dropped:
                raise ValueError(f"all {len(self._buffers)} buffers of a ring are held: each unit is released after its copy is queued")
            if not self._free:
                self._fetching = True
                try:
                    self._await(lambda: bool(self._free), self._units[name])
                finally:
                    self._fetching = False
        load = self._begin(name)
        self._loads = {name: load, **self._loads}
        return load

    def _drop(self, name: str) -> None:
        load = self._loads.pop(name)
        load.dropped = True
        load.pieces.clear()
        if load.is_over:
            self._free.append(load.buffer)
        else:
            self._dropped.append(load)

    def _await(self, is_done: Any, unit: Unit) -> None:
        began = time.monotonic()
        self._reads.last = max(self._reads.last, began)
        while not is_done():
            self._condition.wait(0.5)
            self._require_open()
            if time.monotonic() - self._reads.last > self._stuck_s:
                assert self._packed is not None
                raise ResourceError(
                    f"{self._packed.file(unit.name).name}: not a byte came from {printable(str(self._packed.folder))} for {self._stuck_s:g} s",
                    fix="the disk or its connection hangs: look into the kernel's log, or pack to another disk",
                )
        self.waited_s += time.monotonic() - began

    def _next_work(self) -> tuple[_Load, tuple[int, int] | None] | None:
        """A piece to read, or a buffer to wait for (no piece); the unit that is needed first, first."""
        for load in self._loads.values():
            if load.error is not None or load.waiting or not load.pieces:
                continue
            if not load.buffer.copied:
                load.waiting = True
                return load, None
            load.under_way += 1
            return load, load.pieces.popleft()
        return None

    def _settle(self, load: _Load) -> None:
        """After a piece or a wait: a load that is over is checked, or its buffer freed."""
        if load.is_over and load.dropped and load in self._dropped:
            self._dropped.remove(load)
            self._free.append(load.buffer)
            if not self._fetching:
                self._read_ahead(self._after.get(self._last or "", next(iter(self._units))))
        elif load.is_over and load.error is None and not load.dropped and load.unit.name in self._unchecked:
            assert self._packed is not None
            self._unchecked.discard(load.unit.name)
            if packed.wrapped(load.checksum) != self._packed.checksum(load.unit.name):
                self._unchecked.add(load.unit.name)
                load.error = packed.damaged(self._packed.file(load.unit.name))
        self._condition.notify_all()

    # --- in the reading threads --------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        assert self._packed is not None
        while True:
            with self._condition:
                while not self._closed and (work := self._next_work()) is None:
                    self._condition.wait()
                if self._closed or work is None:
                    return
                load, piece = work
                is_checked = load.unit.name in self._unchecked
                if piece is not None:
                    self._reads.begin()
            error, total = None, 0
            try:
                if piece is None:
                    self._engine.wait_host(load.buffer.event)
                else:
                    start, length = piece
                    memory = load.buffer.home.bytes
                    self._packed.file(load.unit.name).read_into(start, memory[start : start + length])
                    if is_checked:
                        total = packed.checksum(memory[start : min(start + length, load.unit.num_bytes)])
            except BaseException as caught:  # noqa: BLE001 - whatever it is, it belongs to the forward that needs these bytes; a thread that ended by it would leave that waiting
                error = caught
            with self._condition:
                if piece is None:
                    load.waiting = False
                    load.buffer.copied = error is None
                else:
                    load.under_way -= 1
                    load.checksum += total
                    self._reads.end(piece[1] if error is None else 0)
                load.error = load.error or error
                self._settle(load)

    def _let_go(self) -> None:
        for buffer in self._buffers:
            buffer.home.close()
        if self._owned is not None:
            self._owned.close()


_hanging: list[Ring] = []
"""Rings that could not be closed: kept, so that nothing is freed under a read."""
