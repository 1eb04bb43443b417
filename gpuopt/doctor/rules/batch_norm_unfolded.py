"""GPU304: batch norms that could be part of the convolution before them."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import Change
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

PASS_SHARE = 0.95
"""Share of the copy bandwidth an in-place add over large tensors reaches: `aten.add_` of ResNet-101 (recipes/profile/resnet101-h200.json)."""
_FOLDS_ITSELF = ("ort", "trt", "torch-trt")
"""Backends whose own graph passes fold."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all pairs, priced as the time the batch norms take."""
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
    layer, norm = pairs[0]
    finding = Finding(
        code="",
        # A compiler fuses the batch norm into the pass over the activation that follows anyway.
        severity="warning" if evidence.backend in modules.EAGER else "info",
        message=f"{words.number(len(pairs), 'batch norm follows a layer', 'batch norms follow layers')} that could hold {'its' if len(pairs) == 1 else 'their'} scale and shift ({layer} -> {norm}{', …' if len(pairs) > 1 else ''})"
        + (f": {words.ms(taken)}" if rows else ""),
        fix="torch.nn.utils.fusion.fuse_conv_bn_eval on each pair, --fold-bn, or torch.compile with freezing",
        module=norm,
        line=modules.line(evidence.module, norm),
        op=rows[0].op if rows else None,
        count=len(pairs),
        time_ms=taken if rows else None,
        change=Change(fold_batch_norm=True),
    )
    # Folding gives the convolution a bias, and eager PyTorch on a GPU adds it in a pass of its own; on a CPU, oneDNN adds it inside the convolution.
    new_bias = {norm for layer, norm in pairs if evidence.on_gpu and parts[layer].bias is None and not modules.is_a(parts[layer], "Linear")}
    left = sum(_pass_ms(evidence, r) for r in rows if r.module in new_bias)
    yield priced(finding, recast.shown_ms(evidence, taken - left), wall_ms=evidence.wall_ms)


def _pass_ms(evidence: Evidence, record: OpRecord) -> float:
    """Reading and writing what this batch norm reads and writes, near the memory's ceiling; all of its time where no ceiling is known."""
    floor = recast.floor_ns(record, evidence.device.ceilings, record.dtype) if evidence.device is not None else None
    taken = record.time_ns or 0.0
    return min(taken, floor / PASS_SHARE if floor else taken) / 1e6


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
    source="torch.nn.utils.fusion.fuse_conv_bn_weights; time of the batch norms, on a GPU less that of the biases they leave",
    has_change=True,
)
