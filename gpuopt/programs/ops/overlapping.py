"""A launch of a Triton kernel of ours -> one that may begin while the kernel before it ends (programmatic dependent launch, from compute capability 9.0).

A kernel with `IS_DEPENDENT` asks for weights alone before `gdc_wait`, and lets the next one begin directly after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(tensor: Tensor) -> dict[str, Any]:
    """Arguments of a launch on the device of `tensor`: the kernel's `IS_DEPENDENT`, and Triton's own."""
    is_dependent = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9
    return {"IS_DEPENDENT": is_dependent, **({"launch_pdl": True} if is_dependent else {})}
