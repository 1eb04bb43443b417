"""Tokens picked by a boolean index, changed and put back, and a where over the mask."""

from __future__ import annotations

from builders import US, evidence
from playing import ADD, GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU311"
INDEX = "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_kernel_impl<at::native::OpaqueType<2> >()>"
PUT = "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_put_kernel_impl<at::native::OpaqueType<2> >()>"
WHERE = "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::where_kernel_impl(at::TensorIterator&)> >(int)"


def step(*, by_index: bool) -> Played:
    tape = Played()
    for _ in range(4):
        tape.run("aten::mm", GEMM, 400 * US, module="experts.up")
        if by_index:
            tape.run("aten::index", INDEX, 90 * US, module="experts")
            tape.run("aten::index", INDEX, 90 * US, module="experts")
            tape.run("aten::add", ADD, 10 * US, module="experts")
            tape.run("aten::index_put_", PUT, 120 * US, module="experts")
        else:
            tape.run("aten::where", WHERE, 110 * US, module="experts")
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(by_index=True))


def clean() -> Evidence:
    return evidence(step(by_index=False))


GAIN_MS = step(by_index=True).ms - step(by_index=False).ms
