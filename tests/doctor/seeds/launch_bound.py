"""300 kernels of 12 us launched every 30 us, half of that in Python; and the same kernels back to back."""

from __future__ import annotations

from builders import GPU, US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence
from gpuopt.profiling import waterfall

CODE = "GPU404"


def step(host_ns: int) -> Played:
    tape = Played()
    for at in range(300):
        tape.host_ns += host_ns // 2
        tape.run("aten::addmm", GEMM, 12 * US, host_ns=host_ns // 2, module=f"layers.{at // 10}")
    tape.wait("cudaDeviceSynchronize")
    return tape


def seen(host_ns: int) -> Evidence:
    tape = step(host_ns)
    return evidence(tape, waterfall=waterfall.build(tape.trace(), tape.ms, GPU.ceilings, ()))


def bad() -> Evidence:
    return seen(30 * US)


def clean() -> Evidence:
    return seen(8 * US)


GAIN_MS = step(30 * US).ms - 300 * 0.013 - 0.02
"""To a graph of the same kernels, 1 us apart."""
