"""Two other processes on the GPU, and none."""

from __future__ import annotations

from dataclasses import replace

from builders import GPU, evidence

from gpuopt.doctor.evidence import Evidence

CODE = "GPU603"


def bad() -> Evidence:
    return evidence(device=replace(GPU, other_processes=2))


def clean() -> Evidence:
    return evidence(device=replace(GPU, other_processes=0))
