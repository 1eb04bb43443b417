"""torch.cuda.synchronize() after every layer, and once at the end."""

from __future__ import annotations

from builders import US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU105"


def step(*, waits: bool) -> Played:
    tape = Played()
    for layer in range(24):
        # Two kernels a layer: the wait comes after every second launch.
        tape.run("aten::addmm", GEMM, 200 * US, host_ns=20 * US, module=f"layers.{layer}")
        tape.run("aten::addmm", GEMM, 200 * US, host_ns=20 * US, module=f"layers.{layer}")
        if waits and layer < 23:
            tape.wait("cudaDeviceSynchronize")
            tape.host_ns += 80 * US
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(waits=True))


def clean() -> Evidence:
    return evidence(step(waits=False))


GAIN_MS = round(step(waits=True).ms - step(waits=False).ms, 6)
