"""A graph a length of text, and one graph for all."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import Compiled, Evidence

CODE = "GPU502"


def bad() -> Evidence:
    guards = tuple(
        ("forward (/srv/app/model.py:40)", f"0/{i}: tensor 'input_ids' size mismatch at index 1. expected {16 + i}, actual {17 + i}")
        for i in range(4)
    )
    return evidence(backend="inductor", preset="max-autotune", compiled=Compiled(recompiles=guards, num_graphs=5))


def clean() -> Evidence:
    return evidence(backend="inductor", preset="max-autotune", compiled=Compiled(num_graphs=1))
