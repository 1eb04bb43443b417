"""A batch of images copied from pinned memory in every call, and the same batch left on the GPU."""

from __future__ import annotations

import torch
from builders import MS, evidence
from playing import GEMM, Played

from gpuopt.core.live import Inputs
from gpuopt.doctor.evidence import Evidence

CODE = "GPU102"
IMAGES = torch.zeros(32, 3, 224, 224)
COPY_MS = 0.4


def step(*, copied: bool) -> Played:
    tape = Played()
    if copied:
        tape.move("h2d", IMAGES.numel() * 4, int(COPY_MS * MS))
    tape.run("aten::addmm", GEMM, 5 * MS)
    tape.wait("cudaDeviceSynchronize")
    return tape


def bad() -> Evidence:
    return evidence(step(copied=True), inputs=Inputs(args=(IMAGES,)))


def clean() -> Evidence:
    return evidence(step(copied=False), inputs=Inputs(args=(IMAGES,)))


GAIN_MS = COPY_MS
