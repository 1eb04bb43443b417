"""Layers copied from pageable memory, and from pinned memory beside the kernels."""

from __future__ import annotations

from loading import PAGEABLE, overlapped, serial, too_small

from gpuopt.doctor.evidence import Evidence

CODE = "GPU113"


def bad() -> Evidence:
    return too_small(serial(memory="pageable", rate=PAGEABLE))


def clean() -> Evidence:
    return too_small(overlapped())


GAIN_MS = round(serial(memory="pageable", rate=PAGEABLE).ms - serial().ms, 6)
