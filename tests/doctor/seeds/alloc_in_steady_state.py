"""empty_cache() in the loop: memory asked of the driver in every call, and kept."""

from __future__ import annotations

from builders import MS, US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU107"


def step(*, allocates: bool) -> Played:
    tape = Played()
    for _ in range(4):
        if allocates:
            tape.call("cudaMalloc", "alloc", 400 * US, op=tape.op("aten::empty", dur_ns=2 * US))
        tape.run("aten::addmm", GEMM, 50 * US)
    if allocates:
        tape.wait("cudaDeviceSynchronize")
        tape.call("cudaFree", "alloc", 1 * MS)
    else:
        tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(allocates=True))


def clean() -> Evidence:
    return evidence(step(allocates=False))


GAIN_MS = step(allocates=True).ms - step(allocates=False).ms
