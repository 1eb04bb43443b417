"""Units, their places and three rates -> when each copy and each unit's compute happens: an exact simulation of the streamer's protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gpuopt.core.streaming import Unit

DISK_BUFFERS = 3
"""Host buffers a disk ring reads ahead into, where nobody says otherwise."""

_MOST_FORWARDS = 64
"""Simulated at most while looking for the steady state; two or three usually are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What a stream is busy with."""

    stream: str
    """`compute`, `copy` or `disk`."""
    unit: str
    """Empty: what is computed outside units."""
    start_ms: float
    """From the start of the forward that is shown."""
    end_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A forward, simulated."""

    total_ms: float
    """A forward: the mean over the period in which the schedule repeats itself, or over the `forwards` asked for."""
    stall_ms: float
    """Of it, compute waits for a copy."""
    compute_ms: float
    """C: a forward with everything resident. The sum of all computes, or what the host takes to launch them where that is longer."""
    link_ms: float
    """What the copies of a forward take on the link, nothing else counted."""
    disk_ms: float
    """What the reads of a forward take on the disk."""
    copied_bytes: int
    """A forward, over the link. A unit alone in its slot stays there and counts nothing."""
    demand_fetches: int
    """A forward: units that were not in their slot when their compute was due, nor on the way there."""
    spans: tuple[Span, ...] = ()
    """Of the last forward simulated, in the order of their start; a copy that began in the forward before starts below 0."""

    @property
    def bound_ms(self) -> float:
        """max(C, S/B, D/B_disk): no schedule of the same bytes is faster."""
        return max(self.compute_ms, self.link_ms, self.disk_ms)


def simulate(
    units: Sequence[Unit],
    resident: Collection[str],
    binding: Mapping[str, int],
    slots: Mapping[str, Sequence[int]],
    compute_ms: Mapping[str, float],
    link_bytes_per_s: float,
    *,
    wrap: bool = True,
    forwards: int | None = None,
    homes: Mapping[str, str] | None = None,
    pageable_bytes_per_s: float | None = None,
    disk_bytes_per_s: float | None = None,
    disk_buffers: int = DISK_BUFFERS,
    host_ms: Mapping[str, float] | None = None,
    host_waits: bool = False,
    spans: bool = True,
) -> Timeline:
    """The protocol that the streamer runs, on two streams (three with a disk) and the host, which queues one unit after the other.

    Before a unit, compute waits until its slot is ready (a unit that is not on its way there is fetched, once its slot is free); after it, the slot
    is free and the next unit of that slot is queued on the copy stream, which takes one after the other. `wrap=False` starts each
    forward's first copies when the forward starts. `forwards=None` looks for the steady state, from slots that are full; a number
    simulates that many from slots that are empty.
    `units` is in the order of a forward, `compute_ms` maps a unit (and `""`, everything outside) to milliseconds, a missing one takes none.
    `host_ms` likewise is what the host takes to queue each: a unit ends when it is computed and all of it has been queued, and copies begin no sooner than they are queued. The
    host is ahead by a forward at most. `host_waits`: it begins with a forward's `""` when all of the forward is computed. None: the host is infinitely fast.
    A ring of which `compute_ms` knows no unit, while it knows others, does not run in this workload and is left out.
    """
    ran = _running(units, compute_ms)
    machine = _Machine(
        ran,
        frozenset(resident),
        binding,
        compute_ms,
        link_bytes_per_s,
        homes or {},
        pageable_bytes_per_s,
        disk_bytes_per_s,
        host_ms or {},
        host_waits,
    )
    state = _State(machine, warm=forwards is None and wrap, disk_buffers=disk_buffers)
    ends = [0.0]
    counts = [(0, 0.0, 0.0, 0)]
    seen: dict[tuple[int, ...], int] = {}
    scale = 1e9 / max(machine.total_ms, 1e-9)
    first = 0
    for done in range(1, (forwards or _MOST_FORWARDS) + 1):
        state.log = [] if spans else None
        state.forward(wrap)
        ends.append(state.compute)
        counts.append((state.copied_bytes, state.link_ms, state.disk_ms, state.demand))
        if forwards is not None:
            continue
        key = state.key(scale)
        if key in seen:
            first = seen[key]
            break
        seen[key] = done
    else:
        # A schedule that drifts towards its rate by a sliver a forward: its later half is closest, and never below the bound.
        first = 0 if forwards is not None else len(ends) // 2
    num = len(ends) - 1 - first
    link = (counts[-1][1] - counts[first][1]) / num
    disk = (counts[-1][2] - counts[first][2]) / num
    total = (ends[-1] - ends[first]) / num
    if forwards is None:
        total = max(total, machine.compute_ms, link, disk)
    stall = total - machine.compute_ms
    start = ends[-2]
    shown = sorted((Span(stream=s, unit=u, start_ms=a - start, end_ms=b - start) for s, u, a, b in state.log or ()), key=_by_start)
    return Timeline(
        total_ms=total,
        stall_ms=stall if stall > 1e-9 * total else 0.0,  # below, it is how floats add up
        compute_ms=machine.compute_ms,
        link_ms=link,
        disk_ms=disk,
        copied_bytes=round((counts[-1][0] - counts[first][0]) / num),
        demand_fetches=round((counts[-1][3] - counts[first][3]) / num),
        spans=tuple(shown),
    )


