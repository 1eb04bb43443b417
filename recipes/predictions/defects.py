"""The pairs: a real-sized model with one seeded defect, and the same model without it, each with the rule that is to find and to price it.

Both sides compute the same outputs, up to the rounding of their number formats: what they return is compared in every run. `small` builds the tiny siblings of the same
classes, for a rehearsal without a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from gpuopt import models
from gpuopt.core.spec import Precision
from recipes.predictions import modules
from recipes.predictions.held_out import HELD_OUT, SEEN
from recipes.predictions.pairs import FP32, HALF, NHWC, Defect, Side, tf32

# -- models ---------------------------------------------------------------------------------------------------------------------------


@cache
def _bert(small: bool, dtype: torch.dtype) -> nn.Module:
    made: nn.Module = (models.bert_large_tiny if small else models.bert_large)()
    return made.to(dtype)


@cache
def _resnet(small: bool, dtype: torch.dtype) -> nn.Module:
    made: nn.Module = (models.resnet101_tiny if small else models.resnet101)()
    return made.to(dtype)


def bert(small: bool, dtype: torch.dtype = HALF, *, layers: int | None = None) -> Any:
    """BERT-large, or its first `layers` layers at full width: a copy, to be changed."""
    made: Any = copy.deepcopy(_bert(small, dtype))
    made.encoder.layer = made.encoder.layer[:layers]
    return made


def resnet(small: bool, dtype: torch.dtype = HALF) -> Any:
    """ResNet-101: a copy."""
    return copy.deepcopy(_resnet(small, dtype))


def ids(small: bool, batch: int, width: int) -> dict[str, torch.Tensor]:
    """Random tokens [batch, width]; [2, 32] for the tiny model."""
    shape, words = ((2, min(width, 32)), 99) if small else ((batch, width), 30522)
    return {"input_ids": torch.randint(0, words, shape, generator=torch.Generator().manual_seed(1))}


def images(small: bool, batch: int) -> torch.Tensor:
    """Random images [batch, 3, 224, 224] in fp32; [2, 3, 32, 32] for the tiny model."""
    return torch.randn(*((2, 3, 32, 32) if small else (batch, 3, 224, 224)), generator=torch.Generator().manual_seed(1))


def wrapped(
    small: bool, wrap: Callable[[nn.Module], nn.Module] | None, batch: int, width: int, *, every: int = 1, layers: int | None = None
) -> Side:
    """BERT in fp16 with each `every`th layer put into `wrap`; as it is for None."""
    model = bert(small, layers=layers)
    for i in range(0, len(model.encoder.layer), every):
        if wrap is not None:
            model.encoder.layer[i] = wrap(model.encoder.layer[i])
    return Side(module=model, inputs=ids(small, batch, width))


def texts(batch: int, width: int, dtype: torch.dtype = HALF, *, layers: int | None = None, **how: Any) -> Callable[[bool], Side]:
    """BERT as it is."""
    return lambda small: Side(module=bert(small, dtype, layers=layers), inputs=ids(small, batch, width), **how)


def pictures(batch: int, dtype: torch.dtype = HALF, **how: Any) -> Callable[[bool], Side]:
    """ResNet as it is."""
    return lambda small: Side(module=resnet(small, dtype), inputs={"pixel_values": images(small, batch)}, **how)


# -- sides that are more than a wrapper -----------------------------------------------------------------------------------------------


def standardised(dtype: torch.dtype) -> Callable[[bool], Side]:
    return lambda small: Side(module=modules.Standardised(bert(small, layers=6), dtype), inputs=ids(small, 32, 512))


def by_hand(small: bool) -> Side:
    model = bert(small)
    model.set_attn_implementation("eager")
    return Side(module=model, inputs=ids(small, 32, 512))


def weight_normed(small: bool) -> Side:
    model = bert(small)
    for part in list(model.encoder.modules()):
        if isinstance(part, nn.Linear):
            nn.utils.parametrizations.weight_norm(part)
    return Side(module=model.requires_grad_(False), inputs=ids(small, 32, 512))


def batches(small: bool, *, bucketed: bool) -> Side:
    """128 rows of 64 to 512 tokens, 44% padding where all are padded to 512; in four batches of 32, each padded to its own longest, a tenth is left."""
    rows, step = (2, 8) if small else (32, 128)
    draw = torch.Generator().manual_seed(2)
    found = ids(small, 4 * rows, 4 * step)["input_ids"]
    if small:
        found = torch.randint(0, 99, (4 * rows, 4 * step), generator=draw)
    lengths = torch.cat([torch.randint(step * i + step // 2, step * (i + 1) + 1, (rows,), generator=draw) for i in range(4)])
    lengths[rows - 1 :: rows] = torch.arange(1, 5) * step
    mask = (torch.arange(4 * step) < lengths[:, None]).long()
    if not bucketed:
        return Side(module=modules.Padded(bert(small)), inputs={"input_ids": found, "attention_mask": mask})
    given = {}
    for i in range(4):
        part, width = slice(rows * i, rows * (i + 1)), step * (i + 1)
        given[f"ids{i}"], given[f"attention_mask_{i}"] = found[part, :width].contiguous(), mask[part, :width].contiguous()
    return Side(module=modules.Bucketed(bert(small)), inputs=given)


def vocabulary(small: bool, *, aligned: bool) -> Side:
    width, size = (32, 99) if small else (1024, 30522)
    head = modules.head(width, size, aligned=aligned)
    return Side(module=modules.Vocabulary(bert(small, layers=6), head.half(), size), inputs=ids(small, 32, 512))


def intermediate(small: bool, *, aligned: bool) -> Side:
    """The first two layers' inner width 2 more than it was; aligned, 8 more, and the weights between them zero."""
    model = bert(small, layers=6)
    for layer in model.encoder.layer[:2]:
        up, down = layer.intermediate.dense, layer.output.dense
        used, width = up.out_features + 2, up.out_features + (8 if aligned else 2)
        wider, narrower = modules.linear(up.in_features, width), modules.linear(width, down.out_features)
        with torch.no_grad():
            wider.weight[:used], narrower.weight[:, :used] = (
                modules.linear(up.in_features, used).weight,
                modules.linear(used, down.out_features).weight,
            )
            wider.weight[used:], narrower.weight[:, used:] = 0, 0
        layer.intermediate.dense, layer.output.dense = wider.half(), narrower.half()
    return Side(module=model, inputs=ids(small, 32, 512))


