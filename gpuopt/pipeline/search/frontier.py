"""Trials -> those that no other beats in both latency and samples a second, and the knee of their curve. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gpuopt.core.search import Trial


def beats(one: Trial, other: Trial) -> bool:
    """In latency and in samples a second, equal in both included."""
    return (one.time_ms or math.inf) <= (other.time_ms or math.inf) and (one.samples_per_s or 0) >= (other.samples_per_s or 0)


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Those that no other beats in both latency and samples a second, by latency."""
    front: list[Trial] = []
    for trial in sorted((t for t in trials if t.time_ms and t.samples_per_s), key=lambda t: (t.time_ms or 0, -(t.samples_per_s or 0))):
        if not front or (trial.samples_per_s or 0) > (front[-1].samples_per_s or 0):
            front.append(trial)
    return front


def knee(front: Sequence[Trial]) -> str | None:
    """The last point up to which each percent of latency bought at least a percent of throughput; None for fewer than two points."""
    if len(front) < 2:
        return None
    at = front[0]
    for trial in front[1:]:
        if math.log((trial.samples_per_s or 1) / (at.samples_per_s or 1)) < math.log((trial.time_ms or 1) / (at.time_ms or 1)):
            break
        at = trial
    return at.key
