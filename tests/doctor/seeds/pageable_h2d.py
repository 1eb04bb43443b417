"""64 MB a call through pageable memory, and the same pinned."""

from __future__ import annotations

from builders import MS, Tape, evidence

from gpuopt.doctor.evidence import Evidence

CODE = "GPU101"


def step(memory: str, dur_ns: int) -> Tape:
    tape = Tape()
    tape.copy("h2d", 64_000_000, dur_ns, memory=memory)
    tape.kernel("sm90_xmma_gemm_f16f16", 5 * MS)
    return tape


def bad() -> Evidence:
    return evidence(step("pageable", 7 * MS))


def clean() -> Evidence:
    return evidence(step("pinned", int(1.3 * MS)))


GAIN_MS = 7 - 1.28
"""What the fix gives back, by construction: the predicted range must hold it."""
