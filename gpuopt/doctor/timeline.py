"""A trace -> when its device was busy, when it idled and who was waited for: what several rules ask of the same events."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar
from weakref import ReferenceType, ref

from gpuopt.core.trace import Copy, Fetch, Kernel, RuntimeCall, Trace
from gpuopt.doctor.evidence import Evidence

Found = TypeVar("Found")
_SYNCS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
)
"""Calls that hold the host until the device is done; cudaStreamWaitEvent and queries do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A time in which nothing ran on the device, between two pieces of work of one step."""

    start_ns: int
    dur_ns: int
    before: int | None
    """Correlation of the work that ended it."""


def _once(find: Callable[[Trace], Found]) -> Callable[[Trace], Found]:
    """Ask the same of the same trace once: a dozen rules do, and a trace may hold a million events. Only the last trace's answer is kept, while that trace lives."""
    kept: list[tuple[ReferenceType[Trace], Found]] = []

    @wraps(find)
    def once(trace: Trace) -> Found:
        if kept and kept[0][0]() is trace:
            return kept[0][1]
        found = find(trace)
        kept[:] = [(ref(trace, lambda _: kept.clear()), found)]
        return found

    return once


def num_steps(trace: Trace) -> int:
    """Calls traced, at least 1: what every sum is divided by."""
    return max(1, len(trace.steps))


@_once
def work(trace: Trace) -> list[Kernel | Copy]:
    """Kernels and copies of the steps, by their start."""
    found: list[Kernel | Copy] = [k for k in trace.kernels if k.step is not None]
    found += [c for c in trace.copies if c.step is not None]
    return sorted(found, key=lambda w: w.start_ns)


@_once
def gaps(trace: Trace) -> tuple[Gap, ...]:
    """Idle times between two pieces of work of the same step, over all streams. Before the first and after the last nothing is said: the step's ends do that."""
    found: list[Gap] = []
    end: int | None = None
    step: int | None = None
    for item in work(trace):
        if end is not None and item.step == step and item.start_ns > end:
            found.append(Gap(start_ns=end, dur_ns=item.start_ns - end, before=item.correlation))
        end = item.start_ns + item.dur_ns if end is None or item.step != step else max(end, item.start_ns + item.dur_ns)
        step = item.step
    return tuple(found)


def merged(items: Iterable[Kernel | Copy | Fetch | RuntimeCall]) -> list[tuple[int, int]]:
    """(start, end) of the times in which any of them ran, disjoint and in order."""
    found: list[tuple[int, int]] = []
    for start, end in sorted((i.start_ns, i.start_ns + i.dur_ns) for i in items):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def overlap_ns(spans: list[tuple[int, int]], start: int, stop: int) -> int:
    """How much of [start, stop) `merged` spans cover."""
    total, at = 0, max(0, bisect.bisect_right(spans, (start, start)) - 1)
    while at < len(spans) and spans[at][0] < stop:
        total += max(0, min(spans[at][1], stop) - max(spans[at][0], start))
        at += 1
    return total


def busy_ms(trace: Trace) -> float:
    """Device busy time a call: the union over streams."""
    return sum(end - start for start, end in merged(work(trace))) / num_steps(trace) / 1e6


def fetches(trace: Trace) -> tuple[Fetch, ...]:
    """Those of the traced calls. The first of an epoch starts the workers, long before."""
    if not trace.steps:
        return ()
    begin, end = trace.steps[0].start_ns, max(s.start_ns + s.dur_ns for s in trace.steps)
    return tuple(f for f in trace.fetches if f.start_ns < end and f.start_ns + f.dur_ns > begin)


LAUNCHING = ("launch gaps", "python and framework")
"""Parts of the waterfall in which the host is on its way to the next launch: what the replay of a CUDA graph takes away. A wait stays a wait."""


def idle_ms(evidence: Evidence, *parts: str) -> float | None:
    """Idle time a call, untraced: of these parts of the waterfall, of all its idle ones where none is named. Without a waterfall wall minus busy; None without a wall time."""
    assert evidence.trace is not None
    if evidence.waterfall is not None:
        return evidence.waterfall.ms(*parts) if parts else evidence.waterfall.idle_ms
    return None if evidence.wall_ms is None else max(0.0, evidence.wall_ms - busy_ms(evidence.trace))


def between_ms(evidence: Evidence, *parts: str) -> float | None:
    """Idle time a call of these parts that lies between two pieces of work of one call, and not in a loader: what a program does before its first launch, after its last one
    and for its next batch is its own affair."""
    trace = evidence.trace
    assert trace is not None
    idle, fetched = idle_ms(evidence, *parts), merged(trace.fetches)
    inside = sum(gap.dur_ns - overlap_ns(fetched, gap.start_ns, gap.start_ns + gap.dur_ns) for gap in gaps(trace)) / num_steps(trace) / 1e6
    return None if idle is None else min(idle, inside * stretch(evidence))