def fed(small: bool, *, pinned: bool) -> Side:
    batch = images(small, 64)
    return Side(module=modules.Fed(resnet(small, torch.float32), batch, pinned=pinned), inputs={"x": batch[:1]}, precision=tf32(small))


def copied_in(small: bool) -> Side:
    batch = images(small, 64)
    return Side(module=modules.Fed(resnet(small, torch.float32), batch, pinned=True), inputs={"x": batch}, precision=tf32(small))


def picked(small: bool, kind: type[nn.Module]) -> Side:
    """Eight linear layers over 32 x 512 rows, a quarter of which is padding."""
    width, rows = (32, 64) if small else (1024, 16384)
    keep = torch.rand((1, rows), generator=torch.Generator().manual_seed(3)) < 0.75
    layers = nn.Sequential(*(kind(modules.linear(width, width), keep) for _ in range(8)))
    return Side(module=layers.half(), inputs={"input": torch.randn(1, rows, width, generator=torch.Generator().manual_seed(1))})


def masked(small: bool) -> Side:
    given = ids(small, 32, 512)
    return Side(module=bert(small, layers=8), inputs={**given, "attention_mask": torch.ones_like(given["input_ids"])}, backend="inductor")


def graphed(backend: str) -> Callable[[bool], Side]:
    """With a mask: transformers makes one while a graph is captured, and attention then takes its math path."""

    def make(small: bool) -> Side:
        given = ids(small, 1, 128)
        return Side(module=bert(small, layers=12), inputs={**given, "attention_mask": torch.ones_like(given["input_ids"])}, backend=backend)

    return make


def wide(small: bool, *, cast: bool) -> Side:
    width, layers = (64, 4) if small else (8192, 4)
    made = modules.Wide(width, layers)
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    return Side(module=modules.Autocast(made), inputs={"x": x}) if cast else Side(module=made, inputs={"x": x}, precision=Precision.BF16)


def decoder(small: bool, *, grows: bool) -> Side:
    sizes = (
        {"batch": 2, "heads": 4, "width": 32, "cached": 64, "layers": 2, "steps": 3}
        if small
        else {"batch": 64, "heads": 16, "width": 1024, "cached": 2048, "layers": 2, "steps": 6}
    )
    made = modules.Decoder(**sizes, grows=grows).half()
    return Side(module=made, inputs={"x": torch.randn(sizes["batch"], 1, sizes["width"], generator=torch.Generator().manual_seed(1))})


def steps(small: bool, backend: str) -> Side:
    width, number = (32, 4) if small else (1024, 32)
    return Side(
        module=modules.Steps(width, number).half(),
        inputs={"x": torch.randn(1, width, generator=torch.Generator().manual_seed(1))},
        backend=backend,
    )


