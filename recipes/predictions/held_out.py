"""Pairs on other models than the rules were tried on: ViT, GPT-2 and ResNet-50. Those in `HELD_OUT` were never measured while a rule's price was being worked on, so they say how far prices carry: a pair
whose miss leads to a better price moves to `SEEN`.

The models are built from transformers' configurations with random weights; `small` builds tiny siblings of the same classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from gpuopt.core.spec import Precision
from recipes.predictions import modules
from recipes.predictions.pairs import FP32, HALF, NHWC, Defect, Side, tf32


@cache
def _vit(small: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32} if small else {}
    )
    return ViTModel(ViTConfig(**sizes)).eval().to(dtype)


@cache
def _gpt2(small: bool, dtype: torch.dtype, activation: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 99}
        if small
        else {"n_embd": 1024, "n_layer": 12, "n_head": 16}
    )
    config = GPT2Config(**sizes, activation_function=activation, use_cache=False)
    made = GPT2Model._from_config(config, attn_implementation=attention)
    return made.eval().to(dtype)


@cache
def _resnet50(small: bool, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]} if small else {}
    return ResNetModel(ResNetConfig(**sizes)).eval().to(dtype)


def vit(small: bool, dtype: torch.dtype = HALF) -> Any:
    """ViT-base/16: a copy."""
    return copy.deepcopy(_vit(small, dtype))


def gpt2(small: bool, dtype: torch.dtype = HALF, *, activation: str = "gelu_pytorch_tanh", attention: str = "sdpa") -> Any:
    """GPT-2 of 12 layers, 1024 wide: a copy."""
    return copy.deepcopy(_gpt2(small, dtype, activation, attention))


def images(small: bool, batch: int) -> dict[str, torch.Tensor]:
    """Random images [batch, 3, 224, 224] in fp32; [2, 3, 32, 32] for the tiny models."""
    shape = (2, 3, 32, 32) if small else (batch, 3, 224, 224)
    return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(4))}


def words(small: bool, batch: int, width: int) -> dict[str, torch.Tensor]:
    """Random tokens [batch, width]; [2, 32] for the tiny model."""
    shape, size = ((2, 32), 99) if small else ((batch, width), 50257)
    return {"input_ids": torch.randint(0, size, shape, generator=torch.Generator().manual_seed(5))}


def looks(batch: int, dtype: torch.dtype = HALF, **how: Any) -> Callable[[bool], Side]:
    """ViT as it is."""
    return lambda small: Side(module=vit(small, dtype), inputs=images(small, batch), **how)


def reads(
    batch: int, width: int, dtype: torch.dtype = HALF, *, activation: str = "gelu_pytorch_tanh", attention: str = "sdpa", **how: Any
) -> Callable[[bool], Side]:
    """GPT-2 as it is."""
    return lambda small: Side(
        module=gpt2(small, dtype, activation=activation, attention=attention), inputs=words(small, batch, width), **how
    )


def convolves(batch: int, dtype: torch.dtype = HALF, **how: Any) -> Callable[[bool], Side]:
    """ResNet-50 as it is."""
    return lambda small: Side(module=_resnet50(small, dtype), inputs=images(small, batch), **how)


def wrapped(wrap: Callable[[nn.Module], nn.Module], batch: int, *, every: int = 1) -> Callable[[bool], Side]:
    """ViT in fp16 with each `every`th layer put into `wrap`."""

    def make(small: bool) -> Side:
        model = vit(small)
        layers = _layers(model)
        for i in range(0, len(layers), every):
            layers[i] = wrap(layers[i])
        return Side(module=model, inputs=images(small, batch))

    return make


def _layers(model: Any) -> nn.ModuleList:
    """Its blocks, wherever this version of transformers keeps them."""
    found = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    return found


def trips(small: bool, *, stays: bool) -> Side:
    """ResNet-50 whose stages hand their output over on the host."""
    model = copy.deepcopy(_resnet50(small, HALF))
    if not stays:
        stages = model.encoder.stages
        for i in range(len(stages) - 1):
            stages[i] = modules.RoundTrip(stages[i])
    return Side(module=model, inputs=images(small, 32), transforms=NHWC)


def scores(small: bool, *, aligned: bool) -> Side:
    """GPT-2 with a head over 50257 words, or over the next multiple of 8 and cut."""
    width, size = (32, 99) if small else (1024, 50257)
    head = modules.head(width, size, aligned=aligned)
    return Side(module=modules.Vocabulary(gpt2(small), head.half(), size), inputs=words(small, 8, 512))


def fed(small: bool, *, pinned: bool) -> Side:
    """ViT that brings 128 images from the host in every call."""
    batch = images(small, 128)["pixel_values"]
    return Side(module=modules.Fed(vit(small, FP32), batch, pinned=pinned), inputs={"x": batch[:1]}, precision=tf32(small))


def autocast(small: bool) -> Side:
    """ViT with fp32 weights under bf16 autocast."""
    return Side(module=modules.Autocast(vit(small, FP32)), inputs={"x": images(small, 64)["pixel_values"]})


def from_host(small: bool) -> Side:
    """ViT whose layers' weights stay on the host."""
    return wrapped(modules.FromHost, 32)(small)


