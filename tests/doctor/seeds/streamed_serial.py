"""One slab a layer, pinned, on the stream that computes; and on a stream of its own with two slots."""

from __future__ import annotations

from loading import overlapped, serial, too_small

from gpuopt.doctor.evidence import Evidence

CODE = "GPU116"


def bad() -> Evidence:
    return too_small(serial())


def clean() -> Evidence:
    return too_small(overlapped())


GAIN_MS = round(serial().ms - overlapped().ms, 6)
