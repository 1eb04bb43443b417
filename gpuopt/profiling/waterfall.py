"""Trace + untraced wall time + records -> where one forward's wall time went. Pure.

Tracing stretches the host, never the kernels. So on a GPU kernel and copy times are taken from the trace (the union over streams: what overlaps is counted once, a copy under a
kernel not at all), and the gaps between them from the *untraced* wall: wall - busy, at most the idle time the trace saw. What then is left is `unaccounted`, in the open.
On a CPU the ops are the work, and the profiler's own time lands between them: the excess of traced over untraced time is taken from the framework's part first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gpuopt.core.result import Ceilings, OpRecord, Waterfall, WaterfallPart
from gpuopt.core.trace import RuntimeCall, Trace
from gpuopt.profiling.roofline import floor_ns, link_of

PARTS = ("host-to-device", "launch gaps", "compute-bound", "memory-bound", "other", "device-to-host", "unaccounted")
"""In the order shown; every waterfall has all of them."""


def bound_class(record: OpRecord, ceilings: Ceilings) -> str:
    """`compute-bound`, `memory-bound`, `other` (no formula, or no ceiling), or `overhead`: an op that neither multiplies nor moves, which only a CPU's trace times."""
    if record.flops == 0 and record.bytes == 0:
        return "overhead"
    _, bound, _ = floor_ns(record, ceilings)
    return {"compute": "compute-bound", "memory": "memory-bound"}.get(bound, "other")


def build(trace: Trace, wall_ms: float, ceilings: Ceilings, records: Iterable[OpRecord]) -> Waterfall:
    """Split `wall_ms`, the untraced wall time of one forward, into `PARTS`: none negative, summing to it.

    Parameters
    ----------
    trace: of the same call. records: `attribute`'s for that trace; they say which share of the busy time is bound by what.
    """
    rows = list(records)
    wall_ns = wall_ms * 1e6
    if not trace.steps:
        return _assemble(wall_ms, {}, {}, "nothing was traced")
    return _on_device(trace, wall_ns, ceilings, rows) if trace.on_device else _on_host(trace, wall_ns, ceilings, rows)


