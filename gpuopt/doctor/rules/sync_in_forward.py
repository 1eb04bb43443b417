"""GPU104: forward asks the GPU for a value, and the host waits until everything before it is done."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.core.trace import Trace
from gpuopt.doctor import modules, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.places import Place, spread
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

READS = frozenset(
    {
        "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select",
        "aten::equal", "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount",
        "aten::allclose",
    }
)  # fmt: skip
"""Ops whose result, or its shape, depends on values in the GPU's memory: the host must read them."""
SMALL_BYTES = 1024
"""A copy to the host of no more than this reads a value; a larger one moves data, which is GPU106's."""


def read_of(trace: Trace, op: int | None) -> str | None:
    """The outermost op around it that reads a value: `.item()` is aten::item, not what runs inside it."""
    names = [name for name in timeline.op_path(trace, op) if name in READS]
    return names[-1] if names else None


def find(evidence: Evidence) -> Iterator[Finding]:
    """A finding for each module and op: priced as the device's idle time right after each wait, up to the next kernel."""
    trace = evidence.trace
    assert trace is not None
    if not trace.on_device:
        return
    steps, stretch = timeline.num_steps(trace), timeline.wait_stretch(evidence)
    sizes: dict[int | None, int] = {c.correlation: c.bytes for c in trace.copies if c.kind == "d2h" and c.correlation is not None}
    idle: dict[tuple[str | None, str], list[float]] = {}
    for call, idle_ns in timeline.waits(trace):
        if call.op is None:
            continue
        reader = read_of(trace, call.op)
        if reader is None and sizes.get(call.correlation, SMALL_BYTES + 1) > SMALL_BYTES:
            continue
        idle.setdefault((timeline.module_of(trace, call.op), reader or trace.ops[call.op].name), []).append(idle_ns)
    # One read of a value makes two calls, the copy and the wait: what ops there were is the count.
    counts: dict[tuple[str | None, str], int] = {}
    for op in trace.ops:
        if op.step is not None and op.name in READS and read_of(trace, op.parent) is None:
            counts[op.module, op.name] = counts.get((op.module, op.name), 0) + 1
    read_ns: dict[tuple[str | None, str], int] = {}
    for copy in trace.copies:
        if copy.kind == "d2h" and copy.step is not None and (reader := read_of(trace, copy.op)) is not None:
            key = (timeline.module_of(trace, copy.op), reader)
            read_ns[key] = read_ns.get(key, 0) + copy.dur_ns
    places = []
    for key, waited in idle.items():
        time_ms = (sum(waited) * stretch + read_ns.get(key, 0)) / steps / 1e6
        places.append(Place(module=key[0], op=key[1], count=counts.get(key, len(waited)) / steps, time_ms=time_ms, saved_ms=time_ms))

    def say(place: Place) -> Finding:
        finding = Finding(
            code="",
            severity="info",
            message=f"{place.op.removeprefix('aten::')} waits for the GPU {words.times(place.count)} a call{place.where}: the GPU then idles {words.ms(place.time_ms)}",
            fix="keep the value on the GPU (torch.where, a mask, a fixed shape), or take what is known on the host; torch.cuda.set_sync_debug_mode('warn') prints the line",
            module=None if place.module == "?" else place.module,
            line=modules.line(evidence.module, place.module) if evidence.module is not None and place.module not in (None, "?") else None,
            op=place.op,
            count=max(1, round(place.count)),
            time_ms=place.time_ms or None,
        )
        return priced(finding, place.saved_ms, low=0.6, high=1.1, wall_ms=evidence.wall_ms)

    yield from spread(places, say)


RULE = Rule(
    code="GPU104",
    name="sync-in-forward",
    what="An op inside forward needs a value from the GPU before the host can go on.",
    why="The host waits until all work before it is done and launches the next kernel only then: the GPU idles meanwhile, and the call cannot become a CUDA graph.",
    before="if mask.any():\n    x = x[mask]",
    after="x = torch.where(mask, x, 0)",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="idle times of the trace, scaled to the untraced wall time",
)
