"""nn.Module -> the same module with its convolution weights channels-last, in place."""

from __future__ import annotations

import torch
from torch import nn

from gpuopt.core.errors import Unsupported


def channels_last(module: nn.Module) -> str:
    """Lay 4-D weights out as NHWC and 5-D ones as NDHWC; activations follow from the first convolution on. Returns what was done.

    Raises Unsupported for a module without a convolution of two or three dimensions: it would change nothing, and a run must not claim that it did.
    """
    changed = 0
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() in (4, 5) and name == "weight":
                parameter.data = parameter.data.contiguous(
                    memory_format=torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                )
                changed += 1
    if not changed:
        raise Unsupported(
            "channels_last needs convolutions of two or three dimensions, this model has none", fix="leave --channels-last out"
        )
    return f"channels_last: {changed} weights"
