"""The first half of the layers stays and the second travels in a row; and every other layer stays."""

from __future__ import annotations

from loading import KERNEL_NS, LAYERS, Loading, overlapped, too_small

from gpuopt.doctor.evidence import Evidence

CODE = "GPU117"


COPY_NS = 3 * KERNEL_NS // 2
"""Half of the layers travel in three quarters of the time all of them compute."""


def step(*, spread: bool) -> Loading:
    return overlapped(tuple(range(0, LAYERS, 2)) if spread else tuple(range(LAYERS // 2)), COPY_NS)


def bad() -> Evidence:
    return too_small(step(spread=False))


def clean() -> Evidence:
    return too_small(step(spread=True))


GAIN_MS = round(step(spread=False).ms - step(spread=True).ms, 6)
