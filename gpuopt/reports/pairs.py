"""Reports -> a report that compares: which runs stand against each other, a verdict for each, and where the difference lies.

Two reports are before and after: every run both have is a pair, and where each holds one run those two are, whatever they are (eager and a compiled backend, fp32 and fp16). Of one
report the first run stands against the others. `--run` chooses where that is not what was meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpuopt.core import codec
from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.result import SCHEMA_VERSION, Report, Run, Status
from gpuopt.reports import diff
from gpuopt.reports.changes import change
from gpuopt.reports.content import naming
from gpuopt.reports.figures import clean


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that stand against each other."""

    before: Run
    after: Run


def compared(
    before: Report,
    after: Report | None = None,
    *,
    runs: Sequence[str] = (),
    threshold: float | None = None,
    allow_inconclusive: bool = False,
    command: str = "",
) -> Report:
    """One report that holds the verdicts, and under `tables["changes"]` the differences of runs that were profiled.

    Parameters
    ----------
    after: None compares runs of `before` with each other.
    runs: at most two, each a number from 1 or words of a run's label; of two reports one names the run in both.
    threshold: relative slowdown that matters. None is the default with two reports; runs of one report are no before and after, so without it nothing gates them.

    Raises
    ------
    UsageError for a choice that names no run or several; BadInput for reports without two runs to compare.
    """
    limit = diff.DEFAULT_THRESHOLD if threshold is None else threshold
    pairs = _pairs(before, after, runs)
    if pairs is None:
        assert after is not None
        rows = list(diff.compare(before, after, threshold=limit))
        pairs = [Pair(mine[0], other[0]) for mine, other in _matched(before, after)]
    else:
        other = after or before
        rows = [
            _judged(
                pair,
                before if after is None else None,
                diff.other_device(before.device_of(pair.before), other.device_of(pair.after)),
                limit,
            )
            for pair in pairs
        ]
    changes = [found for pair in pairs if (found := change(pair.before, pair.after, run=_common(pair), labels=_labels(pair))) is not None]
    tables: dict[str, object] = {"compare": [diff.plain(row) for row in rows]}
    if changes:
        tables["changes"] = [codec.dump(found) for found in changes]
    last = after or before
    gated = after is not None or threshold is not None
    return Report(
        schema_version=SCHEMA_VERSION,
        command=command,
        verb="compare",
        environment=last.environment,
        device=replace(last.device, notes=()) if last.device else None,
        findings=diff.environment_findings(before, after) if after is not None else (),
        gates=diff.gates(rows, threshold=limit, allow_inconclusive=allow_inconclusive) if gated else (),
        tables=tables,
    )


def _pairs(before: Report, after: Report | None, runs: Sequence[str]) -> list[Pair] | None:
    """The chosen pairs, or those that follow by themselves; None: two reports, matched run by run."""
    if len(runs) > 2:
        raise UsageError(f"two runs are compared, {len(runs)} were named", fix="--run A --run B")
    if after is None:
        if len(before.runs) < 2:
            raise BadInput(
                f"the report holds {len(before.runs) or 'no'} run{'' if len(before.runs) == 1 else 's'}: nothing to compare it with",
                fix="name a second report",
            )
        if len(runs) == 2:
            return [Pair(_chosen(before, runs[0], "the report"), _chosen(before, runs[1], "the report"))]
        first = before.runs[0]
        others = [_chosen(before, runs[0], "the report")] if runs else list(before.runs[1:])
        return [Pair(first, other) for other in others]
    if runs:
        return [Pair(_chosen(before, runs[0], "the first report"), _chosen(after, runs[-1], "the second report"))]
    if len(before.runs) == len(after.runs) == 1:
        return [Pair(before.runs[0], after.runs[0])]
    return None


def _matched(before: Report, after: Report) -> list[tuple[list[Run], list[Run]]]:
    """Runs that ask the same, where neither report has two of them."""
    found = []
    for run in before.runs:
        mine = [r for r in before.runs if diff.key(r) == diff.key(run)]
        others = [r for r in after.runs if diff.key(r) == diff.key(run)]
        if len(mine) == len(others) == 1:
            found.append((mine, others))
    return found


def _chosen(report: Report, wanted: str, where: str) -> Run:
    """By number from 1, or by words that occur in one label alone."""
    listed = "; ".join(f"{number} {clean(diff.label(run), 100)}" for number, run in enumerate(report.runs, start=1))
    if wanted.isascii() and wanted.isdigit():
        if not 1 <= int(wanted) <= len(report.runs):
            raise UsageError(f"{where} has no run {wanted}", fix=f"--run with one of: {listed}")
        return report.runs[int(wanted) - 1]
    parts = [word.casefold() for word in wanted.replace(" · ", " ").split()]
    found = [run for run in report.runs if parts and all(part in diff.label(run).casefold() for part in parts)]
    exact = [run for run in found if set(parts) <= set(diff.label(run).casefold().replace(" · ", " ").split())]
    found = exact if len(exact) == 1 else found
    if len(found) != 1:
        said = "no run" if not found else f"{len(found)} runs"
        raise UsageError(f"{clean(wanted, 80)!r} names {said} of {where}", fix=f"--run with one of: {listed}")
    return found[0]


def _judged(pair: Pair, session: Report | None, doubt: str, threshold: float) -> diff.Comparison:
    """Of one report interleaved pairs decide, where the second was timed beside the first: no drift lies between them."""
    row = diff.judge(pair.before, pair.after, doubt, threshold)
    row = replace(row, run=f"{_common(pair)}: {' -> '.join(_labels(pair))}".removeprefix(": ")) if _differ(pair) else row
    lost = next((r for r in (pair.after, pair.before) if r.status != Status.OK), None)
    if session is not None and lost is not None:  # candidates of one bench: none of them was there before
        return replace(row, verdict="no result", reason=f"{lost.status.value}: {lost.reason}".rstrip(": "))
    relative = pair.after.relative
    is_beside = session is not None and relative is not None and naming.base_of(pair.after, session.runs) is pair.before
    if not is_beside or relative is None:
        return row
    low, high = 1 / relative.ci95_high - 1, 1 / relative.ci95_low - 1
    if not all(map(math.isfinite, (low, high))):
        return row
    reason = "; ".join(t for t in (f"{relative.num_pairs} interleaved pairs", relative.reason) if t)
    return replace(row, change=1 / relative.ratio - 1, change_low=low, change_high=high, verdict=relative.verdict, reason=reason)


def _differ(pair: Pair) -> bool:
    return bool(diff.differences(pair.before, pair.after))


def _labels(pair: Pair) -> tuple[str, str]:
    """What tells the two apart; `before` and `after` where nothing does."""
    if not _differ(pair):
        return "before", "after"
    name = naming.labels([pair.before, pair.after])
    mine, other = name(pair.before), name(pair.after)
    return (mine, other) if mine != other else ("before", "after")


def _common(pair: Pair) -> str:
    """Their label, without what differs."""
    if not _differ(pair):
        return diff.label(pair.before)
    same = set(diff.label(pair.after).split(" · "))
    return " · ".join(part for part in diff.label(pair.before).split(" · ") if part in same)
