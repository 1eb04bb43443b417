"""2048 samples on a GPU of 64 MiB, and the same model with 128."""

from __future__ import annotations

from dataclasses import replace

import torch
from broken import Hungry, failing, working
from builders import GPU

from gpuopt.core.live import Inputs
from gpuopt.doctor.evidence import Evidence

CODE = "GPU704"
SMALL = replace(GPU, memory_bytes=64 * 2**20)


def bad() -> Evidence:
    x = torch.ones(2048, 1024)
    found = failing(Hungry(hungry=True), x)
    return replace(found, device=SMALL, batch=2048, inputs=Inputs(args=(x,), dims={"N": 2048}))


def clean() -> Evidence:
    return replace(working(Hungry(hungry=False), torch.ones(128, 1024)), device=SMALL, batch=128, peak_bytes=40 * 2**20)
