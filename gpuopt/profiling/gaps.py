"""Trace -> why its device idled, split by what was being waited for. Pure.

Between two pieces of work the device waits for one of: a copy call that holds the host, the rest of a synchronisation, a launch (the host is inside an op or a CUDA call), the host
outside any op (Python, a framework's own code), or, when the next piece was launched long before, for nothing the host could change. The synchronisation that ends a traced call is
the tracer's own: what it costs is kept apart, because a timed loop makes none.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from gpuopt.core.trace import Copy, Kernel, RuntimeCall, Trace

Span = tuple[int, int]


@dataclass(slots=True)
class Idle:
    """Idle nanoseconds of the device a traced call (the mean over the steps), by reason."""

    copy_calls: float = 0.0
    """The host is inside a copy call, no transfer runs."""
    queued: float = 0.0
    """The next work was launched before the device fell idle."""
    sync: float = 0.0
    """The host waited for the device to run dry, and the pipeline fills again; less what any launch costs here."""
    launch: float = 0.0
    """The host is inside an op or a CUDA call on the way to the next launch."""
    python: float = 0.0
    """The host is outside any op."""
    tracer: float = 0.0
    """Inside the synchronisation that ends a traced call."""
    waits: float = 0.0
    """Synchronisations a call that were followed by idle time."""
    works: float = 0.0
    """Kernels and copies a call."""
    host: float = 0.0
    """From the start of a call to the end of its last launch."""
    queued_mean: float = 0.0
    """Gap between two pieces of work of which the second was waiting already."""
    graph_start: float = 0.0
    """From a graph's launch to its first kernel, a call."""
    blocks: bool = False
    """Something inside the call holds the host until the device is done."""


@dataclass(slots=True)
class _Host:
    """What the host did, by thread, in merged spans."""

    busy: dict[str, list[Span]] = field(default_factory=dict)
    copy_calls: list[Span] = field(default_factory=list)
    syncs: list[Span] = field(default_factory=list)
    launches: dict[int, RuntimeCall] = field(default_factory=dict)
    main: str = ""


def idle(trace: Trace) -> Idle:
    """Over the steps of a trace that ran on a device. Work without a recorded launch is judged by the thread with most launches."""
    steps = len(trace.steps)
    found = Idle()
    if not steps:
        return found
    host = _host(trace)
    by_step: list[list[Kernel | Copy]] = [[] for _ in trace.steps]
    everything: list[Kernel | Copy] = [*trace.kernels, *trace.copies]
    for piece in everything:
        if piece.step is not None:
            by_step[piece.step].append(piece)
    gaps = [_gaps(work, step.start_ns, step.start_ns + step.dur_ns) for work, step in zip(by_step, trace.steps, strict=True)]
    inner = [end - start for step in gaps for start, end, item, is_first in step if item is not None and not is_first]
    usual = float(median(inner)) if inner else 0.0
    queued: list[int] = []
    for number, step in enumerate(trace.steps):
        found.works += len(by_step[number])
        end = step.start_ns + step.dur_ns
        calls = [c for w in by_step[number] if (c := host.launches.get(w.correlation or -1)) is not None and c.step == number]
        last = max((c.start_ns + c.dur_ns for c in calls), default=step.start_ns)
        found.host += max(0, last - step.start_ns)
        # A wait of the call's own is followed by more launches, or by a second one, the tracer's.
        ends = [s for s in host.syncs if step.start_ns <= s[0] < end]
        tracers = ends[-1][0] if ends and ends[-1][0] >= last else end
        found.blocks |= any(s[0] < tracers for s in ends) or any(_is_blocking(w) for w in by_step[number])
        for start, stop, item, is_first in gaps[number]:
            call = host.launches.get(item.correlation or -1) if item is not None else None
            if item is not None and call is not None and call.start_ns <= start and not is_first:
                queued.append(stop - start)
            _place(found, host, start, stop, item, call, usual, tracers)
            if is_first and call is not None and call.kind == "graph":
                found.graph_start += stop - max(start, call.start_ns)
    for name in ("copy_calls", "queued", "sync", "launch", "python", "tracer", "waits", "works", "host", "graph_start"):
        setattr(found, name, getattr(found, name) / steps)
    found.queued_mean = sum(queued) / len(queued) if queued else 0.0
    return found


