"""A product of 66 blocks on 132 multiprocessors, and the same work in two whole waves of blocks a quarter as large."""

from __future__ import annotations

from builders import MS, evidence
from playing import GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU402"


def step(blocks: int, dur_ns: int) -> Played:
    tape = Played()
    for layer in range(4):
        tape.run(
            "aten::mm",
            GEMM,
            dur_ns,
            module=f"layers.{layer}",
            grid=(blocks, 1, 1),
            block=(384, 1, 1),
            registers=168,
            shared_bytes=213 * 1024,
        )
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(66, MS // 2))


def clean() -> Evidence:
    return evidence(step(264, int(0.32 * MS)))


GAIN_MS = step(66, MS // 2).ms - step(264, int(0.32 * MS)).ms
