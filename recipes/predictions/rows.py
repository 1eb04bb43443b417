"""What `recipes/predictions/h200.json` holds: one row a pair (a model with a seeded defect, the same model without it), and the rules of the score.

The file is one `Predictions`: `device`, `environment` and `command` say where and how it was made, `rows` holds one `Row` a pair, in the order of defects.py.
Times are milliseconds a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from gpuopt.core.result import Device, Environment, Finding

MEASURED = "measured"
GOAL_SHARE = 0.8
"""Of the rows whose measured gain is to lie in the predicted range."""
GOAL_MISS = 0.15
"""Median distance of the measured gain from the middle of its range, relative to that middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """One finding, without what only a live report needs."""

    code: str
    rule: str
    severity: str
    message: str
    module: str | None = None
    low_ms: float | None = None
    high_ms: float | None = None

    @classmethod
    def of(cls, finding: Finding) -> Fired:
        """From a finding of the doctor."""
        return cls(
            code=finding.code, rule=finding.rule, severity=finding.severity, message=finding.message, module=finding.module,
            low_ms=finding.gain_low_ms, high_ms=finding.gain_high_ms,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What the clock says: both sides in interleaved blocks, before anything was traced in that process."""

    bad_ms: float
    fixed_ms: float
    gain_ms: float
    """Median over the pairs of blocks of (median of the bad block - median of the fixed one)."""
    gain_low_ms: float | None = None
    gain_high_ms: float | None = None
    """95% interval of that median; None under six pairs."""
    num_pairs: int = 0
    difference: float | None = None
    """Relative RMSE between the outputs of both sides: they are to compute the same. None where nothing compares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the doctor says about each side."""

    bad: tuple[Fired, ...] = ()
    fixed: tuple[Fired, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pair."""

    name: str
    code: str
    """The rule that is to find the defect and to price it."""
    what: str
    """Model, sizes and the defect, in words."""
    change: str
    """What the fixed side does instead."""
    held_out: bool = False
    """Whether no rule's price was worked on with this pair's figures in sight."""
    status: str = MEASURED
    """`measured`, or how it ended: a status of gpuopt's (`unsupported`, `oom_device`, `timeout`, `crash`, …) or `skipped`."""
    reason: str = ""
    bad_ms: float | None = None
    fixed_ms: float | None = None
    predicted_low_ms: float | None = None
    predicted_high_ms: float | None = None
    """Sums over the findings of `code` on the bad side: one a place, and the change mends them all."""
    gain_ms: float | None = None
    gain_low_ms: float | None = None
    gain_high_ms: float | None = None
    num_pairs: int = 0
    in_range: bool | None = None
    """Whether the measured gain lies in the predicted range, both ends included; None where either is missing."""
    miss: float | None = None
    """|measured gain - middle of the range| / middle."""
    difference: float | None = None
    fired: bool = False
    """Whether `code` is among the findings of the bad side."""
    fired_on_fixed: bool = False
    """Whether it is still among those of the fixed side: a false alarm."""
    findings: tuple[Fired, ...] = ()
    """All findings of the bad side."""
    findings_fixed: tuple[Fired, ...] = ()
    seconds: float = 0.0
    """What this pair took of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """The file."""

    schema_version: int = 1
    command: str
    small: bool
    """Tiny siblings of the models: a rehearsal, no figure of it means anything."""
    device: Device
    environment: Environment
    seconds: float
    rows: tuple[Row, ...] = ()


def predicted(findings: Sequence[Fired], code: str) -> tuple[float, float] | None:
    """(low, high) summed over the priced findings of `code`; None where it is silent or prices nothing."""
    mine = [(f.low_ms or 0.0, f.high_ms) for f in findings if f.code == code and f.high_ms is not None]
    return (math.fsum(low for low, _ in mine), math.fsum(high for _, high in mine)) if mine else None


def judged(row: Row, timed: Timed, told: Told, *, seconds: float) -> Row:
    """The row with everything that follows from both."""
    found = predicted(told.bad, row.code)
    middle = sum(found) / 2 if found else 0.0
    return Row(
        name=row.name,
        code=row.code,
        what=row.what,
        change=row.change,
        held_out=row.held_out,
        bad_ms=timed.bad_ms,
        fixed_ms=timed.fixed_ms,
        predicted_low_ms=found[0] if found else None,
        predicted_high_ms=found[1] if found else None,
        gain_ms=timed.gain_ms,
        gain_low_ms=timed.gain_low_ms,
        gain_high_ms=timed.gain_high_ms,
        num_pairs=timed.num_pairs,
        in_range=found[0] <= timed.gain_ms <= found[1] if found else None,
        miss=abs(timed.gain_ms - middle) / middle if middle else None,
        difference=timed.difference,
        fired=any(f.code == row.code for f in told.bad),
        fired_on_fixed=any(f.code == row.code for f in told.fixed),
        findings=told.bad,
        findings_fixed=told.fixed,
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The figures that are judged. A rule that was silent, or named no price, counts as a miss without limit: silence is no way to a better score."""

    num_measured: int
    num_in_range: int
    share: float | None
    median_miss: float | None
    """None where there are no rows, or half of them have no prediction."""

    @property
    def passed(self) -> bool:
        """Both goals."""
        return self.share is not None and self.share >= GOAL_SHARE and self.median_miss is not None and self.median_miss < GOAL_MISS


def score(rows: Sequence[Row]) -> Score:
    """Over the rows that were measured."""
    measured = [row for row in rows if row.status == MEASURED]
    inside = sum(row.in_range is True for row in measured)
    middle = median(row.miss if row.miss is not None else math.inf for row in measured) if measured else math.inf
    return Score(
        num_measured=len(measured),
        num_in_range=inside,
        share=inside / len(measured) if measured else None,
        median_miss=middle if math.isfinite(middle) else None,
    )
