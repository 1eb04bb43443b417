"""Scores sorted by numpy between two layers, and on the GPU."""

from __future__ import annotations

from builders import MS, US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU106"


def step(*, on_host: bool) -> Played:
    tape = Played()
    tape.run("aten::addmm", GEMM, 3 * MS, module="head")
    if on_host:
        index = tape.op("aten::to", dur_ns=10 * US, module="router")
        tape.move("d2h", 8_000_000, 160 * US, op=index)
        tape.wait(op=index)
        tape.host_ns += 2 * MS
        tape.move("h2d", 8_000_000, 160 * US, op=tape.op("aten::to", dur_ns=10 * US, module="router"))
    else:
        tape.run("aten::add", "void at::native::bitonicSortKVInPlace<-2, -1, 16, 16, float, long>()", 50 * US, module="router")
    for _ in range(3):
        tape.run("aten::addmm", GEMM, 3 * MS, module="tail")
    out = tape.op("aten::to", dur_ns=5 * US)
    tape.move("d2h", 4_000_000, 80 * US, op=out)
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(on_host=True))


def clean() -> Evidence:
    """Its output goes to the host too: after the last kernel, that is no defect."""
    return evidence(step(on_host=False))


GAIN_MS = step(on_host=True).ms - step(on_host=False).ms
