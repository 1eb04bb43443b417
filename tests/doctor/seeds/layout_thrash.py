"""Heads moved by permute and contiguous around every product, and products that take strides."""

from __future__ import annotations

from builders import MS, US, evidence
from playing import COPY, GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU111"


def step(*, copies: bool) -> Played:
    tape = Played()
    for layer in range(4):
        module = f"layers.{layer}.attention"
        for _ in range(3):
            if copies:
                outer = tape.op("aten::contiguous", dur_ns=2 * US, module=module)
                tape.run("aten::copy_", COPY, 100 * US, module=module, parent=outer, shapes=((64, 16, 512, 64), (64, 16, 512, 64)))
            tape.run("aten::bmm", GEMM, MS // 2, module=module)
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(copies=True))


def clean() -> Evidence:
    return evidence(step(copies=False))


GAIN_MS = 0.85 * 12 * 0.1
"""All copies but the few that pay for themselves."""
