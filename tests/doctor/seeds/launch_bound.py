"""300 kernels of 12 us launched every 30 us, and the same kernels back to back."""

from __future__ import annotations

from builders import US, evidence
from playing import GEMM, Played

from gpuopt.core.result import Waterfall, WaterfallPart
from gpuopt.doctor.evidence import Evidence

CODE = "GPU404"


def step(host_ns: int) -> Played:
    tape = Played()
    for at in range(300):
        tape.run("aten::addmm", GEMM, 12 * US, host_ns=host_ns, module=f"layers.{at // 10}")
    tape.wait("cudaDeviceSynchronize")
    return tape


def seen(host_ns: int) -> Evidence:
    tape = step(host_ns)
    busy = 300 * 0.012
    parts = (WaterfallPart(name="compute-bound", ms=busy), WaterfallPart(name="launch gaps", ms=tape.ms - busy))
    return evidence(tape, waterfall=Waterfall(wall_ms=tape.ms, parts=parts, unaccounted_ms=0.0))


def bad() -> Evidence:
    return seen(30 * US)


def clean() -> Evidence:
    return seen(8 * US)


GAIN_MS = step(30 * US).ms - 300 * 0.013 - 0.02
"""To a graph of the same kernels, 1 us apart."""
