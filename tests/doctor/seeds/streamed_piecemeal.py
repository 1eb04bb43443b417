"""Four tensors a layer, pinned, each copied by itself at the rate of a small copy; and one slab a layer."""

from __future__ import annotations

from loading import TENSORS, overlapped, serial, too_small

from gpuopt.doctor.evidence import Evidence

CODE = "GPU114"
SMALL = 30e9
"""Bytes a second of a copy of 8 MiB, its launch included."""


def bad() -> Evidence:
    return too_small(serial(pieces=TENSORS, rate=SMALL))


def clean() -> Evidence:
    return too_small(overlapped())


GAIN_MS = round(serial(pieces=TENSORS, rate=SMALL).ms - serial().ms, 6)
