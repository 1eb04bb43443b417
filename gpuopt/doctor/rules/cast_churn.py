"""GPU205: the same tensors are cast to another dtype in every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gpuopt.core import kernels
from gpuopt.core.result import Finding
from gpuopt.core.spec import DTYPE_BYTES, Change, Precision
from gpuopt.core.trace import CpuOp, Kernel, Trace
from gpuopt.doctor import modules, recast, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

CASTS = frozenset(
    {"aten::to", "aten::_to_copy", "aten::type_as", "aten::half", "aten::bfloat16", "aten::float", "aten::_autocast_to_reduced_precision"}
)
MIN_SHARE = 0.03
"""Of the call: a few casts around a norm kept in fp32 are meant."""
PASSES = frozenset({"pointwise", "norm", "softmax", "reduction", "batch norm", "pool"})
MAX_GAP_MS = 0.003
"""Between kernels that are queued already: a longer gap is the host's, which has a rule of its own."""
MIN_WEIGHTS = 4
"""So many casts of tensors with parameters' shapes: one may be an activation that happens to have such a shape."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for weights cast again, one for the other casts: priced at their kernels' time, and no more than the host lets show."""
    trace = evidence.trace
    assert trace is not None
    steps = timeline.num_steps(trace)
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    shapes = (
        {tuple(h.tensor.shape) for h in modules.tensors(evidence.module) if h.kind == "parameter" and h.tensor.dim() >= 2}
        if evidence.module is not None
        else set()
    )
    weights: list[Kernel] = []
    others: list[Kernel] = []
    for kernel in trace.kernels:
        if kernel.step is None or kernels.kind(kernel.name) != "cast":
            continue
        cast = _cast(trace, kernel.op)
        is_weight = cast is not None and bool(cast.shapes) and (cast.shapes[0] in shapes or cast.shapes[0][::-1] in shapes)
        (weights if is_weight else others).append(kernel)
    if len(weights) < MIN_WEIGHTS * steps:
        weights, others = [], weights + others
    # Weights cast once is a model in that dtype: the casts between its layers go with them, and the passes autocast keeps in fp32 read and write half as much.
    groups = ((weights + others, True),) if weights else ((others, False),)
    usual_ms = timeline.usual_gap_ns(trace) / 1e6
    for group, is_weight in groups:
        time_ms = sum(k.dur_ns for k in group) / steps / 1e6
        if not group or not time_ms or time_ms < MIN_SHARE * span_ms:
            continue
        target = _target(group)
        share = words.share(time_ms / span_ms)
        saved_ms = time_ms + len(group) / steps * min(usual_ms, MAX_GAP_MS)
        if is_weight and target is not None:
            saved_ms += saved_in_passes(evidence, target)
        where = list(dict.fromkeys(m for k in group if (m := timeline.module_of(trace, k.op))))
        finding = Finding(
            code="",
            severity="info",
            message=f"{words.digits(len(weights) / steps) + ' weights among ' if is_weight else ''}{words.number(len(group) / steps, 'tensor')} a call are cast{f' to {target.dtype}' if target else ''}: {words.ms(time_ms)}, {share} of the call"
            + (f", in {words.listed(where)}" if where else ""),
            fix=f"cast the model once instead of autocast: model.{'bfloat16' if target == Precision.BF16 else 'half'}(), floating inputs likewise"
            if is_weight
            else "keep one dtype from layer to layer: make the inputs, masks and buffers in the dtype of the weights, and torch.compile what must change",
            module=where[0] if len(where) == 1 else None,
            op="aten::_to_copy",
            count=max(1, round(len(group) / steps)),
            time_ms=time_ms,
            change=Change(precision=target) if is_weight and target is not None and evidence.precision is None else None,
        )
        if is_weight:
            finding = replace(finding, time_ms=max(time_ms, saved_ms))
            yield priced(finding, recast.shown_ms(evidence, saved_ms, gone=len(group) / steps), low=0.8, wall_ms=evidence.wall_ms)
        else:
            yield priced(finding, recast.shown_ms(evidence, saved_ms, gone=len(group) / steps), low=0.5, high=1.0, wall_ms=evidence.wall_ms)


def saved_in_passes(evidence: Evidence, target: Precision) -> float:
    """Milliseconds the fp32 passes that are no casts would take less at the width of `target`, their bytes being what they wait for."""
    rows = [
        r for r in evidence.records
        if r.dtype == "float32" and r.time_ns and not r.flops and r.kernels and {kernels.kind(k) for k in r.kernels} <= PASSES
    ]  # fmt: skip
    return recast.total_ms(rows) * (1 - DTYPE_BYTES[target.dtype] / DTYPE_BYTES["float32"])


def _cast(trace: Trace, op: int | None) -> CpuOp | None:
    """The innermost conversion with shapes around it."""
    return next((o for o in trace.chain(op) if o.name in CASTS and o.shapes), None)


def _target(group: list[Kernel]) -> Precision | None:
    """What most of the casts turn into, by time, among those whose kernel's name says it."""
    times = {Precision.BF16: 0, Precision.FP16: 0}
    for kernel in group:
        if "bfloat16_copy" in kernel.name:
            times[Precision.BF16] += kernel.dur_ns
        elif "float16_copy" in kernel.name:
            times[Precision.FP16] += kernel.dur_ns
    target = max(times, key=lambda precision: times[precision])
    return target if times[target] else None


RULE = Rule(
    code="GPU205",
    name="cast-churn",
    what="Tensors, often the weights under autocast, are converted to another dtype in every call.",
    why="A cast reads and writes the whole tensor and is a launch of its own; weights cast once need none of it.",
    before="with torch.autocast('cuda'):\n    y = model(x)",
    after="model = model.half()\ny = model(x.half())",
    safe=False,
    needs=frozenset({"trace"}),
    find=find,
    source="kernel times in the trace",
    has_change=True,
)
