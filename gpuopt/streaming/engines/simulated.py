"""Rates of a link and of compute -> a device without a GPU: real bytes, copies done as late, as early or as randomly as the events allow, and the clock of what it would take.

What is computed is computed at once, as the host gets there. A copy may be done at any moment its events allow; which, `schedule` says. So a wait that is missing gives wrong bytes:

- computing without waiting for a copy reads what the slot held before (`late`, and `random` now and then);
- copying without waiting for the reader would overwrite weights in use. The reader is through already here, so the engine keeps book of what is ordered after what (a clock per
  queue, carried by events: Lamport, Fidge, Mattern) and tears such a copy: the slot gets NaN bytes.

Both are also written down in `races`. The time is that of two queues (and a disk) that do one thing after another and wait for events, and of a host that needs its time to queue
each unit, as `timeline` has it.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.streaming import ALIGNMENT
from gpuopt.streaming.hostpages import Pages
from gpuopt.streaming.timeline import DISK_BUFFERS

Schedule = Literal["late", "early", "random"]
_COMPUTE, _COPY = 0, 1
_EAGERNESS = 0.1
"""Of copies in a random schedule, at each step of either queue. A unit is six steps or so: about half the copies are not done by themselves before they are needed."""


class Mark:
    """An event: when the queue it was last recorded on got there."""

    __slots__ = ("copies", "knows", "ms")

    def __init__(self) -> None:
        self.ms = 0.0
        self.knows = (0, 0)
        """Steps of compute and of copying that lie before it."""
        self.copies = 0
        """That must be done for it to have happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What one forward took on the simulated device."""

    ms: float
    stall_ms: float
    """Of it, computing waited for copies."""


@dataclass(slots=True)
class _Touched:
    """A slot: the last step of each queue that used it."""

    computed: int = 0
    copied: int = 0
    holder: str = ""


class SimulatedEngine:
    """A device on paper. Its memory is the host's."""

    name = "simulated"
    simulated = True
    listens = True
    device = torch.device("cpu")

    def __init__(
        self,
        link_bytes_per_s: float,
        compute_ms: Mapping[str, float] | None = None,
        schedule: Schedule = "late",
        seed: int = 0,
        *,
        pageable_bytes_per_s: float | None = None,
        disk_bytes_per_s: float | None = None,
        disk_buffers: int = DISK_BUFFERS,
        max_pinned_bytes: int | None = None,
        host_ms: Mapping[str, float] | None = None,
        host_waits: bool = False,
    ) -> None:
        """Raises UsageError for rates that are not positive.

        Parameters
        ----------
        compute_ms: unit -> its forward; `""` is everything outside units. Units that are not named take no time.
        pageable_bytes_per_s, disk_bytes_per_s: of copies whose home is that; the link's where not given.
        disk_buffers: units read ahead.
        host_ms, host_waits: as `Calibration` has them; None: the host takes no time.
        max_pinned_bytes: locking more is refused, as a system with a limit does.
        """
        for name, rate in (("link", link_bytes_per_s), ("pageable", pageable_bytes_per_s), ("disk", disk_bytes_per_s)):
            if rate is not None and not rate > 0:
                raise UsageError(f"a {name} of {rate} bytes a second moves nothing", fix="give a rate above 0, as 55e9")
        if schedule not in ("late", "early", "random"):
            raise UsageError(f"unknown schedule {schedule!r}", fix="late, early or random")
        self._ms_per_byte = {"pinned": 1e3 / link_bytes_per_s}
        self._ms_per_byte["pageable"] = 1e3 / pageable_bytes_per_s if pageable_bytes_per_s else self._ms_per_byte["pinned"]
        self._ms_per_byte["disk"] = self._ms_per_byte["pinned"]
        self._disk_ms_per_byte = 1e3 / disk_bytes_per_s if disk_bytes_per_s else 0.0
        self._compute_ms = dict(compute_ms or {})
        self._host_ms, self._host_waits = dict(host_ms or {}), host_waits
        self._host_now = 0.0
        self._schedule = schedule
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        """Reader threads of a disk wait for events too."""
        self._queue: deque[tuple[torch.Tensor, torch.Tensor | None]] = deque()
        self._issued = self._performed = 0
        self._knows: list[list[int]] = [[0, 0], [0, 0]]
        """Queue -> steps of each queue that its next step lies behind."""
        self._hosts: dict[int, tuple[int, int]] = {}
        """Thread -> the same, from what it waited for."""
        self._now = [0.0, 0.0]
        """Milliseconds, of compute and of copying."""
        self._disk_now = 0.0
        self._disk_copies: deque[float] = deque([0.0] * disk_buffers, maxlen=disk_buffers)
        """When the copies out of the disk's buffers end, oldest first."""
        self._touched: dict[int, _Touched] = {}
        self._slots: list[torch.Tensor] = []
        self._max_pinned_bytes = max_pinned_bytes
        self.stall_ms = 0.0
        """Of compute, so far."""
        self.copy_ms = 0.0
        """The link was busy, so far."""
        self.forwards: list[Forward] = []
        self.races: list[str] = []
        """What was not ordered: a sentence each."""
        self.pinned_bytes = 0
        """Counted as locked now."""

    @property
    def elapsed_ms(self) -> float:
        """The clock of compute. The difference around a call is what the call takes."""
        return self._now[_COMPUTE]

    def slot(self, num_bytes: int) -> torch.Tensor:
        """uint8, 512-aligned."""
        with torch.inference_mode(False):
            raw = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8)
            start = -raw.data_ptr() % ALIGNMENT
            found = raw[start : start + num_bytes]
        with self._lock:
            self._touched[found.untyped_storage().data_ptr()] = _Touched()
            self._slots.append(found)  # or the address would be another's, with this one's history
        return found

    def home(self, num_bytes: int, pin: bool) -> Pages:
        """Host memory; it counts as locked unless `max_pinned_bytes` is reached."""
        pages = Pages(num_bytes)
        if pin:
            self.lock(pages)
        return pages

    def lock(self, home: Any) -> bool:
        """Count it as locked, as far as `max_pinned_bytes` allows."""
        size = home.num_bytes
        if not home.pinned and (self._max_pinned_bytes is None or self.pinned_bytes + size <= self._max_pinned_bytes):
            self._count(size)
            me = weakref.ref(self)  # pages outlive engines, and an engine is all the memory of its device

            def unlocked() -> None:
                if (engine := me()) is not None:
                    engine._count(-size)

            home.pretend(unlocked)
        return bool(home.pinned)

    def _count(self, num_bytes: int) -> None:
        self.pinned_bytes += num_bytes

    def event(self) -> Mark:
        """Never recorded yet: to wait for it is to wait for nothing."""
        return Mark()

    def record_compute(self, event: Mark) -> None:
        """What is computed so far is done by then."""
        with self._lock:
            self._step(_COMPUTE)
            event.ms, event.knows, event.copies = self._now[_COMPUTE], self._of(_COMPUTE), 0

    def record_copy(self, event: Mark) -> None:
        """What is queued so far is copied by then."""
        with self._lock:
            self._step(_COPY)
            event.ms, event.knows, event.copies = self._now[_COPY], self._of(_COPY), self._issued

    def wait_compute(self, event: Mark) -> None:
        """Computing goes on after it: the copies before it are done now at the latest."""
        with self._lock:
            self._perform(event.copies)
            self._join(_COMPUTE, event.knows)
            self.stall_ms += max(0.0, event.ms - self._now[_COMPUTE])
            self._now[_COMPUTE] = max(self._now[_COMPUTE], event.ms)

    def wait_copy(self, event: Mark) -> None:
        """Copying goes on after it."""
        with self._lock:
            self._join(_COPY, event.knows)
            self._now[_COPY] = max(self._now[_COPY], event.ms)

    def wait_host(self, event: Mark) -> None:
        """This thread goes on after it."""
        with self._lock:
            self._perform(event.copies)
            known = self._hosts.get(threading.get_ident(), (0, 0))
            self._hosts[threading.get_ident()] = (max(known[0], event.knows[0]), max(known[1], event.knows[1]))

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, home: str = "pinned") -> None:
        """Queue it. What it would overwrite while it is read is torn: NaN bytes."""
        if target.shape != source.shape:
            raise RuntimeError(f"a copy of {source.numel()} bytes into {target.numel()}")
        with self._lock:
            self._step(_COPY)
            slot = self._touched.get(target.untyped_storage().data_ptr())
            torn = slot is not None and self._knows[_COPY][_COMPUTE] < slot.computed
            if slot is not None:
                if torn:
                    self.races.append(f"copy {self._issued} overwrites a slot that {slot.holder!r} may still be reading")
                slot.copied = self._knows[_COPY][_COPY]
            self._now[_COPY] = max(self._now[_COPY], self._host_now)
            self._queue.append((target, None if torn else source))
            self._issued += 1
            self._take_time(source.numel(), home)
            if self._schedule == "early":
                self._perform(self._issued)

    def _take_time(self, num_bytes: int, home: str) -> None:
        if home == "disk" and self._disk_ms_per_byte:
            self._disk_now = max(self._disk_now, self._disk_copies[0]) + num_bytes * self._disk_ms_per_byte
            self._now[_COPY] = max(self._now[_COPY], self._disk_now)
        took = num_bytes * self._ms_per_byte[home]
        self._now[_COPY] += took
        self.copy_ms += took
        if home == "disk":
            self._disk_copies.append(self._now[_COPY])

    def drain(self) -> None:
        """Everything is done, and known to this thread."""
        with self._lock:
            self._perform(self._issued)
            both = (max(k[0] for k in self._knows), max(k[1] for k in self._knows))
            self._hosts[threading.get_ident()] = both
            self._now = [max(self._now)] * 2
            self._host_now = max(self._host_now, self._now[_COMPUTE])

    def poison(self, slot: torch.Tensor) -> None:
        """NaN bytes, as part of computing."""
        with self._lock:
            self._step(_COMPUTE)
            self._use(slot, "poison")
            slot.fill_(255)

    @contextmanager
    def segment(self, unit: str, slot: torch.Tensor | None = None) -> Iterator[None]:
        """Computing `unit`, which reads `slot`; `""` is a forward, whose parts outside units come last."""
        with self._lock:
            began, stalled = self._now[_COMPUTE], self.stall_ms
            self._step(_COMPUTE)
            if slot is not None:
                self._use(slot, unit)
        yield
        with self._lock:
            self._step(_COMPUTE)
            if slot is not None:
                self._use(slot, unit)
            self._compute(unit)
            if not unit:
                self.forwards.append(Forward(ms=self._now[_COMPUTE] - began, stall_ms=self.stall_ms - stalled))

    def _compute(self, unit: str) -> None:
        """The clocks of compute and of the host after a unit, or after what is outside them."""
        queued, computed = self._host_ms.get(unit, 0.0), self._compute_ms.get(unit, 0.0)
        if unit:
            begin, self._host_now = max(self._now[_COMPUTE], self._host_now), self._host_now + queued
            self._now[_COMPUTE] = max(begin + computed, self._host_now)
            return
        self._now[_COMPUTE] += computed
        if self._host_waits:
            self._host_now = max(self._host_now, self._now[_COMPUTE])
        self._host_now += queued
        self._now[_COMPUTE] = max(self._now[_COMPUTE], self._host_now)
        # No further ahead than a forward.
        self._host_now = max(self._host_now, self._now[_COMPUTE] - sum(self._host_ms.values()))

    def _use(self, slot: torch.Tensor, unit: str) -> None:
        """Compute reads or writes a slot."""
        touched = self._touched[slot.untyped_storage().data_ptr()]
        if self._knows[_COMPUTE][_COPY] < touched.copied:
            self.races.append(f"{unit!r} uses a slot whose copy nothing waited for")
        touched.computed = self._knows[_COMPUTE][_COMPUTE]
        touched.holder = unit

    def _step(self, queue: int) -> None:
        """One more thing on a queue, behind all that the thread that queues it has waited for."""
        self._join(queue, self._hosts.get(threading.get_ident(), (0, 0)))
        self._knows[queue][queue] += 1
        if self._schedule == "random" and self._queue and self._random.random() < _EAGERNESS:
            self._perform(self._performed + self._random.randint(1, len(self._queue)))

    def _join(self, queue: int, knows: tuple[int, int]) -> None:
        mine = self._knows[queue]
        mine[0], mine[1] = max(mine[0], knows[0]), max(mine[1], knows[1])

    def _of(self, queue: int) -> tuple[int, int]:
        return self._knows[queue][0], self._knows[queue][1]

    def _perform(self, until: int) -> None:
        """Do copies, in order, until so many are done."""
        while self._performed < until:
            target, source = self._queue.popleft()
            target.fill_(255) if source is None else target.copy_(source)
            self._performed += 1
