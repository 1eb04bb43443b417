"""`gpuopt::matvecs`: products of one row with several matrices in one launch; on a GPU a Triton kernel.

For decoding one sequence, whose time is that of reading weights. Matrices that multiply the same row (query, key and value; gate and up) are one launch, so that the small ones need not
fill the device alone. The sum is in fp32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

HALVES = (torch.float16, torch.bfloat16)
MOST = 3
"""Matrices a launch."""
_ALIGNED = 16
"""Bytes that a thread reads at once."""

torch.library.define("gpuopt::matvecs", "(Tensor input, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def matvecs(input: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """input · weightᵀ of each, [..., N]; input [..., K] of one row, weights [N, K], 1 to MOST of them."""
    result: list[Tensor] = torch.ops.gpuopt.matvecs(input, list(weights))
    return result


def takes(input: Tensor, weight: Tensor) -> bool:
    """Is this a product the kernel is made for: one row of halves on a GPU, element after element, and a matrix whose rows lie one after the other, each at a whole number of 16 bytes?"""
    return (
        input.device.type == "cuda"
        and input.dtype in HALVES
        and weight.dtype == input.dtype
        and weight.device == input.device
        and weight.dim() == 2
        and weight.is_contiguous()
        and input.shape[-1] == weight.shape[1]
        and input.numel() == input.shape[-1]
        and (input.stride(-1) == 1 or input.numel() == 1)
        and weight.shape[1] * weight.element_size() % _ALIGNED == 0
    )


def composite(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The definition, in ATen's own ops: what a CPU runs, and a GPU for what the kernel does not take."""
    return [F.linear(input, weight) for weight in weights]


def _on_cuda(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    is_aligned = all(t.data_ptr() % _ALIGNED == 0 for t in (input, *weights))
    if not (1 <= len(weights) <= MOST and is_aligned and all(takes(input, weight) for weight in weights)):
        return composite(input, weights)
    from gpuopt.programs.ops import matvec_triton  # Triton comes with torch for GPUs alone

    return matvec_triton.run(input, weights)


def _fake(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [input.new_empty((*input.shape[:-1], weight.shape[0])) for weight in weights]


torch.library.impl("gpuopt::matvecs", "CPU", composite)
torch.library.impl("gpuopt::matvecs", "CUDA", _on_cuda)
torch.library.register_fake("gpuopt::matvecs", _fake)
