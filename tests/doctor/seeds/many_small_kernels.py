"""Four hundred element-wise kernels of 3 us with gaps between them, and the same work in a few long ones."""

from __future__ import annotations

from builders import US, evidence
from playing import ADD, GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU403"


def bad() -> Evidence:
    tape = Played()
    for at in range(400):
        tape.run(
            "aten::mm" if at % 8 == 0 else "aten::add", GEMM if at % 8 == 0 else ADD, 3 * US, host_ns=5 * US, module=f"blocks.{at // 40}"
        )
    tape.wait("cudaDeviceSynchronize")
    return evidence(tape)


def clean() -> Evidence:
    tape = Played()
    for at in range(100):
        tape.run(
            "aten::mm" if at % 2 == 0 else "aten::add", GEMM if at % 2 == 0 else ADD, 40 * US, host_ns=5 * US, module=f"blocks.{at // 10}"
        )
    tape.wait("cudaDeviceSynchronize")
    return evidence(tape)


GAIN_MS = 0.5 * 350 * 5e-3
"""Every second of the 350 element-wise kernels, each with its place in the row of launches."""
