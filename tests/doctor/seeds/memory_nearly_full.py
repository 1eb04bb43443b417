"""A call that peaks at 97% of the memory, and at 70%."""

from __future__ import annotations

from builders import GPU, evidence

from gpuopt.doctor.evidence import Evidence

CODE = "GPU604"


def bad() -> Evidence:
    return evidence(peak_bytes=int(0.97 * (GPU.memory_bytes or 0)), batch=96)


def clean() -> Evidence:
    return evidence(peak_bytes=int(0.7 * (GPU.memory_bytes or 0)), batch=64)
