"""A convolutional model with cudnn.benchmark off, and on."""

from __future__ import annotations

import torch
from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU409"


def made(*, is_on: bool) -> Evidence:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).half().eval().to(memory_format=torch.channels_last)
    return evidence(module=model, flags={"matmul_tf32": True, "cudnn_tf32": True, "cudnn_benchmark": is_on, "grad_enabled": False})


def bad() -> Evidence:
    return made(is_on=False)


def clean() -> Evidence:
    return made(is_on=True)
