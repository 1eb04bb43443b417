"""GPU304: batch norms that could be part of the convolution before them."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import kernels
from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import BackendSpec, Change
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

FUSED_REACHED = 0.9
"""Share of the copy bandwidth one pass over an activation reaches: `aten.relu` of ResNet-101 (recipes/profile/resnet101-h200.json)."""
_FOLDS_ITSELF = ("ort", "trt", "torch-trt")
"""Backends whose own graph passes fold."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all pairs, priced as the time the batch norms take; on a GPU as what one fused pass saves of them and of the activations behind them."""
    if "fold_batch_norm" in evidence.transforms or evidence.backend in _FOLDS_ITSELF or "freezing" in (evidence.preset or ""):
        return
    pairs = modules.norm_pairs(evidence.module)
    parts = modules.parts(evidence.module)
    counted = {r.module: r for r in (evidence.count.records if evidence.count else evidence.records) if "batch_norm" in r.op}
    pairs = [(layer, norm) for layer, norm in pairs if not modules.is_a(parts[layer], "Linear") or _is_flat(counted.get(norm))]
    if not pairs:
        return
    norms = {norm for _, norm in pairs}
    rows = [r for r in evidence.records if r.module in norms and r.time_ns]
    taken = recast.total_ms(rows)
    # Folding gives the convolution a bias. On a CPU, oneDNN adds it inside the convolution; on a GPU, eager PyTorch adds it in a pass that takes longer than the batch norm took,
    # and only a compiler makes one pass of it and what follows.
    is_passed_on = evidence.on_gpu and any(parts[at].bias is None and not modules.is_a(parts[at], "Linear") for at, _ in pairs)
    compiled = is_passed_on and evidence.backend in modules.EAGER
    followers = _followers(evidence, rows) if is_passed_on else []
    layer, norm = pairs[0]
    finding = Finding(
        code="",
        # A compiler fuses the batch norm into the pass over the activation that follows anyway.
        severity="warning" if evidence.backend in modules.EAGER else "info",
        message=f"{words.number(len(pairs), 'batch norm follows a layer', 'batch norms follow layers')} that could hold {'its' if len(pairs) == 1 else 'their'} scale and shift ({layer} -> {norm}{', …' if len(pairs) > 1 else ''})"
        + (f": {words.ms(taken)}" if rows else ""),
        fix="torch.compile with freezing (--backend inductor:freezing) folds them and makes one pass of what follows; folded by hand, eager adds each bias in a pass of its own"
        if is_passed_on
        else "torch.nn.utils.fusion.fuse_conv_bn_eval on each pair, --fold-bn, or torch.compile with freezing",
        module=norm,
        line=modules.line(evidence.module, norm),
        op=rows[0].op if rows else None,
        count=len(pairs),
        time_ms=taken + recast.total_ms(followers) if rows else None,
        change=Change(backend=BackendSpec(name="inductor", preset="freezing"))
        if compiled
        else None
        if is_passed_on
        else Change(fold_batch_norm=True),
    )
    if is_passed_on:
        yield priced(finding, recast.shown_ms(evidence, _fused_ms(evidence, rows, followers)), low=0.7, high=1.25, wall_ms=evidence.wall_ms)
        return
    yield priced(finding, recast.shown_ms(evidence, taken), wall_ms=evidence.wall_ms)


def _followers(evidence: Evidence, rows: list[OpRecord]) -> list[OpRecord]:
    """Element-wise ops over tensors of the batch norms' shapes: activations and residual sums, which a compiler makes one pass with the scale and shift."""
    shapes = {r.shapes.split(", ")[0] for r in rows}
    return [
        r for r in evidence.records
        if r.time_ns and r.kernels and r not in rows and r.shapes.split(", ")[0] in shapes and {kernels.kind(k) for k in r.kernels} <= {"pointwise", "cast"}
    ]  # fmt: skip


def _fused_ms(evidence: Evidence, rows: list[OpRecord], followers: list[OpRecord]) -> float:
    """What they take, less one pass over each batch norm's tensor and one more read for each second operand."""
    if evidence.device is None or not rows:
        return 0.0
    ceilings, left = evidence.device.ceilings, 0.0
    for record in rows:
        left += min(record.time_ns or 0.0, (recast.floor_ns(record, ceilings, record.dtype) or record.time_ns or 0.0) / FUSED_REACHED)
    for record in followers:
        operands = [s for s in record.shapes.split(", ") if s == record.shapes.split(", ")[0]]
        extra = (len(operands) - 1) / (len(operands) + 1)  # of what it reads and writes now
        left += (recast.floor_ns(record, ceilings, record.dtype) or 0.0) * extra / FUSED_REACHED
    return recast.total_ms([*rows, *followers]) - left / 1e6


def _is_flat(record: OpRecord | None) -> bool:
    """A batch norm over [N, C]: behind a linear layer's [N, L, C] it would normalise another dimension than the one that is folded."""
    return record is not None and record.shapes.split(",")[0].count("x") == 1


RULE = Rule(
    code="GPU304",
    name="batch-norm-unfolded",
    what="A batch norm in eval mode follows a convolution or linear layer that could hold it.",
    why="In eval mode it is a fixed scale and shift a channel: as part of the weights it costs nothing, as an op of its own it reads and writes the whole activation.",
    before="x = self.bn(self.conv(x))",
    after="conv = torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn)\nx = self.conv(x)",
    safe=True,
    needs=frozenset({"module"}),
    find=find,
    source="torch.nn.utils.fusion.fuse_conv_bn_weights; time of the batch norms, on a GPU that of the passes a compiler makes one of",
    has_change=True,
)
