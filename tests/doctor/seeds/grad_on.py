"""A call outside no_grad, and one inside."""

from __future__ import annotations

import torch
from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU302"
_FLAGS = {"matmul_tf32": True, "cudnn_tf32": True, "cudnn_benchmark": True}


def made(*, is_on: bool) -> Evidence:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    with torch.set_grad_enabled(is_on):
        outputs = model(torch.ones(16, 32))
    return evidence(module=model, outputs=(outputs,), flags={**_FLAGS, "grad_enabled": True})


def bad() -> Evidence:
    return made(is_on=True)


def clean() -> Evidence:
    """The switch is on around it, but the model itself runs under no_grad."""
    return made(is_on=False)