HELD_OUT = (
    Defect(
        name="vit-no-tf32", code="GPU202", what="ViT-base fp32, batch 64, TF32 off", change="TF32 on",
        bad=looks(64, FP32), fixed=looks(64, FP32, precision=Precision.TF32),
    ),
    Defect(
        name="gpt2-no-half", code="GPU203", what="GPT-2 (12 layers, 1024 wide) TF32, 8 x 1024", change="fp16",
        bad=reads(8, 1024, FP32, precision=Precision.TF32), fixed=reads(8, 1024, FP32, precision=Precision.FP16),
    ),
    Defect(
        name="resnet50-nchw", code="GPU303", what="ResNet-50 fp16 in NCHW, batch 96", change="channels_last",
        bad=convolves(96), fixed=convolves(96, transforms=NHWC),
    ),
    Defect(
        name="resnet50-batch-norm", code="GPU304", what="ResNet-50 fp16 channels_last, batch 96, eager, batch norms of their own", change="torch.compile with freezing",
        bad=convolves(96, transforms=NHWC), fixed=convolves(96, transforms=NHWC, backend="inductor:freezing"),
    ),
    Defect(
        name="gpt2-attention-by-hand", code="GPU305", what="GPT-2 fp16, 8 x 1024, attn_implementation='eager'", change="'sdpa'",
        bad=reads(8, 1024, attention="eager"), fixed=reads(8, 1024),
    ),
    Defect(
        name="vit-item", code="GPU104", what="ViT-base fp16, batch 64, .item() after each layer", change="the value stays on the GPU",
        bad=wrapped(modules.ReadsPeak, 64), fixed=wrapped(modules.KeepsPeak, 64),
    ),
    Defect(
        name="vit-sync", code="GPU105", what="ViT-base fp16, batch 64, torch.cuda.synchronize() after each layer", change="none",
        bad=wrapped(modules.Waits, 64), fixed=looks(64),
    ),
    Defect(
        name="resnet50-round-trip", code="GPU106", what="ResNet-50 fp16, batch 32, .cpu() and back between stages", change="stays on the GPU",
        bad=lambda small: trips(small, stays=False), fixed=lambda small: trips(small, stays=True),
    ),
    Defect(
        name="vit-weights-per-call", code="GPU108", what="ViT-base fp16, batch 32, each layer's weights copied in each call", change="weights stay on the GPU",
        bad=from_host, fixed=looks(32),
    ),
    Defect(
        name="vit-pageable", code="GPU101", what="ViT-base TF32, 128 images from pageable memory in each call", change="from pinned memory",
        bad=lambda small: fed(small, pinned=False), fixed=lambda small: fed(small, pinned=True),
    ),
    Defect(
        name="gpt2-odd-vocabulary", code="GPU401", what="GPT-2 fp16, 8 x 512, head of 50257 words", change="50264, cut",
        bad=lambda small: scores(small, aligned=False), fixed=lambda small: scores(small, aligned=True),
    ),
    Defect(
        name="gpt2-gelu-by-hand", code="GPU408", what="GPT-2 fp16, 8 x 1024, transformers' gelu_new in eight passes", change="torch.compile",
        bad=reads(8, 1024, activation="gelu_new"), fixed=reads(8, 1024, activation="gelu_new", backend="inductor"),
    ),
    Defect(
        name="vit-contiguous", code="GPU111", what="ViT-base fp16, batch 64, transposed, made contiguous and back after each layer", change="left as it lies",
        bad=wrapped(modules.Contiguous, 64), fixed=looks(64),
    ),
)  # fmt: skip
"""In the order they are measured."""

SEEN = (
    Defect(
        name="resnet50-launch-bound", code="GPU404", what="ResNet-50 fp16 channels_last, batch 1, eager", change="CUDA graph",
        bad=convolves(1, transforms=NHWC), fixed=convolves(1, transforms=NHWC, backend="cudagraphs"),
    ),
    Defect(
        name="vit-autocast", code="GPU205", what="ViT-base, fp32 weights under bf16 autocast, batch 64", change="bf16 weights",
        bad=autocast, fixed=looks(64, FP32, precision=Precision.BF16),
    ),
)  # fmt: skip
"""Held out in the first run; their misses led to better prices since, so that they are no more."""
