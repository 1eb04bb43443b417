"""A model on the CPU of a machine with a GPU, and of one without."""

from __future__ import annotations

from builders import CPU, evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU314"


def made(*, gpu_available: bool) -> Evidence:
    return evidence(device=CPU, module=nn.Linear(8, 8).eval(), wall_ms=12.0, flags={"gpu_available": gpu_available, "grad_enabled": False})


def bad() -> Evidence:
    return made(gpu_available=True)


def clean() -> Evidence:
    return made(gpu_available=False)
