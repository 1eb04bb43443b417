"""A blocking copy a tensor, the host awake 40 microseconds after each; and events order the two streams."""

from __future__ import annotations

from builders import US
from loading import TENSORS, overlapped, serial, too_small

from gpuopt.doctor.evidence import Evidence

CODE = "GPU115"


def bad() -> Evidence:
    return too_small(serial(pieces=TENSORS, is_waiting=True, wakes_ns=40 * US))


def clean() -> Evidence:
    return too_small(overlapped())


GAIN_MS = round(serial(pieces=TENSORS, is_waiting=True, wakes_ns=40 * US).ms - serial(pieces=TENSORS).ms, 6)
