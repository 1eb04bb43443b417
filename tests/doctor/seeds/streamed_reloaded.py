"""Each layer is read from its file before it is copied, and read once before the loop."""

from __future__ import annotations

from builders import MS
from loading import LAYERS, Loading, overlapped, serial, too_small

from gpuopt.doctor.evidence import Evidence

CODE = "GPU112"
READ_NS = 20 * MS
"""32 MiB at 1.7 GB/s."""


def step(*, reads: bool) -> Loading:
    return serial(read_ns=READ_NS if reads else 0)


def bad() -> Evidence:
    return too_small(step(reads=True))


def clean() -> Evidence:
    return too_small(overlapped())


GAIN_MS = LAYERS * READ_NS / MS
