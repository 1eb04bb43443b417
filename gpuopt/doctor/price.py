"""Saved time -> a predicted gain as a range, and a severity from it. Amdahl: nothing gives back more than it takes."""

from __future__ import annotations

from dataclasses import replace

from gpuopt.core.result import Finding

WORTH_IT = 0.05
"""A gain of this share of the wall time is a warning; less is for information."""
AROUND = 1.15
"""An op that goes takes its launch and the gap before the next one with it: no more than this times its own time is promised."""
WIDEST = 2.0
"""high / low of a range: wider is no prediction."""


def priced(finding: Finding, saved_ms: float, *, low: float = 0.75, high: float = 1.1, wall_ms: float | None = None) -> Finding:
    """The finding with its range `[low, high] x saved_ms`, never above what it takes now with what goes along (`AROUND`), nor above the call; high at most twice low.
    Unpriced where nothing would be saved."""
    if saved_ms <= 0:
        return finding
    top = saved_ms * high
    if finding.time_ms is not None:
        top = min(top, AROUND * finding.time_ms)
    if wall_ms is not None:
        top = min(top, wall_ms)
    bottom = min(max(saved_ms * low, top / WIDEST), top)
    return replace(finding, gain_low_ms=bottom, gain_high_ms=top)


def graded(finding: Finding, wall_ms: float | None) -> Finding:
    """With its severity from its price; an `error` stays one, and what has no price keeps its own."""
    if finding.severity == "error" or finding.gain_high_ms is None or not wall_ms:
        return finding
    middle = (finding.gain_high_ms + (finding.gain_low_ms or 0.0)) / 2
    return replace(finding, severity="warning" if middle >= WORTH_IT * wall_ms else "info")
