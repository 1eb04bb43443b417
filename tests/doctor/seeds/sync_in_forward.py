"""`.item()` after every layer, and the same layers read once at the end, outside forward."""

from __future__ import annotations

from builders import US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU104"


def step(*, reads: bool) -> Played:
    tape = Played()
    for layer in range(24):
        tape.run("aten::addmm", GEMM, 100 * US, host_ns=40 * US, module=f"layers.{layer % 2}")
        if reads:
            tape.read(module=f"layers.{layer % 2}")
            tape.op("aten::view", dur_ns=20 * US)
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(reads=True))


def clean() -> Evidence:
    return evidence(step(reads=False))


GAIN_MS = step(reads=True).ms - step(reads=False).ms
