"""model.to('cuda') in the loop, pageable as it comes, and once before it."""

from __future__ import annotations

import torch
from builders import MS, US, evidence
from playing import GEMM, Played
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU108"


def model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024, dtype=torch.float16) for _ in range(4))).eval().requires_grad_(False)


def step(*, copied: bool) -> Played:
    tape = Played()
    for parameter in model().parameters() if copied else ():
        num_bytes = parameter.numel() * 2
        tape.move("h2d", num_bytes, max(10 * US, int(num_bytes / 9e9 * 1e9)), memory="pageable", op=tape.op("aten::to", dur_ns=0))
    for layer in range(4):
        tape.run("aten::addmm", GEMM, int(0.2 * MS), module=str(layer))
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(copied=True), module=model())


def clean() -> Evidence:
    return evidence(step(copied=False), module=model())


GAIN_MS = round(step(copied=True).ms - step(copied=False).ms, 6)