def _place(
    found: Idle, host: _Host, start: int, stop: int, item: Kernel | Copy | None, call: RuntimeCall | None, usual: float, tracers: int
) -> None:
    """Give one gap to its reasons."""
    if item is None and stop > tracers:  # the tail of a call, up to the tracer's synchronisation
        found.tracer += stop - max(start, tracers)
        stop = max(start, tracers)
    if stop <= start:
        return
    copying = _overlap(host.copy_calls, start, stop)
    found.copy_calls += copying
    left = float(stop - start - copying)
    if left <= 0:
        return
    if call is not None and call.start_ns <= start:
        found.queued += left
        return
    until = min(stop, call.start_ns) if call is not None else stop
    if _overlap(host.syncs, start, max(until, start + 1)) > 0:
        waited = max(0.0, left - usual)
        found.sync += waited
        found.waits += 1
        left -= waited
    thread = call.thread if call is not None else host.main
    inside = _overlap(host.busy.get(thread, []), start, until) + (stop - until)
    launching = left * min(1.0, inside / (stop - start))
    found.launch += launching
    found.python += left - launching


def _gaps(work: list[Kernel | Copy], start: int, stop: int) -> list[tuple[int, int, Kernel | Copy | None, bool]]:
    """(start, end, the work that ended it or None at the call's end, whether that was its first) of every time nothing ran, touching pieces as gaps of 0."""
    found: list[tuple[int, int, Kernel | Copy | None, bool]] = []
    end, is_first = start, True
    for item in sorted(work, key=lambda w: w.start_ns):
        begin = min(max(item.start_ns, start), stop)
        if begin >= end:
            found.append((end, begin, item, is_first))
        end = max(end, min(item.start_ns + item.dur_ns, stop))
        is_first = False
    if stop > end:
        found.append((end, stop, None, is_first))
    return found


def _is_blocking(work: Kernel | Copy) -> bool:
    return isinstance(work, Copy) and work.memory == "pageable"


def _host(trace: Trace) -> _Host:
    host = _Host()
    links = {c.correlation for c in trace.copies if c.kind in ("h2d", "d2h") and c.correlation}
    busy: dict[str, list[Span]] = {}
    launches: dict[str, int] = {}
    for op in trace.ops:
        # What has no namespace is a region of compiled code or a mark of the user's; kernels of Triton are launched under their own names.
        if "::" in op.name or op.name.startswith("triton_"):
            busy.setdefault(op.thread, []).append((op.start_ns, op.start_ns + op.dur_ns))
    for call in trace.runtime:
        span = (call.start_ns, call.start_ns + call.dur_ns)
        busy.setdefault(call.thread, []).append(span)
        if call.correlation in links and call.kind != "sync":
            host.copy_calls.append(span)
        if call.kind == "sync" and "Synchronize" in call.name:
            host.syncs.append(span)
        if call.correlation and call.kind in ("launch", "graph", "copy"):
            launches[call.thread] = launches.get(call.thread, 0) + 1
            host.launches.setdefault(call.correlation, call)
    host.busy = {thread: merged(spans) for thread, spans in busy.items()}
    host.copy_calls = merged(host.copy_calls)
    host.syncs = merged(host.syncs)
    host.main = max(launches, key=lambda t: launches[t], default="")
    return host


def merged(spans: Iterable[Span]) -> list[Span]:
    """Disjoint, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _overlap(spans: list[Span], start: int, stop: int) -> int:
    """How much of [start, stop) disjoint spans cover."""
    if not spans:
        return 0
    total = 0
    at = max(0, bisect.bisect_right(spans, (start, start)) - 1)
    while at < len(spans) and spans[at][0] < stop:
        total += max(0, min(spans[at][1], stop) - max(spans[at][0], start))
        at += 1
    return total
