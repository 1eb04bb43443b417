"""GPU303: half-precision convolutions in NCHW."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import Change
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

WORTH = 0.02
"""Share of the device time in such convolutions below which their layout does not matter."""
NORM_REACHED = 0.5
"""Share of the copy bandwidth a batch norm over NHWC tensors reaches, its small kernels for the scale among them: `aten.batch_norm` of recipes/profile/resnet101-h200.json."""
_LAYOUT_KERNELS = ("nchwtonhwc", "nhwctonchw", "nchwaddpadding")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all 4-D and 5-D half-precision convolution weights that are laid out NCHW, on a GPU, where the module's own ops run."""
    if not evidence.on_gpu or evidence.backend not in modules.EAGER or "channels_last" in evidence.transforms:
        return
    layers = {name: part for name, part in modules.parts(evidence.module).items() if _is_nchw_half(evidence, part)}
    if not layers:
        return
    rows = [r for r in evidence.records if r.module in layers and recast.is_convolution(r) and r.time_ns]
    if _is_minor(evidence, rows, len(layers)):
        return
    # The activations between them are NCHW too: 1x1 convolutions, whose weights lie both ways, and batch norms run on them.
    halves = [r for r in evidence.records if r.dtype in modules.HALVES and r.time_ns]
    rows = [r for r in halves if recast.is_convolution(r)]
    norms = [r for r in halves if "batch_norm" in r.op]
    layout_ms = sum(_layout_ns(r) for r in rows) / 1e6
    dtype = modules.running(evidence, modules.dtype(next(iter(layers.values())).weight))
    seen = f"; {words.ms(recast.total_ms(rows))} in them" if rows else ""
    moved = f", {words.ms(layout_ms)} of it layout changes" if layout_ms else ""
    worst = max(rows, key=lambda r: r.time_ns or 0.0).module if rows else next(iter(layers))
    finding = Finding(
        code="",
        severity="warning",
        message=f"{words.number(len(layers), f'{dtype} convolution')} with NCHW weights ({words.listed(layers)}): cuDNN's tensor-core kernels want NHWC{seen}{moved}",
        fix="model.to(memory_format=torch.channels_last), the input too; or --channels-last",
        module=worst,
        line=modules.line(evidence.module, worst),
        count=len(layers),
        time_ms=recast.total_ms([*rows, *norms]) if rows else None,
        change=Change(channels_last=True),
    )
    saved = _saved_ms(evidence, rows, recast.REACHED["convolution"]) + _saved_ms(evidence, norms, NORM_REACHED)
    yield priced(finding, recast.shown_ms(evidence, saved), wall_ms=evidence.wall_ms)


def _is_nchw_half(evidence: Evidence, part: Any) -> bool:
    """1x1 and depthwise weights are both layouts at once and say nothing."""
    if not modules.is_a(part, "Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d") or modules.is_lazy(part.weight):
        return False
    import torch

    weight = part.weight
    wanted = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    if modules.running(evidence, modules.dtype(weight)) not in modules.HALVES or weight.layout != torch.strided:
        return False
    return bool(weight.is_contiguous()) and not weight.is_contiguous(memory_format=wanted)


def _is_minor(evidence: Evidence, rows: list[OpRecord], count: int) -> bool:
    """By time; before anything was timed, a model with more linear layers than such convolutions (a vision transformer's one patch embedding)."""
    if evidence.records:
        return recast.total_ms(rows) < WORTH * recast.total_ms(evidence.records)
    return sum(modules.is_a(part, "Linear") for part in modules.parts(evidence.module).values()) > count


def _layout_ns(record: OpRecord) -> float:
    """Time of a record that is all layout change; of one that mixes them with the product's kernels, their share by number."""
    layout = [k for k in record.kernels if any(word in k.lower() for word in _LAYOUT_KERNELS)]
    return (record.time_ns or 0.0) * len(layout) / len(record.kernels) if record.kernels else 0.0


def _saved_ms(evidence: Evidence, rows: list[OpRecord], reached: float) -> float:
    """What lies above the share of the floor that NHWC kernels reach."""
    assert evidence.device is not None
    saved = 0.0
    for row in rows:
        floor = recast.floor_ns(row, evidence.device.ceilings, row.dtype)
        if floor:
            saved += max(0.0, (row.time_ns or 0.0) - max(floor / reached, recast.LAUNCH_NS * row.count))
    return saved / 1e6


RULE = Rule(
    code="GPU303",
    name="nchw-half-conv",
    what="Half-precision convolutions run on NCHW tensors.",
    why="Tensor cores want the channels of a pixel next to each other: on NCHW, cuDNN transposes every input and output, or takes a slower kernel.",
    before="model = resnet.half().cuda()",
    after="model = resnet.half().cuda().to(memory_format=torch.channels_last)\nx = x.to(memory_format=torch.channels_last)",
    safe=True,
    needs=frozenset({"module", "device"}),
    find=find,
    source="PyTorch channels-last tutorial; ResNet-101 fp16 batch 256 on an H200: 38.9 ms NCHW, 23.2 ms NHWC",
    has_change=True,
)
