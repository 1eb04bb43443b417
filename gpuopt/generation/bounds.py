"""Bytes and FLOPs of a decode step x ceilings -> the tokens a second they allow, at its own batch and at larger ones. Pure."""

from __future__ import annotations

from gpuopt.core.generation import BatchBound

BATCHES = (4, 16, 64, 256, 1024)
"""Batches whose bound is told."""


def bound(*, batch: int, weight_bytes: float, kv_bytes: float, bandwidth: float) -> float:
    """Tokens a second where nothing costs but reading: `kv_bytes` of all sequences together."""
    return batch * bandwidth / (weight_bytes + kv_bytes)


def larger(
    *,
    batch: int,
    weight_bytes: float,
    kv_bytes: float,
    full_kv_bytes: float,
    step_flops: float,
    bandwidth: float,
    peak: float | None,
    memory_bytes: float | None,
    held_bytes: float,
) -> tuple[BatchBound, ...]:
    """Bounds at larger batches; `kv_bytes`, `full_kv_bytes` and `step_flops` of one sequence, `held_bytes` of all weights.

    Up to the first batch whose products take longer than reading does, and none that does not fit but the first.
    """
    found: list[BatchBound] = []
    for size in (b for b in BATCHES if b > batch):
        reading = (weight_bytes + size * kv_bytes) / bandwidth
        computing = size * step_flops / peak if peak else 0.0
        needed = held_bytes + size * full_kv_bytes
        fits = None if memory_bytes is None else needed <= memory_bytes
        limit = "compute" if computing > reading else "memory"
        found.append(BatchBound(batch=size, tokens_per_s=size / max(reading, computing), limit=limit, memory_bytes=needed, fits=fits))
        if limit == "compute" or fits is False:
            break
    return tuple(found)
