"""A trace whose weights travel in pieces, call after call -> what that costs, split by where it goes, and what each step of the cure would give back, in order.

The order is that of doctor's rules on streaming: stop reloading, pin once, copy large, wait for nothing, overlap, keep resident. A step is priced with those before it done, so
that the prices add up.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass

from gpuopt.core.trace import Copy, Trace
from gpuopt.doctor import timeline, transfers, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import WORTH_IT

FITS = 0.9
"""Of the device's memory: what the weights may take and still leave room to run."""
WAKES_NS = 50_000
"""From the return of a wait to the next launch: Python takes tens of microseconds. What is longer is other work: reading, unpickling, page faults."""
SMALL_BYTES = 16 * 2**20
"""Copies below this do not reach the link's full rate (measured on an H200: pinned blocks of 16 MiB and more do)."""
OVERLAPS = 0.1
"""Of the copies' time, under kernels: less is chance."""

Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Milliseconds a call in which no kernel runs around a copy of weights, each counted once."""

    load_ms: float = 0.0
    """The host does something else: it reads a file, unpickles, touches pages."""
    memcpy_ms: float = 0.0
    """The host is inside the copy call, and the engine does not move anything yet: the driver's staging of pageable memory."""
    dma_ms: float = 0.0
    """The copy engine moves bytes."""
    wait_ms: float = 0.0
    """The host waits, or has just been woken and has not launched the next thing."""

    @property
    def total_ms(self) -> float:
        """The device computes nothing: it is stalled on a copy."""
        return self.load_ms + self.memcpy_ms + self.dma_ms + self.wait_ms

    def __str__(self) -> str:
        parts = (
            (self.load_ms, "the host loads or prepares"),
            (self.memcpy_ms, "the host is inside memcpy"),
            (self.dma_ms, "the copy engine moves bytes"),
            (self.wait_ms, "waits and wakes"),
        )
        return ", ".join(f"{words.ms(ms)} {what}" for ms, what in parts if ms > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """How a call streams its weights, a call."""

    copies: tuple[Copy, ...]
    """Of all traced calls."""
    bytes: float
    num_copies: float
    num_runs: float
    """Stretches without a kernel that hold such a copy."""
    num_waits: float
    """Waits of the host in those stretches."""
    stall: Stall
    dma_ms: float
    """Of all copies, hidden ones among them."""
    hidden_ms: float
    """Of it, under kernels."""
    compute_ms: float
    """Kernels."""
    link: float | None
    """Bytes a second of pinned memory, measured here."""
    reload_ms: float
    """What each step gives back, with those before it done."""
    pin_ms: float
    large_ms: float
    wait_ms: float
    overlap_ms: float
    resident_ms: float
    room_bytes: float | None
    """Of the device, that nothing uses at the peak; None where nobody looked."""
    resident: tuple[str, ...]
    """Layers that are not copied though their like are, in their order; () where none of them stays."""
    moved: tuple[str, ...]
    is_contiguous: bool
    """All of `resident` lie before or after all of `moved`."""


def is_too_large(evidence: Evidence) -> bool:
    """Whether the weights do not fit the device: then they must travel, and the question is how."""
    whole = transfers.parameter_bytes(evidence)
    memory = evidence.device.memory_bytes if evidence.device is not None else None
    return bool(whole and memory and whole > FITS * memory)


def streamed(evidence: Evidence) -> Streamed | None:
    """None where no weights are copied, or where nothing says that they have to be: they fit, and no layer like those that travel stays behind (GPU108 prices that)."""
    trace = evidence.trace
    if trace is None or evidence.device is None:
        return None
    copies = transfers.sent(evidence).weights
    if not copies:
        return None
    moved, resident = _residency(trace, copies)
    if not is_too_large(evidence) and not resident:
        return None
    steps = timeline.num_steps(trace)
    kernels = timeline.merged(k for k in trace.kernels if k.step is not None)
    link = evidence.device.ceilings.bandwidth("measured", "h2d")
    free = _free(trace, kernels)
    found = _stalls(evidence, trace, copies, free)
    stall = found.stall
    num_bytes = sum(c.bytes for c in copies) / steps
    compute_ms = sum(stop - start for start, stop in kernels) / steps / 1e6
    dma_ms = sum(c.dur_ns for c in copies) / steps / 1e6
    hidden_ms = sum(timeline.overlap_ns(kernels, c.start_ns, c.start_ns + c.dur_ns) for c in copies) / steps / 1e6
    # Each step against what the one before it leaves.
    pageable_ms, pinned_ms = found.pageable_ms, found.pinned_ms
    pageable_floor = found.pageable_bytes / link * 1e3 if link else pageable_ms
    pinned_floor = found.pinned_bytes / link * 1e3 if link else pinned_ms
    pin_ms = max(0.0, pageable_ms - pageable_floor)
    is_piecemeal = num_bytes / (len(copies) / steps) < SMALL_BYTES and len(copies) / steps >= 2 * found.num_runs
    large_ms = max(0.0, pinned_ms - pinned_floor) if is_piecemeal else 0.0
    left_ms = pageable_ms + pinned_ms - pin_ms - large_ms
    overlap_ms = min(left_ms, max(0.0, compute_ms - hidden_ms))
    left_ms -= overlap_ms
    memory = evidence.device.memory_bytes
    room = max(0.0, FITS * memory - evidence.peak_bytes) if memory and evidence.peak_bytes is not None else None
    return Streamed(
        copies=copies,
        bytes=num_bytes,
        num_copies=len(copies) / steps,
        num_runs=found.num_runs,
        num_waits=found.num_waits,
        stall=stall,
        dma_ms=dma_ms,
        hidden_ms=hidden_ms,
        compute_ms=compute_ms,
        link=link,
        reload_ms=stall.load_ms,
        pin_ms=pin_ms,
        large_ms=large_ms,
        wait_ms=stall.wait_ms,
        overlap_ms=overlap_ms,
        resident_ms=min(left_ms, room / link * 1e3) if room is not None and link else 0.0,
        room_bytes=room,
        resident=resident,
        moved=moved,
        is_contiguous=_is_contiguous(resident, moved),
    )


STEPS = ("reload_ms", "pin_ms", "large_ms", "wait_ms", "overlap_ms", "resident_ms")
"""Of the cure, in order: fields of Streamed."""


def is_told(found: Streamed, step: str) -> bool:
    """Whether a step saves what would be a warning in the call that the steps before it leave: after the large ones the small ones count."""
    left_ms = found.compute_ms + found.stall.total_ms - sum(getattr(found, before) for before in STEPS[: STEPS.index(step)])
    return bool(getattr(found, step) > WORTH_IT * left_ms)


def is_waited_for(found: Streamed) -> bool:
    """A loader that reaches the bound but for its first copy is left alone."""
    return found.stall.total_ms > WORTH_IT * (found.compute_ms + found.stall.total_ms)


@dataclass(slots=True)
class _Found:
    stall: Stall
    pageable_ms: float
    pinned_ms: float
    pageable_bytes: float
    pinned_bytes: float
    """Of exposed copies, by the share of them that is exposed."""
    num_runs: float
    num_waits: float


def _stalls(evidence: Evidence, trace: Trace, copies: tuple[Copy, ...], free: Spans) -> _Found:
    """Every stretch without a kernel that a copy of weights touches, split: the engine first, then the host inside the copy, then its waits, then the rest."""
    steps = timeline.num_steps(trace)
    numbers = {c.correlation: c for c in copies if c.correlation is not None}
    calls = [r for r in trace.runtime if r.correlation in numbers and r.step is not None]
    engine = timeline.merged(copies)
    inside = timeline.merged(calls)
    syncs = [r for r in trace.runtime if r.kind == "sync" and r.step is not None]
    ends = sorted(r.start_ns + r.dur_ns for r in syncs)
    host_only = _minus(inside, engine)
    wait_only = _minus(_minus(timeline.merged(syncs), engine), inside)
    split = {"load": 0.0, "memcpy": 0.0, "dma": 0.0, "wait": 0.0}
    runs = num_waits = 0
    for start, stop in free:
        dma = timeline.overlap_ns(engine, start, stop)
        if not dma:
            continue
        runs += 1
        host = timeline.overlap_ns(host_only, start, stop)
        waited = timeline.overlap_ns(wait_only, start, stop)
        rest = stop - start - dma - host - waited
        waits = bisect.bisect_right(ends, stop) - bisect.bisect_left(ends, start)
        num_waits += waits
        woken = min(rest, WAKES_NS * max(1, waits))
        split["dma"] += dma
        split["memcpy"] += host
        split["wait"] += waited + (woken if waits else 0)
        split["load"] += rest - woken  # a launch takes its time with and without a wait before it
    stretch = timeline.stretch(evidence)
    stall = Stall(
        load_ms=split["load"] * stretch / steps / 1e6,
        memcpy_ms=split["memcpy"] / steps / 1e6,
        dma_ms=split["dma"] / steps / 1e6,
        wait_ms=split["wait"] * stretch / steps / 1e6,
    )
    exposed = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for copy in copies:
        seen = timeline.overlap_ns(free, copy.start_ns, copy.start_ns + copy.dur_ns)
        side = exposed[copy.memory == "pageable"]
        side[0] += seen
        side[1] += copy.bytes * (seen / copy.dur_ns if copy.dur_ns else 1.0)
    # The host's part of a pageable copy goes with it: a pinned one returns at once.
    pageable_ms = exposed[True][0] / steps / 1e6 + (stall.memcpy_ms if exposed[True][0] else 0.0)
    pinned_ms = exposed[False][0] / steps / 1e6 + (stall.memcpy_ms if not exposed[True][0] else 0.0)
    return _Found(
        stall=stall,
        pageable_ms=pageable_ms,
        pinned_ms=pinned_ms,
        pageable_bytes=exposed[True][1] / steps,
        pinned_bytes=exposed[False][1] / steps,
        num_runs=runs / steps,
        num_waits=num_waits / steps,
    )


def _free(trace: Trace, kernels: Spans) -> Spans:
    """Stretches before the first and between two kernels of a step. What is copied after its last one is for the next call: nothing waits for it here."""
    found: Spans = []
    for step in trace.steps:
        at = bisect.bisect_right(kernels, (step.start_ns + step.dur_ns, 0)) - 1
        if at >= 0 and kernels[at][1] > step.start_ns:
            found.append((step.start_ns, kernels[at][1]))
    return _minus(sorted(found), kernels)


def _minus(spans: Spans, others: Spans) -> Spans:
    """What `spans` cover and `others` do not; both disjoint and in order, as is what comes back."""
    found: Spans = []
    at = 0
    for start, stop in spans:
        while at < len(others) and others[at][1] <= start:
            at += 1
        here = at
        while here < len(others) and others[here][0] < stop:
            if others[here][0] > start:
                found.append((start, others[here][0]))
            start = max(start, others[here][1])
            here += 1
        if start < stop:
            found.append((start, stop))
    return found


_LAYER = re.compile(r"^(.*?)\.?(\d+)(?:\.|$)")


def _residency(trace: Trace, copies: tuple[Copy, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(layers that are copied, layers like them that are not), by the numbers in their names, in order; ((), ()) where modules were not recorded."""
    ran: dict[str, set[int]] = {}
    for kernel in trace.kernels:
        if kernel.step is not None and (layer := _layer(timeline.module_of(trace, kernel.op))):
            ran.setdefault(layer[0], set()).add(layer[1])
    moved: dict[str, set[int]] = {}
    for copy in copies:
        if layer := _layer(timeline.module_of(trace, copy.op)):
            moved.setdefault(layer[0], set()).add(layer[1])
    stack = max(moved, key=lambda name: len(moved[name]), default=None)
    if stack is None:
        return (), ()
    stays = sorted(ran.get(stack, set()) - moved[stack])
    prefix = f"{stack}." if stack else ""
    return tuple(f"{prefix}{n}" for n in sorted(moved[stack])), tuple(f"{prefix}{n}" for n in stays)


def _layer(name: str | None) -> tuple[str, int] | None:
    found = _LAYER.match(name) if name else None
    return (found[1], int(found[2])) if found else None


def _is_contiguous(resident: tuple[str, ...], moved: tuple[str, ...]) -> bool:
    if len(resident) < 2 or len(moved) < 2:
        return False
    kept, gone = ([number(name) for name in names] for names in (resident, moved))
    return max(kept) < min(gone) or min(kept) > max(gone)


def number(layer: str) -> int:
    """`model.layers.3` -> 3."""
    return int(layer.rpartition(".")[2])


def is_misplaced(found: Streamed) -> bool:
    """Copies do run under kernels, and what is left of them is so because the layers that stay all lie together."""
    return found.is_contiguous and found.hidden_ms > OVERLAPS * found.dma_ms