def _by_start(span: Span) -> tuple[float, float, str, str]:
    return span.start_ms, span.end_ms, span.stream, span.unit


def _running(units: Sequence[Unit], compute_ms: Mapping[str, float]) -> list[Unit]:
    """Without the rings this workload does not run: an encoder, while a decoder takes its steps."""
    rings = {unit.ring for unit in units if unit.name in compute_ms}
    return [unit for unit in units if not rings or unit.ring in rings]


class _Machine:
    """What does not change while time goes by."""

    def __init__(
        self,
        units: Sequence[Unit],
        resident: frozenset[str],
        binding: Mapping[str, int],
        compute_ms: Mapping[str, float],
        link: float,
        homes: Mapping[str, str],
        pageable: float | None,
        disk: float | None,
        host_ms: Mapping[str, float],
        host_waits: bool,
    ) -> None:
        self.names = [unit.name for unit in units]
        self.compute = [compute_ms.get(unit.name, 0.0) for unit in units]
        self.outside = compute_ms.get("", 0.0)
        self.host = [host_ms.get(unit.name, 0.0) for unit in units]
        self.host_outside, self.host_waits = host_ms.get("", 0.0), host_waits
        self.host_ms = sum(self.host) + self.host_outside
        self.compute_ms = self._resident_ms()
        self.num_bytes = [unit.num_bytes for unit in units]
        keys: dict[tuple[str, int], int] = {}
        self.slot = [-1 if unit.name in resident else keys.setdefault((unit.ring, binding[unit.name]), len(keys)) for unit in units]
        bound: list[list[int]] = [[] for _ in keys]
        for index, slot in enumerate(self.slot):
            if slot >= 0:
                bound[slot].append(index)
        self.first = [members[0] for members in bound]
        self.next = [-1] * len(units)
        self.is_last = [False] * len(units)
        for members in bound:
            for index, following in zip(members, members[1:] + members[:1]):
                self.next[index] = following
            self.is_last[members[-1]] = True
        slow = pageable or link
        rates = [slow if homes.get(unit.name) == "pageable" else link for unit in units]
        self.copy = [1e3 * size / rate for size, rate in zip(self.num_bytes, rates)]
        on_disk = [homes.get(unit.name) == "disk" and disk is not None for unit in units]
        self.read = [1e3 * size / (disk or 1.0) if is_there else 0.0 for size, is_there in zip(self.num_bytes, on_disk)]
        self.total_ms = max(self.compute_ms, sum(c for c, slot in zip(self.copy, self.slot) if slot >= 0), sum(self.read))

    def _resident_ms(self) -> float:
        if not self.host_waits:
            return max(sum(self.compute) + self.outside, self.host_ms)
        compute = host = 0.0
        for queued, computed in zip(self.host, self.compute):
            begin, host = max(compute, host), host + queued
            compute = max(begin + computed, host)
        return max(compute + self.outside, host) + self.host_outside