def stretch(evidence: Evidence) -> float:
    """Untraced over traced idle time, 0..1: tracing stretches the host, so a gap in a trace is worth this much of itself. 1 where the wall time is unknown."""
    assert evidence.trace is not None
    trace = evidence.trace
    traced = sum(s.dur_ns for s in trace.steps) / num_steps(trace) / 1e6 - busy_ms(trace)
    idle = idle_ms(evidence)
    if idle is None or traced <= 0:
        return 1.0
    # Busy time has no room for the host's part of a copy, which the waterfall keeps apart from idle time.
    copying = evidence.waterfall.ms("copy calls") if evidence.waterfall is not None else 0.0
    return min(1.0, (idle + copying) / traced)


def wait_stretch(evidence: Evidence) -> float:
    """Untraced over traced idle time after waits, 0..1. A wait empties the queue with and without a tracer: all of the traced idle time counts, as far as the wall has room for it."""
    trace, found = evidence.trace, evidence.waterfall
    assert trace is not None
    traced = math.fsum(idle_ns for _, idle_ns in waits(trace)) / num_steps(trace) / 1e6
    return min(1.0, found.ms("synchronisation") / traced) if found is not None and traced > 0 else stretch(evidence)


@_once
def usual_gap_ns(trace: Trace) -> float:
    """Median idle time between two pieces of work that follow each other, 0 among them where they touch: what any launch costs here."""
    lengths: list[int] = []
    end, step = 0, None
    for item in work(trace):
        if item.step == step:
            lengths.append(max(0, item.start_ns - end))
        end = item.start_ns + item.dur_ns if item.step != step else max(end, item.start_ns + item.dur_ns)
        step = item.step
    return float(sorted(lengths)[len(lengths) // 2]) if lengths else 0.0


@_once
def waits(trace: Trace) -> tuple[tuple[RuntimeCall, float], ...]:
    """(call that holds the host until the device is done, ns the device then idles before the work launched next), in the order of the calls.

    A blocking copy is one too. The idle time is that before the next launch of the same thread (before the end of the call where none comes), less what a launch usually costs.
    """
    launches: dict[str, list[RuntimeCall]] = {}
    for call in trace.runtime:
        if call.kind in ("launch", "graph", "copy") and call.correlation is not None and call.step is not None:
            launches.setdefault(call.thread, []).append(call)
    starts = {thread: [c.start_ns for c in calls] for thread, calls in launches.items()}  # in order, as the runtime calls are
    before = {gap.before: gap.dur_ns for gap in gaps(trace) if gap.before is not None}
    usual = usual_gap_ns(trace)
    blocking = {c.correlation for c in trace.copies if c.kind == "d2h" and c.memory == "pageable" and c.correlation is not None}
    found: list[tuple[RuntimeCall, float]] = []
    spent: set[int] = set()
    closed: set[int] = set()
    for call in trace.runtime:
        if call.step is None or not (call.name.startswith(_SYNCS) or call.correlation in blocking):
            continue
        calls = launches.get(call.thread, [])
        at = bisect.bisect_left(starts.get(call.thread, []), call.start_ns + max(1, call.dur_ns))
        after = calls[at] if at < len(calls) and calls[at].step == call.step else None
        idle = 0.0
        # Two waits in a row (a blocking copy, then the synchronisation it makes) share one gap: the first has it.
        if after is None:  # nothing comes: idle to the end of the step
            step = trace.steps[call.step] if call.step < len(trace.steps) else None
            idle = (
                max(0.0, step.start_ns + step.dur_ns - call.start_ns - call.dur_ns - usual)
                if step is not None and call.step not in closed
                else 0.0
            )
            closed.add(call.step)
        elif after.correlation is not None and after.correlation not in spent:
            idle = max(0.0, before.get(after.correlation, 0) - usual)
            spent.add(after.correlation)
        found.append((call, idle))
    return tuple(found)


def kernel_ms(trace: Trace) -> float:
    """Summed kernel time a call."""
    return math.fsum(k.dur_ns for k in trace.kernels if k.step is not None) / num_steps(trace) / 1e6


def op_path(trace: Trace, op: int | None) -> tuple[str, ...]:
    """Names of the op and those around it, innermost first."""
    return tuple(o.name for o in trace.chain(op))


def module_of(trace: Trace, op: int | None) -> str | None:
    """Qualified name of the innermost module around an op; None where no ranges were recorded."""
    return next((o.module for o in trace.chain(op) if o.module is not None), None)


def time_by_op(trace: Trace) -> dict[int, float]:
    """Index of the op that launched it -> ns on the device over all steps, kernels and copies within the device alike."""
    times: dict[int, float] = {}
    for item in work(trace):
        if item.op is not None and (isinstance(item, Kernel) or item.kind == "d2d"):
            times[item.op] = times.get(item.op, 0.0) + item.dur_ns
    return times


def time_below(trace: Trace, names: frozenset[str]) -> dict[int, float]:
    """Index of each outermost op of these names -> ns on the device of all that ran inside it."""
    times: dict[int, float] = {}
    for op, ns in time_by_op(trace).items():
        found = [o.index for o in trace.chain(op) if o.name in names]
        if found:
            times[found[-1]] = times.get(found[-1], 0.0) + ns
    return times
