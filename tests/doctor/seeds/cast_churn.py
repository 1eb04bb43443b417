"""fp32 weights under autocast, cast in every call, and weights in half precision."""

from __future__ import annotations

import torch
from builders import US, evidence
from playing import GEMM, Played
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU205"
CAST = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::float16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}, std::array<char*, 2ul> >"
    "(int, at::native::float16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}, std::array<char*, 2ul>)"
)
LAYERS, CAST_US = 8, 30


def model(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(*(nn.Linear(512, 512, dtype=dtype) for _ in range(LAYERS))).eval().requires_grad_(False)


def step(*, casts: bool) -> Played:
    tape = Played()
    for layer in range(LAYERS):
        if casts:
            outer = tape.op("aten::to", dur_ns=2 * US, module=str(layer))
            tape.run("aten::_to_copy", CAST, CAST_US * US, module=str(layer), parent=outer, shapes=((512, 512),), dtypes=("float",))
        tape.run("aten::addmm", GEMM, 100 * US, module=str(layer))
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(casts=True), module=model(torch.float32))


def clean() -> Evidence:
    return evidence(step(casts=False), module=model(torch.float16))


GAIN_MS = LAYERS * CAST_US / 1e3
