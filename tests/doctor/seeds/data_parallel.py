"""A model in nn.DataParallel, and the model itself."""

from __future__ import annotations

from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU308"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU()).half().eval()


def bad() -> Evidence:
    return evidence(module=nn.DataParallel(model()))


def clean() -> Evidence:
    return evidence(module=model())
