"""gpuopt::conv_relu against fp64, against its own shape rule, and which calls go to cuDNN."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from gpuopt.core.live import Inputs
from gpuopt.core.tally import Tally
from gpuopt.profiling.count import count
from gpuopt.programs.ops import conv

SIZES = {"3x3": (8, 12, 3, 1, 1, 1), "1x1": (8, 12, 1, 1, 0, 1), "7x7 of 3 channels": (3, 8, 7, 2, 3, 1), "dilated": (4, 4, 3, 2, 2, 2)}


def tensors(size="3x3", *, dtype=torch.float32, last=True, pixels=9, residual="none", batch=2):
    """Arguments of one call."""
    in_channels, out_channels, kernel, stride, pad, dilation = SIZES[size]
    generator = torch.Generator().manual_seed(3)
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for s in ((batch, in_channels, pixels, pixels), (out_channels, in_channels, kernel, kernel), (out_channels,))
    ]
    layout = torch.channels_last if last else torch.contiguous_format
    x, w, b = made[0].contiguous(memory_format=layout), made[1].contiguous(memory_format=layout), made[2]
    out = F.conv2d(x.double(), w.double(), b.double(), stride, pad, dilation)
    shape = {"same": out.shape, "channel": (batch, out_channels, 1, 1)}.get(residual)
    z = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
    return x, w, b, z, [stride] * 2, [pad] * 2, [dilation] * 2


def exact(x, w, b, z, stride, pad, dilation):
    out = F.conv2d(x.double(), w.double(), b.double(), stride, pad, dilation)
    return (out if z is None else out + z.double()).relu()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residual", ["none", "same", "channel"])
def test_it_is_relu_of_the_sum(size, residual):
    call = tensors(size, residual=residual)
    out, ref = conv.conv_relu(*call), exact(*call)
    assert ((out - ref).norm() / ref.norm()) < 1e-6
    assert out.min() == 0 and (ref > 0).any()


@pytest.mark.parametrize(("last", "pixels", "size", "batch"), [*itertools.product([True, False], [9, 1], ["3x3", "1x1"], [1, 2])])
def test_the_shape_rule_says_what_the_kernel_does(last, pixels, size, batch):
    call = tensors(size, last=last, pixels=pixels, residual="same", batch=batch)
    out, said = conv.conv_relu(*call), conv.composite(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in call))
    assert (out.shape, out.dtype) == (said.shape, said.dtype)
    wide = [i for i, n in enumerate(out.shape) if n > 1]  # strides of a dimension of one say nothing
    assert [out.stride(i) for i in wide] == [said.stride(i) for i in wide]


def test_torch_finds_no_fault_with_the_operator():
    for residual in ("none", "same"):
        torch.library.opcheck(
            torch.ops.gpuopt.conv_relu.default,
            tensors(residual=residual),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's two kernels, computed by ATen on the CPU; the names of those called."""
    called = []

    def plain(x, w, b, stride, pad, dilation, groups):
        called.append("relu")
        return F.conv2d(x, w, b, stride, pad, dilation, groups).relu()

    def summed(x, w, z, alpha, b, stride, pad, dilation, groups):
        called.append("add_relu")
        return (F.conv2d(x, w, b, stride, pad, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", plain)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", summed)
    return called


@pytest.mark.parametrize(
    ("how", "kernel"),
    [
        ({}, ["relu"]),
        ({"residual": "same"}, ["add_relu"]),
        ({"size": "dilated", "residual": "same"}, ["add_relu"]),
        ({"dtype": torch.bfloat16}, ["relu"]),
        ({"residual": "channel"}, []),
        ({"dtype": torch.float64}, []),
        ({"last": False}, []),
    ],
)
def test_cudnn_gets_what_it_has_a_kernel_for_and_nothing_else(cudnn, how, kernel):
    call = tensors(**how)
    out, ref = conv._on_cuda(*call), exact(*call)
    assert cudnn == kernel
    assert ((out - ref).norm() / ref.norm()) < (1e-2 if how.get("dtype") is torch.bfloat16 else 1e-6)


def test_a_residual_of_another_dtype_is_not_given_to_cudnn(cudnn):
    x, w, b, z, *rest = tensors(residual="same", dtype=torch.float16)
    out = conv._on_cuda(x, w, b, z.float(), *rest)
    assert cudnn == [] and out.dtype == torch.float32


def test_sizes_past_32_bits_are_left_to_aten():
    x, w, b, _, stride, pad, dilation = tensors()
    x = torch.empty((2**16, 8, 128, 128), device="meta", memory_format=torch.channels_last)
    assert not conv._takes(x, w, b, None, conv._out_shape(x, w, stride, pad, dilation))


def test_its_flops_are_a_convolutions():
    call = tensors(residual="same")
    fused, plain = Tally(), Tally()
    fused.add("gpuopt.conv_relu.default", call, {}, conv.conv_relu(*call))
    out = F.conv2d(*call[:3], *call[4:])
    plain.add("aten.cudnn_convolution.default", call[:2], {}, out)
    assert fused.flops == plain.flops and fused.audit(None, "test").reason == ""


def test_a_count_knows_it():
    x, w, b, z, *rest = tensors(residual="same")

    class One(torch.nn.Module):
        def forward(self, x):
            return conv.conv_relu(x, w, b, z, *rest)

    found = count(One(), Inputs(args=(x,)))
    assert not found.unknown_ops
    assert found.flops == 2.0 * 2 * 12 * 81 * 8 * 9
