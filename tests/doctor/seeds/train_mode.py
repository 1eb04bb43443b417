"""Dropout and batch norm never told to stop, and a model in which the flag is set but changes nothing."""

from __future__ import annotations

from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU301"


def made(p: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(p))


def bad() -> Evidence:
    return evidence(module=made(0.1))


def clean() -> Evidence:
    """Dropout of 0 and a linear layer are the same in both modes."""
    model = made(0.0)
    model[2].eval()
    return evidence(module=model)
