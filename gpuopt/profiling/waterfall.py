"""Trace + untraced wall time + records -> where one forward's wall time went, in the same parts for every backend. Pure.

Tracing stretches the host, never the kernels. So on a GPU kernel and transfer times are taken from the trace (the union over streams: what overlaps is counted once, a transfer under a
kernel not at all), and idle time from the *untraced* wall: wall - busy, split by the reasons gaps.py found, at most what the trace saw of each. What then is left is
`unaccounted`, in the open. Where the host runs ahead (even traced, it launches a call in less time than the device is busy with it, and nothing in the call waits), gaps that the trace
shows while the queue was still empty do not exist back to back: each then counts as the usual gap between queued kernels.
On a CPU the ops are the work, and the profiler's own time lands between them: the excess of traced over untraced time is taken from the framework's part first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from gpuopt.core.result import KERNELS_SCALED, WATERFALL_PARTS, Ceilings, OpRecord, Waterfall, WaterfallPart
from gpuopt.core.trace import Trace
from gpuopt.profiling import gaps, passes

PARTS = WATERFALL_PARTS
"""In the order shown; every waterfall has all of them."""
PAGEABLE, PINNED, D2H = "host-to-device (pageable)", "host-to-device (pinned)", "device-to-host"
_WORK = (passes.TENSOR, passes.OTHER, passes.MEMORY, passes.LAYOUT, passes.CASTS, passes.POINTWISE)

DRIFT = 0.05
"""By how much kernels may be slower in the timed loop than in the trace and still be called the same: a power limit moves an H200's clocks by as much. More is `unaccounted`."""

Span = tuple[int, int]


def build(trace: Trace, wall_ms: float, ceilings: Ceilings, records: Iterable[OpRecord], *, is_traced: bool = False) -> Waterfall:
    """Split `wall_ms`, the untraced wall time of one forward, into `PARTS`: none negative, summing to it.

    Parameters
    ----------
    trace: of the same call. records: `attribute`'s for that trace; they say which share of the busy time is bound by what.
    is_traced: nobody timed these calls without a profiler, `wall_ms` is the traced one: then every gap counts as it was seen.
    """
    rows = list(records)
    wall_ns = wall_ms * 1e6
    if not trace.steps:
        return _assemble(wall_ms, {}, {}, "nothing was traced")
    found = _on_device(trace, wall_ns, ceilings, rows, is_traced) if trace.on_device else _on_host(trace, wall_ns, ceilings, rows)
    return replace(found, method=found.method.replace("untraced", "traced")) if is_traced else found


def _on_device(trace: Trace, wall_ns: float, ceilings: Ceilings, rows: list[OpRecord], is_traced: bool) -> Waterfall:
    steps = len(trace.steps)
    layers = _layers(trace)
    # Earlier in this order hides later: a transfer under a kernel costs nothing.
    exposed = dict(zip(layers, (length / steps for length in _exclusive(list(layers.values()))), strict=True))
    busy_ns = math.fsum(exposed.values())
    split = passes.of_device(trace, rows, ceilings)
    kernel_ns = exposed.pop("kernels")
    parts = {part: kernel_ns * share for part, share in split.shares.items() if part in _WORK}
    # Work of no class cannot happen; what rounding leaves belongs to the largest.
    parts.update(exposed)
    idle = gaps.idle(trace)
    method = f"device busy time from a trace of {_calls(steps)} (union over streams), idle time from the untraced wall time"
    if not is_traced:
        method += f"; a traced call took {sum(s.dur_ns for s in trace.steps) / steps / 1e6:.4g} ms"
    if busy_ns > wall_ns:
        # Kernels ran slower in the trace than in the timed loop (clocks), or timed calls overlapped: shrink, and say by how much.
        scale = wall_ns / busy_ns if busy_ns else 0.0
        parts = {name: ns * scale for name, ns in parts.items()}
        method += f"; {KERNELS_SCALED} {scale:.3f}: the traced device was busy {busy_ns / 1e6:.4g} ms of a {wall_ns / 1e6:.4g} ms wall"
        waiting: dict[str, float] = {}
    else:
        waiting, how = _waiting(idle, busy_ns, wall_ns - busy_ns, is_traced)
        method += f", {how}"
        slower = wall_ns - busy_ns - math.fsum(waiting.values())
        working = math.fsum(ns for name, ns in parts.items() if name in _WORK)
        if _runs_ahead(idle, busy_ns, is_traced) and 0 < slower <= DRIFT * working:
            # A device that is always fed is never idle: its kernels took longer than in the trace, which begins after a pause and at higher clocks.
            parts = {name: ns * (1 + slower / working) if name in _WORK else ns for name, ns in parts.items()}
            method += (
                f"; {KERNELS_SCALED} {1 + slower / working:.3f}: back to back they run slower than after the pauses of a trace (clocks)"
            )
    for name, ns in waiting.items():
        parts[name] = parts.get(name, 0.0) + ns
    if trace.num_lost:
        method += f"; {trace.num_lost} device events lay outside the traced calls"
    details = _details(trace, split, idle, layers, exposed, parts)
    return _assemble(wall_ns / 1e6, {n: ns / 1e6 for n, ns in parts.items()}, details, method)