def gelu(small: bool, backend: str) -> Side:
    width, rows, blocks = (32, 64, 2) if small else (1024, 16384, 4)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    return Side(module=modules.HandGelu(width, 4 * width, blocks).half(), inputs={"x": x}, backend=backend)


TABLE = (
    Defect(
        name="bert-no-tf32", code="GPU202", what="BERT-large fp32, 32 x 128, TF32 off", change="TF32 on",
        bad=texts(32, 128, FP32), fixed=texts(32, 128, FP32, precision=Precision.TF32),
    ),
    Defect(
        name="resnet-no-half", code="GPU203", what="ResNet-101 fp32, batch 64, TF32 off", change="fp16",
        bad=pictures(64, FP32), fixed=pictures(64, FP32, precision=Precision.FP16),
    ),
    Defect(
        name="bert-no-half", code="GPU203", what="BERT-large TF32, 32 x 512", change="fp16",
        bad=texts(32, 512, FP32, precision=Precision.TF32), fixed=texts(32, 512, FP32, precision=Precision.FP16),
    ),
    Defect(
        name="resnet-nchw", code="GPU303", what="ResNet-101 fp16 in NCHW, batch 128", change="channels_last",
        bad=pictures(128), fixed=pictures(128, transforms=NHWC),
    ),
    Defect(
        name="resnet-batch-norm", code="GPU304", what="ResNet-101 fp16 channels_last, batch 128, eager, batch norms of their own", change="torch.compile with freezing",
        bad=pictures(128, transforms=NHWC), fixed=pictures(128, transforms=NHWC, backend="inductor:freezing"), on_cpu=True,
    ),
    Defect(
        name="bert-attention-by-hand", code="GPU305", what="BERT-large fp16, 32 x 512, attn_implementation='eager'", change="'sdpa'",
        bad=by_hand, fixed=texts(32, 512), on_cpu=True,
    ),
    Defect(
        name="bert-attention-in-math", code="GPU306", what="BERT-large's first 8 layers, fp16, 32 x 512, sdpa_kernel(MATH)", change="no sdpa_kernel",
        bad=lambda small: Side(module=modules.InMath(bert(small, layers=8)), inputs=ids(small, 32, 512)), fixed=texts(32, 512, layers=8),
    ),
    Defect(
        name="bert-padding", code="GPU313", what="BERT-large fp16, 128 rows padded to 512, 44% padding", change="four batches of 32, sorted by length",
        bad=lambda small: batches(small, bucketed=False), fixed=lambda small: batches(small, bucketed=True), on_cpu=True,
    ),
    Defect(
        name="bert-weight-norm", code="GPU309", what="BERT-large fp16, 32 x 512, weight_norm on 144 layers", change="parametrizations removed",
        bad=weight_normed, fixed=texts(32, 512), on_cpu=True,
    ),
    Defect(
        name="bert-launch-bound", code="GPU404", what="BERT-large fp16, 1 x 128, eager", change="CUDA graph",
        bad=texts(1, 128), fixed=texts(1, 128, backend="cudagraphs"),
    ),
    Defect(
        name="bert-item", code="GPU104", what="BERT-large fp16, 32 x 512, .item() after each layer", change="the value stays on the GPU",
        bad=lambda small: wrapped(small, modules.ReadsPeak, 32, 512), fixed=lambda small: wrapped(small, modules.KeepsPeak, 32, 512),
    ),
    Defect(
        name="bert-round-trip", code="GPU106", what="BERT-large fp16, 32 x 128, .cpu() and back after every fourth layer", change="stays on the GPU",
        bad=lambda small: wrapped(small, modules.RoundTrip, 32, 128, every=4), fixed=texts(32, 128),
    ),
    Defect(
        name="bert-weights-per-call", code="GPU108", what="BERT-large fp16, 32 x 128, each layer's weights copied in each call", change="weights stay on the GPU",
        bad=lambda small: wrapped(small, modules.FromHost, 32, 128), fixed=texts(32, 128),
    ),
    Defect(
        name="resnet-pageable", code="GPU101", what="ResNet-101 TF32, 64 images from pageable memory in each call", change="from pinned memory",
        bad=lambda small: fed(small, pinned=False), fixed=lambda small: fed(small, pinned=True),
    ),
    Defect(
        name="resnet-input-copied", code="GPU102", what="ResNet-101 TF32, 64 images from pinned memory in each call", change="images on the GPU already",
        bad=copied_in, fixed=lambda small: pictures(64, FP32, precision=tf32(small))(small),
    ),
    Defect(
        name="decoder-growing-cache", code="GPU109", what="6 tokens, 2 layers, batch 64, torch.cat onto 2048 cached positions", change="written in place",
        bad=lambda small: decoder(small, grows=True), fixed=lambda small: decoder(small, grows=False), on_cpu=True,
    ),
    Defect(
        name="linear-autocast", code="GPU205", what="four 8192-wide linear layers, fp32 weights under bf16 autocast, 64 rows", change="bf16 weights",
        bad=lambda small: wide(small, cast=True), fixed=lambda small: wide(small, cast=False),
    ),
    Defect(
        name="gelu-by-hand", code="GPU408", what="four 1024-4096-1024 MLPs fp16, 16384 rows, GELU in eight passes", change="torch.compile",
        bad=lambda small: gelu(small, "eager"), fixed=lambda small: gelu(small, "inductor"),
    ),
    Defect(
        name="bert-odd-vocabulary", code="GPU401", what="BERT-large's first 6 layers fp16, 32 x 512, head of 30522 words", change="30528, cut",
        bad=lambda small: vocabulary(small, aligned=False), fixed=lambda small: vocabulary(small, aligned=True),
    ),
    Defect(
        name="bert-odd-inner-width", code="GPU401", what="BERT-large's first 6 layers fp16, 32 x 512, two of them 4098 wide inside", change="4104",
        bad=lambda small: intermediate(small, aligned=False), fixed=lambda small: intermediate(small, aligned=True),
    ),
    Defect(
        name="bert-float64", code="GPU201", what="BERT-large's first 6 layers fp16, 32 x 512, outputs scaled by float64 constants", change="float32 constants",
        bad=standardised(torch.float64), fixed=standardised(torch.float32), on_cpu=True,
    ),
    Defect(
        name="linear-indices", code="GPU311", what="eight 1024-wide linear layers fp16, 16384 rows, rows picked and put by index after each", change="torch.where",
        bad=lambda small: picked(small, modules.Picked), fixed=lambda small: picked(small, modules.Selected),
    ),
    Defect(
        name="bert-contiguous", code="GPU111", what="BERT-large fp16, 32 x 512, transposed, made contiguous and back after each layer", change="left as it lies",
        bad=lambda small: wrapped(small, modules.Contiguous, 32, 512), fixed=texts(32, 512),
    ),
    Defect(
        name="bert-sync", code="GPU105", what="BERT-large fp16, 32 x 512, torch.cuda.synchronize() after each layer", change="none",
        bad=lambda small: wrapped(small, modules.Waits, 32, 512), fixed=texts(32, 512),
    ),
    Defect(
        name="steps-launch-bound", code="GPU404", what="32 steps of a 1024-wide MLP fp16, batch 1, eager", change="CUDA graph",
        bad=lambda small: steps(small, "eager"), fixed=lambda small: steps(small, "cudagraphs"),
    ),
    Defect(
        name="resnet-no-tf32", code="GPU202", what="ResNet-101 fp32, batch 64, TF32 off", change="TF32 on",
        bad=pictures(64, FP32), fixed=pictures(64, FP32, precision=Precision.TF32),
    ),
    Defect(
        name="bert-autocast", code="GPU205", what="BERT-large, fp32 weights under bf16 autocast, 64 x 128", change="bf16 weights",
        bad=lambda small: Side(module=modules.Autocast(bert(small, FP32)), inputs={"x": ids(small, 64, 128)["input_ids"]}),
        fixed=texts(64, 128, FP32, precision=Precision.BF16),
    ),
    Defect(
        name="bert-small-kernels", code="GPU403", what="BERT-large's first 12 layers fp16, 1 x 128, as a CUDA graph of eager kernels", change="torch.compile, reduce-overhead",
        bad=graphed("cudagraphs"), fixed=graphed("inductor:reduce-overhead"),
    ),
    Defect(
        name="bert-compiled-mask", code="GPU306", what="BERT-large's first 8 layers fp16, 32 x 512, compiled, no mask given", change="a mask of ones as an input",
        bad=texts(32, 512, layers=8, backend="inductor"), fixed=masked,
    ),
)  # fmt: skip
"""Different kinds first: a run that ends early has seen them."""

DEFECTS: Mapping[str, Defect] = {defect.name: defect for defect in (*HELD_OUT, *TABLE, *SEEN)}
"""All pairs by name, in the order they are measured: those held out first, so that a run that ends early has them."""
