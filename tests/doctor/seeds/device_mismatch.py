"""A plain attribute that model.to() left behind, and the same registered as a buffer. `meta` stands for the GPU: torch checks devices there all the same."""

from __future__ import annotations

import torch
from broken import Mlp, failing, working

from gpuopt.doctor.evidence import Evidence

CODE = "GPU701"


def bad() -> Evidence:
    return failing(Mlp(registered=False).to("meta"), torch.ones(2, 8, device="meta"))


def clean() -> Evidence:
    return working(Mlp(registered=True).to("meta"), torch.ones(2, 8, device="meta"))
