"""Four element-wise passes over one tensor, and one."""

from __future__ import annotations

from builders import MS, US, evidence
from playing import ADD, GEMM, Played

from gpuopt.doctor.evidence import Evidence

CODE = "GPU408"
SHAPE = (64, 512, 4096)
PASS_US = 130


def step(ops: tuple[str, ...]) -> Played:
    tape = Played()
    for layer in range(4):
        module = f"layers.{layer}.act"
        tape.run("aten::mm", GEMM, MS // 2, module=f"layers.{layer}.up", shapes=((32768, 1024), (1024, 4096)))
        for op in ops:
            tape.run(op, ADD, PASS_US * US, module=module, shapes=(SHAPE,))
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(("aten::mul", "aten::add", "aten::tanh", "aten::mul")))


def clean() -> Evidence:
    return evidence(step(("aten::gelu",)))


GAIN_MS = 4 * 3 * PASS_US / 1e3
"""Each of the four chains becomes one pass: it reads once and writes once."""