class _State:
    """The clocks of the streams, and what each slot holds."""

    def __init__(self, machine: _Machine, *, warm: bool, disk_buffers: int) -> None:
        self.machine = machine
        self.compute = self.copy = self.disk = self.host = 0.0
        count = len(machine.first)
        self.owner = list(machine.first) if warm else [-1] * count
        self.ready = [0.0] * count
        self.free = [0.0] * count
        self.buffers = [0.0] * max(1, disk_buffers)
        self.buffer = 0
        self.copied_bytes = self.demand = 0
        self.link_ms = self.disk_ms = 0.0
        self.log: list[tuple[str, str, float, float]] | None = None

    def key(self, scale: float) -> tuple[int, ...]:
        """All that the next forward depends on, relative to now. What lies before now cannot delay a copy: each waits for an event after it."""
        now = self.compute
        offsets = [max(0.0, self.copy - now), *(max(0.0, ready - now) for ready in self.ready), max(self.host - now, -self.machine.host_ms)]
        if self.disk_ms:
            turned = self.buffers[self.buffer :] + self.buffers[: self.buffer]
            offsets += [self.disk - now, *(end - now for end in turned)]
        return (*self.owner, *(round(offset * scale) for offset in offsets))

    def fetch(self, unit: int, slot: int, after: float) -> None:
        """One copy, when the copy stream gets to it, what it waits for has happened, and the host has queued it."""
        machine = self.machine
        start = max(self.copy, after, self.host)
        read = machine.read[unit]
        if read:
            begin = max(self.disk, self.buffers[self.buffer])
            self.disk = begin + read
            start = max(start, self.disk)
            self.disk_ms += read
            if self.log is not None:
                self.log.append(("disk", machine.names[unit], begin, self.disk))
        self.copy = start + machine.copy[unit]
        if read:
            self.buffers[self.buffer] = self.copy
            self.buffer = (self.buffer + 1) % len(self.buffers)
        self.owner[slot] = unit
        self.ready[slot] = self.copy
        self.copied_bytes += machine.num_bytes[unit]
        self.link_ms += machine.copy[unit]
        if self.log is not None:
            self.log.append(("copy", machine.names[unit], start, self.copy))

    def forward(self, wrap: bool) -> None:
        """All units once, in their order."""
        machine = self.machine
        now = self.compute
        # No further ahead than a forward: what is queued has an end (1,024 launches), and further gains nothing.
        self.host = max(self.host, now - machine.host_ms)
        for slot, first in enumerate(machine.first):  # in the order of a forward, since slots are numbered as they are met
            if self.owner[slot] < 0 or (not wrap and self.owner[slot] != first):
                self.fetch(first, slot, now)
        for unit, slot in enumerate(machine.slot):
            if slot >= 0:
                if self.owner[slot] != unit:
                    self.demand += 1
                    self.fetch(unit, slot, self.free[slot])
                now = max(now, self.ready[slot])
            now = max(now, self.host)
            self.host += machine.host[unit]
            end = max(now + machine.compute[unit], self.host)
            if self.log is not None:
                self.log.append(("compute", machine.names[unit], now, end))
            now = end
            if slot >= 0:
                self.free[slot] = now
                following = machine.next[unit]
                if following != unit and (wrap or not machine.is_last[unit]):
                    self.fetch(following, slot, now)
        if self.log is not None and machine.outside:
            self.log.append(("compute", "", now, now + machine.outside))
        self.compute = now + machine.outside
        if machine.host_waits:
            self.host = max(self.host, self.compute)
        self.host += machine.host_outside
        self.compute = max(self.compute, self.host)