def _layers(trace: Trace) -> dict[str, list[Span]]:
    """What runs on the device in the steps: kernels with copies inside the device, then transfers by kind."""
    found: dict[str, list[Span]] = {"kernels": [], PAGEABLE: [], PINNED: [], D2H: []}
    found["kernels"] += [(k.start_ns, k.start_ns + k.dur_ns) for k in trace.kernels if k.step is not None]
    for copy in trace.copies:
        if copy.step is not None:
            found[_transfer(copy.kind, copy.memory)].append((copy.start_ns, copy.start_ns + copy.dur_ns))
    return found


def _transfer(kind: str, memory: str) -> str:
    if kind == "h2d":
        return PAGEABLE if memory == "pageable" else PINNED  # memory Kineto does not name comes from a graph or a managed page: no staging
    return D2H if kind == "d2h" else "kernels"


def _runs_ahead(idle: gaps.Idle, busy_ns: float, is_traced: bool) -> bool:
    """Whether the host, even traced, launches a call in less time than the device is busy with it, nothing in the call waits, and calls were timed back to back."""
    return idle.host < busy_ns and not idle.blocks and not is_traced


def _waiting(idle: gaps.Idle, busy_ns: float, room: float, is_traced: bool) -> tuple[dict[str, float], str]:
    """Idle time by part: at most `room`, and of each reason at most what the trace saw. And how that was judged."""
    if _runs_ahead(idle, busy_ns, is_traced):
        queued = min(room, idle.queued_mean * idle.works)
        starting = min(room - queued, idle.graph_start)
        return {"idle": queued, "launch gaps": starting}, "the host runs ahead of the device"
    found: dict[str, float] = {}
    left = room

    def take(name: str, ns: float) -> None:
        nonlocal left
        taken = min(left, ns)
        found[name] = found.get(name, 0.0) + taken
        left -= taken

    # First what tracing does not stretch; of what it does stretch, the shares.
    take("copy calls", idle.copy_calls)
    take("idle", idle.queued)
    take("synchronisation", idle.sync)
    host = idle.launch + idle.python
    scale = min(1.0, left / host) if host else 0.0
    take("launch gaps", idle.launch * scale)
    take("python and framework", idle.python * scale)
    take("synchronisation", idle.tracer)
    return found, "split as the trace saw it"


def _details(
    trace: Trace,
    split: passes.Split,
    idle: gaps.Idle,
    layers: dict[str, list[Span]],
    exposed: dict[str, float],
    parts: dict[str, float],
) -> dict[str, str]:
    steps = len(trace.steps)
    num_kernels = sum(1 for k in trace.kernels if k.step is not None) / steps
    details = {
        "copy calls": "the host inside copy calls, no transfer running",
        "launch gaps": "from the launch of the CUDA graph to its first kernel"
        if idle.graph_start > 0.5 * idle.launch
        else f"the device waits for the host to launch, {num_kernels:.0f} kernels a call",
        "synchronisation": f"{idle.waits:.3g} waits a call" if idle.waits else "",
        "python and framework": "the device waits, the host is outside any op",
        "idle": "between kernels that were already queued",
    }
    for name in (PAGEABLE, PINNED, D2H):
        size = sum(c.bytes for c in trace.copies if c.step is not None and _transfer(c.kind, c.memory) == name) / steps
        total = sum(end - start for start, end in gaps.merged(layers[name])) / steps
        hidden = max(0.0, total - exposed[name])
        if total:
            details[name] = f"{size / 1e6:.4g} MB"
            if hidden > 0.01 * total:
                details[name] += f"; hidden under other work: {hidden / 1e6:.3g} of {total / 1e6:.3g} ms"
    for name in (passes.LAYOUT, passes.CASTS, passes.POINTWISE):
        if split.counts.get(name):
            details[name] = _passes(split.counts[name])
    if split.unknown > 0.001:
        worst = max((passes.TENSOR, passes.OTHER), key=lambda n: parts.get(n, 0.0))
        details[worst] = f"{100 * split.unknown:.2g}% of the kernel time has no known count: placed by kernel name"
    return {name: text if parts.get(name) else "" for name, text in details.items()}


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def _passes(count: float) -> str:
    told = f"{count:.3g}"
    return "1 pass a call" if told == "1" else f"{told} passes a call"


