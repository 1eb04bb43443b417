"""An allocator that had to start over, and one at ease."""

from __future__ import annotations

from builders import evidence

from gpuopt.doctor.evidence import Evidence

CODE = "GPU605"
RESERVED = 100 * 2**30


def stats(retries: int, split: float) -> dict[str, float]:
    return {
        "num_alloc_retries": retries,
        "inactive_split_bytes.all.current": split * RESERVED,
        "reserved_bytes.all.current": RESERVED,
        "allocated_bytes.all.peak": 0.6 * RESERVED,
    }


def bad() -> Evidence:
    return evidence(memory_stats=stats(3, 0.4))


def clean() -> Evidence:
    return evidence(memory_stats=stats(0, 0.05))
