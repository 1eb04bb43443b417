"""Images decoded in this process between two calls, and by workers ahead of it."""

from __future__ import annotations

from builders import MS, US, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU110"


def step(iterator: str, fetch_ns: int) -> Played:
    tape = Played()
    tape.fetch(iterator, fetch_ns)
    for _ in range(4):
        tape.run("aten::addmm", GEMM, 2 * MS)
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step("_SingleProcessDataLoaderIter", 9 * MS))


def clean() -> Evidence:
    return evidence(step("_MultiProcessingDataLoaderIter", 50 * US))


GAIN_MS = 9 - 0.05