def _exclusive(layers: list[list[Span]]) -> list[int]:
    """Length of time in which each layer is the first active one, by one sweep over all ends."""
    edges = sorted(
        (time, delta, layer)
        for layer, spans in enumerate(layers)
        for start, end in spans
        if end > start
        for time, delta in ((start, 1), (end, -1))
    )
    active = [0] * len(layers)
    lengths = [0] * len(layers)
    last = 0
    for time, delta, layer in edges:
        top = next((i for i, n in enumerate(active) if n), None)
        if top is not None:
            lengths[top] += time - last
        last = time
        active[layer] += delta
    return lengths


def _on_host(trace: Trace, wall_ns: float, ceilings: Ceilings, rows: list[OpRecord]) -> Waterfall:
    steps = len(trace.steps)
    span_ns = sum(s.dur_ns for s in trace.steps) / steps
    # Threads of an op run inside it; only the thread that made the call is on the wall clock.
    main = _busiest_thread(trace)
    ops_ns = sum(op.dur_ns for op in trace.ops if op.step is not None and op.parent is None and op.thread == main) / steps
    split = passes.of_host(trace, rows, ceilings)
    working = 1.0 - split.shares.get(passes.OVERHEAD, 0.0) if split.shares else 0.0
    work_ns = min(ops_ns, span_ns) * working
    framework_ns = min(max(0.0, span_ns - work_ns), max(0.0, wall_ns - work_ns))
    method = f"self times of ops from a trace of {_calls(steps)}; dispatch and views are `python and framework`"
    if span_ns > wall_ns:
        method += f"; tracing took {(span_ns - wall_ns) / 1e6:.3g} ms of {span_ns / 1e6:.4g} ms, taken off the framework's part first"
    scale = 1.0
    if work_ns > wall_ns:
        scale = wall_ns / work_ns
        method += f"; op times scaled by {scale:.3f} to the untraced wall"
    parts = {name: work_ns * scale * split.shares.get(name, 0.0) / working if working else 0.0 for name in _WORK}
    parts["python and framework"] = framework_ns
    details = {name: _passes(split.counts[name]) for name in (passes.LAYOUT, passes.CASTS, passes.POINTWISE) if parts[name]}
    if split.unknown > 0.001:
        details[passes.OTHER] = f"{100 * split.unknown:.2g}% of the time is in ops without a known count or ceiling"
    return _assemble(wall_ns / 1e6, {n: ns / 1e6 for n, ns in parts.items()}, details, method)


def _busiest_thread(trace: Trace) -> str:
    time: dict[str, int] = {}
    for op in trace.ops:
        if op.step is not None and op.parent is None:
            time[op.thread] = time.get(op.thread, 0) + op.dur_ns
    return max(time, key=lambda t: time[t], default="")


def _assemble(wall_ms: float, parts: dict[str, float], details: dict[str, str], method: str) -> Waterfall:
    """Fill in the missing parts, and let `unaccounted` be exactly what is left."""
    accounted = math.fsum(parts.values())
    if accounted > wall_ms:  # by rounding alone
        scale = wall_ms / accounted
        parts = {name: ms * scale for name, ms in parts.items()}
    left = max(0.0, wall_ms - math.fsum(parts.values()))
    if left < 1e-9 * wall_ms:  # the sum's own rounding, not time that nobody could place
        left = 0.0
    values = {**parts, "unaccounted": left}
    return Waterfall(
        wall_ms=wall_ms,
        parts=tuple(WaterfallPart(name=n, ms=values.get(n, 0.0), detail=details.get(n, "")) for n in PARTS),
        unaccounted_ms=left,
        method=method,
    )