def _shares(rows: list[OpRecord], ceilings: Ceilings) -> dict[str, float]:
    """Class -> share of the summed times of the rows, copies over the link left out."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        if row.time_ns and link_of(row) is None:
            sums.setdefault(bound_class(row, ceilings), []).append(row.time_ns)
    total = math.fsum(t for times in sums.values() for t in times)
    return {name: math.fsum(times) / total for name, times in sums.items()} if total else {}


def _on_device(trace: Trace, wall_ns: float, ceilings: Ceilings, rows: list[OpRecord]) -> Waterfall:
    steps = len(trace.steps)
    kernels: list[tuple[int, int]] = [(k.start_ns, k.start_ns + k.dur_ns) for k in trace.kernels if k.step is not None]
    kernels += [(c.start_ns, c.start_ns + c.dur_ns) for c in trace.copies if c.step is not None and c.kind not in ("h2d", "d2h")]
    links = {
        kind: [(c.start_ns, c.start_ns + c.dur_ns) for c in trace.copies if c.step is not None and c.kind == kind]
        for kind in ("h2d", "d2h")
    }
    # Earlier in this list hides later: a copy under a kernel costs nothing.
    layers = _exclusive([kernels, links["h2d"], links["d2h"], _waits(trace, "h2d"), _waits(trace, "d2h")])
    kernel_ns, h2d_ns, d2h_ns, h2d_wait_ns, d2h_wait_ns = (length / steps for length in layers)
    busy_ns = kernel_ns + h2d_ns + d2h_ns
    span_ns = sum(s.dur_ns for s in trace.steps) / steps
    # Host copies through pageable memory: the device idles while the call holds the host.
    waits = {"host-to-device": h2d_wait_ns, "device-to-host": d2h_wait_ns}
    room = max(0.0, wall_ns - busy_ns)
    waited = sum(waits.values())
    waits = {name: ns * min(1.0, room / waited) if waited else 0.0 for name, ns in waits.items()}
    idle_ns = max(0.0, span_ns - busy_ns - waited)
    gaps_ns = min(max(0.0, room - sum(waits.values())), idle_ns)

    shares = _shares(rows, ceilings)
    parts = {
        "host-to-device": h2d_ns + waits["host-to-device"],
        "compute-bound": kernel_ns * shares.get("compute-bound", 0.0),
        "memory-bound": kernel_ns * (shares.get("memory-bound", 0.0) + shares.get("overhead", 0.0)),
        "device-to-host": d2h_ns + waits["device-to-host"],
        "launch gaps": gaps_ns,
    }
    parts["other"] = max(0.0, kernel_ns - parts["compute-bound"] - parts["memory-bound"])
    method = (
        f"device busy time from a trace of {steps} calls (union over streams), gaps from the untraced wall time"
        " (traced time is never used for gaps); kernels of a class share the busy time by their durations"
    )
    if busy_ns > wall_ns:
        # Kernels ran slower in the trace than in the timed loop (clocks), or timed calls overlapped: shrink, and say by how much.
        scale = wall_ns / busy_ns if busy_ns else 0.0
        parts = {name: ns * scale for name, ns in parts.items()}
        method += (
            f"; kernel times scaled by {scale:.3f}: the traced device was busy {busy_ns / 1e6:.4g} ms of a {wall_ns / 1e6:.4g} ms wall"
        )
    num_kernels = sum(1 for k in trace.kernels if k.step is not None) / steps
    pageable = sum(c.bytes for c in trace.copies if c.step is not None and c.memory == "pageable") / steps
    details = {
        "launch gaps": f"device idle, {num_kernels:.0f} kernels a call",
        "host-to-device": f"{sum(c.bytes for c in trace.copies if c.step is not None and c.kind == 'h2d') / steps / 1e6:.4g} MB"
        + (f", {pageable / 1e6:.4g} MB through pageable memory" if pageable else ""),
        "device-to-host": f"{sum(c.bytes for c in trace.copies if c.step is not None and c.kind == 'd2h') / steps / 1e6:.4g} MB",
        "other": "kernels without a known count" if parts["other"] else "",
    }
    if trace.num_lost:
        method += f"; {trace.num_lost} device events lay outside the traced calls"
    return _assemble(wall_ns / 1e6, {n: ns / 1e6 for n, ns in parts.items()}, details, method)


def _waits(trace: Trace, kind: str) -> list[tuple[int, int]]:
    """Host time inside the calls of copies of this kind that go through pageable memory: those calls block, whatever their name says."""
    wanted = {c.correlation for c in trace.copies if c.kind == kind and c.memory == "pageable" and c.correlation}
    calls: list[RuntimeCall] = [r for r in trace.runtime if r.correlation in wanted and r.step is not None]
    return [(r.start_ns, r.start_ns + r.dur_ns) for r in calls]


def _exclusive(layers: list[list[tuple[int, int]]]) -> list[int]:
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
    shares = _shares(rows, ceilings)
    work_ns = min(ops_ns, span_ns) * (1.0 - shares.get("overhead", 0.0)) if shares else 0.0
    framework_ns = max(0.0, span_ns - work_ns)
    gaps_ns = min(framework_ns, max(0.0, wall_ns - work_ns))
    method = f"self times of ops from a trace of {steps} calls; python, dispatch and views are `launch gaps`"
    if span_ns > wall_ns:
        method += f"; tracing took {(span_ns - wall_ns) / 1e6:.3g} ms of {span_ns / 1e6:.4g} ms, taken off the framework's part first"
    scale = 1.0
    if work_ns > wall_ns:
        scale = wall_ns / work_ns
        method += f"; op times scaled by {scale:.3f} to the untraced wall"
    working = 1.0 - shares.get("overhead", 0.0)
    parts = {
        name: work_ns * scale * shares.get(name, 0.0) / working if working else 0.0 for name in ("compute-bound", "memory-bound", "other")
    }
    parts["launch gaps"] = gaps_ns
    details = {"launch gaps": "python and framework"}
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
    values = {**parts, "unaccounted": left}
    return Waterfall(
        wall_ms=wall_ms,
        parts=tuple(WaterfallPart(name=n, ms=values.get(n, 0.0), detail=details.get(n, "")) for n in PARTS),
        unaccounted_ms=left,
        method=method,
    )
