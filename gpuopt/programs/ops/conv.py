"""`gpuopt::conv_relu`: convolution + bias [+ residual] + ReLU in one call; on a GPU one cuDNN kernel that writes the output once.

The same sum as three ATen calls, which on a GPU read and write the output up to three times more. cuDNN adds in fp32 and rounds once, so it is no less exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CUDNN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INT32 = 2**31
"""cuDNN's fused convolutions index with 32 bits; plain ones are split by ATen, these are not."""

torch.library.define(
    "gpuopt::conv_relu",
    "(Tensor input, Tensor weight, Tensor bias, Tensor? residual, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def conv_relu(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """relu(conv2d(input, weight, bias) + residual) [N, Cout, H', W']; input [N, Cin, H, W], weight [Cout, Cin, kh, kw], bias [Cout], one group.

    In channels_last where the input or the weight is. `residual` broadcasts as in a sum; on a GPU one of the output's own shape and dtype is added by cuDNN.
    """
    result: Tensor = torch.ops.gpuopt.conv_relu(input, weight, bias, residual, stride, padding, dilation)
    return result


def composite(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The definition, in ATen's own ops: what a CPU runs, and a GPU for what cuDNN's fused kernels do not take."""
    out = F.conv2d(input, weight, bias, stride, padding, dilation)
    if residual is not None:
        out = out + residual
    return torch.relu(out).contiguous(memory_format=_format(input, weight))


def _format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """What ATen's convolutions answer in: channels_last where either is laid out so, and not both ways at once."""
    last = torch.channels_last
    is_last = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (input, weight))
    return last if is_last else torch.contiguous_format


def _on_cuda(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    shape = _out_shape(input, weight, stride, padding, dilation)
    if not _takes(input, weight, bias, residual, shape):
        return composite(input, weight, bias, residual, stride, padding, dilation)
    # cuDNN has many engines for a fused convolution, and its first guess is not the fastest: they are timed once a shape, and the choice is kept.
    before = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(True)
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, stride, padding, dilation, 1)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, stride, padding, dilation, 1)
    finally:
        torch._C._set_cudnn_benchmark(before)


def _takes(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether cuDNN has a fused kernel for it: channels_last, one dtype, a residual of the output's shape, sizes that fit 32 bits."""
    given = [input, weight, bias] if residual is None else [input, weight, bias, residual]
    return (
        torch.backends.cudnn.enabled
        and _format(input, weight) is torch.channels_last
        and input.dtype in _CUDNN_DTYPES
        and all(t.dtype == input.dtype for t in given)
        and (residual is None or tuple(residual.shape) == shape)
        and max(input.numel(), _count(shape)) < _INT32
    )


def _out_shape(input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[int, ...]:
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return (input.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


torch.library.impl("gpuopt::conv_relu", "CPU", composite)
torch.library.impl("gpuopt::conv_relu", "CUDA", _on_cuda)
torch.library.register_fake("gpuopt::conv_relu", composite)
