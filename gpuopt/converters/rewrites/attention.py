"""A transformers model + the name of a kernel -> the same model whose attention runs in that kernel and in no other.

Left alone, `scaled_dot_product_attention` chooses by what it is given, and a mask, a head width or a dtype can move it to a kernel several times slower without a word.
flash and cudnn exist in fp16 and bf16 alone on a GPU: the fp32 stage of verification leaves them to torch's own choice.
"""

from __future__ import annotations

from torch import nn

from gpuopt.converters.rewrites import implementations
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs

WHAT = "run attention in one kernel and no other: flash, cudnn, efficient or math"
APPROXIMATE = False
SETTINGS = implementations.KERNELS
NEEDS_SETTING = True
HALF_ONLY = ("flash", "cudnn")
"""Settings that a GPU has no fp32 form of."""

GPU_ONLY = ("cudnn", "efficient")
"""Settings that a CPU has no kernel for."""


def applies(module: nn.Module) -> str | None:
    """None for a transformers model whose attention is sdpa. A module that calls F.scaled_dot_product_attention itself has no place where a choice would stay in a graph."""
    return implementations.why_not(module)


def apply(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
    """Name the kernel in every configuration below `module`. Whether it can run them shows in the first call, which raises Unsupported where it cannot."""
    assert setting is not None
    changed = implementations.set_kernel(module, setting)
    if not changed:
        raise Unsupported(f"attention:{setting} has nothing to change", fix="leave it out")
    return f"attention runs in the {setting} kernel"
