"""Report × Report -> a verdict for each run both have. Pure, but for reading a baseline's file.

Two reports were taken apart in time, where clocks, heat and neighbours move a median by more than its own interval says. A change is `slower` when it is
beyond the threshold by more than that can explain, `inconclusive` when it might be, and never guessed where the figures cannot be compared: another device,
another clock, too few samples. Runs interleaved in one `gpuopt bench` give narrower answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import Device, Finding, GateResult, Report, Run, Stats, Status
from gpuopt.core.spec import Gates
from gpuopt.core.stats import slowdown_vs_baseline

DEFAULT_THRESHOLD = 0.05
"""Relative slowdown that matters, where nobody says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run before and after."""

    run: str
    """What the two have in common, as text."""
    verdict: str
    """`faster`, `slower`, `same`, `inconclusive`, `broken` (it used to work), `fixed` (it did not), or `new` (only after)."""
    reason: str = ""
    before_ms: float | None = None
    after_ms: float | None = None
    """Medians."""
    change: float | None = None
    """after / before - 1: above zero is slower."""
    change_low: float | None = None
    change_high: float | None = None
    """95% interval of `change`, from the intervals of the two medians."""


Key = tuple[object, ...]


def key(run: Run) -> Key:
    """What makes two runs the same question: model, backend, preset, precision, changes, shapes and where the inputs are."""
    dims = run.dims or ({"N": run.batch} if run.batch is not None else {})
    return (run.model, run.backend, run.preset, run.precision, run.transforms, tuple(sorted(dims.items())), run.input_mode)


def label(run: Run) -> str:
    """The same, to read."""
    dims = run.dims or ({"N": run.batch} if run.batch is not None else {})
    parts = [run.model, run.backend + (f":{run.preset}" if run.preset else ""), run.precision or ""]
    parts += [*run.transforms, " ".join(f"{k}={v}" for k, v in dims.items())]
    parts += [f"{run.input_mode} inputs"] if run.input_mode != "device" else []
    return " · ".join(part for part in parts if part)


def compare(before: Report, after: Report, *, threshold: float = DEFAULT_THRESHOLD) -> tuple[Comparison, ...]:
    """One Comparison for each run of either report, in the order of `before`, then what is new. `threshold` is relative: 0.05 is 5%."""
    old, new = _by_key(before), _by_key(after)
    rows: list[Comparison] = []
    for name, runs in old.items():
        others = new.get(name, [])
        if len(runs) > 1 or len(others) > 1:
            rows.append(
                Comparison(
                    run=label(runs[0]),
                    verdict="inconclusive",
                    reason="a report holds several runs of this name, of other options or inputs: --run chooses one",
                )
            )
        elif not others:
            reason = f"not in the second report{_nearest(runs[0], after.runs)}"
            rows.append(Comparison(run=label(runs[0]), verdict="inconclusive", reason=reason, before_ms=_median(runs[0])))
        else:
            doubt = other_device(before.device_of(runs[0]), after.device_of(others[0]))
            rows.append(judge(runs[0], others[0], doubt, threshold))
    rows += [
        Comparison(
            run=label(runs[0]), verdict="new", after_ms=_median(runs[0]), reason=f"not in the first report{_nearest(runs[0], before.runs)}"
        )
        for name, runs in new.items()
        if name not in old
    ]
    return tuple(rows)


def _nearest(run: Run, others: Sequence[Run]) -> str:
    """`; the nearest there has fp32 for fp16`: what to look at when a run was expected and is missing."""
    if not others:
        return ", which has no runs"
    best = min(others, key=lambda other: len(differences(other, run)))
    return "; the nearest there has " + ", ".join(f"{old or 'none'} for {new or 'none'}" for _, old, new in differences(best, run))


def differences(before: Run, after: Run) -> list[tuple[str, str, str]]:
    """(what, before, after) of all that makes two runs different questions."""
    asked = ("model", "backend", "precision", "changes", "sizes", "inputs")
    return [(what, old, new) for what, old, new in zip(asked, _question(before), _question(after), strict=True) if old != new]


def _question(run: Run) -> tuple[str, ...]:
    dims = run.dims or ({"N": run.batch} if run.batch is not None else {})
    return (
        run.model,
        run.backend + (f":{run.preset}" if run.preset else ""),
        run.precision or "",
        ", ".join(run.transforms),
        " ".join(f"{k}={v}" for k, v in sorted(dims.items())),
        f"inputs on the {run.input_mode}",
    )


def gates(
    comparisons: Sequence[Comparison], *, threshold: float = DEFAULT_THRESHOLD, allow_inconclusive: bool = False
) -> tuple[GateResult, ...]:
    """The verdicts as gates: slower and broken miss; inconclusive misses unless allowed; a comparison of nothing misses."""
    judged = [row for row in comparisons if row.verdict != "new"]
    limit = f"at most {threshold * 100:.3g}% slower"
    if not judged:
        hint = next((f": {row.run} is {row.reason}" for row in comparisons), "")
        return (GateResult(name="max-slowdown", passed=allow_inconclusive, figure=f"nothing to compare{hint}", limit=limit),)
    return tuple(
        GateResult(
            name="max-slowdown",
            passed=row.verdict not in ("slower", "broken") and (row.verdict != "inconclusive" or allow_inconclusive),
            figure=(f"{row.change * 100:+.1f}%, {row.verdict}" if row.change is not None else row.verdict)
            + (f": {row.reason}" if row.reason else ""),
            limit=limit,
            run=row.run,
        )
        for row in judged
    )


def environment_findings(before: Report, after: Report) -> tuple[Finding, ...]:
    """Versions and flags that moved between the two: not a verdict, often its reason."""
    return tuple(
        Finding(code="GPO600", severity="info", message=f"{what} changed: {old} -> {new}")
        for what, old, new in _environment_changes(before, after)
    )


def against_baseline(found: Report, limits: Gates) -> Report:
    """A fresh report, with the gates and the table that `--baseline` asks for; the same report where it does not. Raises BadInput."""
    if limits.baseline is None:
        return found
    threshold = DEFAULT_THRESHOLD if limits.max_slowdown is None else limits.max_slowdown
    rows = compare(codec.read_json(Report, Path(limits.baseline)), found, threshold=threshold)
    judged = gates(rows, threshold=threshold, allow_inconclusive=limits.allow_inconclusive)
    return replace(found, gates=(*found.gates, *judged), tables={**found.tables, "compare": [plain(row) for row in rows]})


def plain(row: Comparison) -> dict[str, object]:
    """As a table of a report holds it."""
    return {
        name: getattr(row, name) for name in ("run", "verdict", "reason", "before_ms", "after_ms", "change", "change_low", "change_high")
    }


def _by_key(report: Report) -> dict[Key, list[Run]]:
    """Of a report about several devices, the kind of device is part of the question."""
    found: dict[Key, list[Run]] = {}
    for run in report.runs:
        device = report.device_of(run) if report.devices else None
        found.setdefault((*key(run), device.kind if device else ""), []).append(run)
    return found


def _median(run: Run) -> float | None:
    return run.latency_ms.median if run.latency_ms else None


def judge(before: Run, after: Run, doubt: str, threshold: float) -> Comparison:
    """Two runs -> a verdict. `doubt`: why figures of the two devices say nothing about each other, or "".

    Runs that ask different things (another backend, another precision) are judged too, and the reason says what differs; those of other sizes are not.
    """
    others = differences(before, after)
    told = ", ".join(f"{what} {old or 'none'} -> {new or 'none'}" for what, old, new in others)
    row = Comparison(run=label(before), verdict="inconclusive", before_ms=_median(before), after_ms=_median(after), reason=told)
    if before.status == Status.OK and after.status != Status.OK:
        return replace(row, verdict="broken", reason=f"{after.status.value}: {after.reason}".rstrip(": "))
    if before.status != Status.OK:
        if after.status == Status.OK:
            return replace(row, verdict="fixed", reason=f"was {before.status.value}")
        return replace(row, reason=f"{before.status.value} before, {after.status.value} after")
    if doubt:
        return replace(row, reason=doubt)
    if any(what == "sizes" for what, _, _ in others):
        return replace(row, reason=f"not the same work: {told}")
    if before.latency_ms is None or after.latency_ms is None:
        return replace(row, reason="a latency is missing")
    if before.clock != after.clock:
        return replace(row, reason=f"timed by other clocks: {before.clock or 'unknown'}, {after.clock or 'unknown'}")
    if before.options != after.options and before.backend == after.backend:
        return replace(row, reason="the backend's options differ")
    found = _judge(row, before.latency_ms, after.latency_ms, threshold)
    return replace(found, reason="; ".join(part for part in (told, found.reason if found.reason != told else "") if part))


def _judge(row: Comparison, before: Stats, after: Stats, threshold: float) -> Comparison:
    """Medians and their intervals -> a verdict. What sessions apart do to a median is core.stats' to know; that an interval is too wide is judged here."""
    if before.median <= 0 or after.median <= 0:
        return replace(row, reason="a median is not above zero")
    centre = math.log(after.median / before.median)
    row = replace(row, change=math.expm1(centre))
    widths = [_half_width(before), _half_width(after)]
    if widths[0] is None or widths[1] is None:
        return replace(row, reason="too few samples for an interval")
    half = math.hypot(widths[0], widths[1])
    row = replace(row, change_low=math.expm1(centre - half), change_high=math.expm1(centre + half))
    found = slowdown_vs_baseline(before, after, max_slowdown=threshold)
    if found.verdict in ("slower", "inconclusive"):
        return replace(row, verdict=found.verdict, reason=found.reason)
    if math.expm1(centre + half) > threshold:
        return replace(
            row, reason=f"the interval reaches past {threshold * 100:.3g}%: measure longer (--min-time), or interleave both in one bench"
        )
    return replace(row, verdict=found.verdict)


def _half_width(stats: Stats) -> float | None:
    """Half the 95% interval of log(median); the wider side where it is lopsided."""
    if stats.ci95_low is None or stats.ci95_high is None or stats.ci95_low <= 0:
        return None
    return max(math.log(stats.ci95_high / stats.median), math.log(stats.median / stats.ci95_low), 0.0)


def other_device(before: Device | None, after: Device | None) -> str:
    """Why figures of these two devices say nothing about each other; empty where they do."""
    if before is None or after is None:
        return "a report does not name its device"
    for what, old, new in (
        ("device", before.name, after.name),
        ("kind of device", before.kind, after.kind),
        ("compute capability", before.capability, after.capability),
        ("number of SMs", before.num_sms, after.num_sms),
        ("number of cores", before.num_cores, after.num_cores),
        ("memory", before.memory_bytes, after.memory_bytes),
        ("power limit", before.power_limit_w, after.power_limit_w),
    ):
        if old != new:
            return f"other {what}: {old} before, {new} after"
    return ""


def _environment_changes(before: Report, after: Report) -> list[tuple[str, str, str]]:
    """Versions and flags that moved between the two: not a verdict, often its reason."""
    old: dict[str, str] = {**before.environment.packages, **before.environment.flags}
    new: dict[str, str] = {**after.environment.packages, **after.environment.flags}
    for name in ("gpuopt", "python", "platform", "cuda", "cudnn"):
        old[name], new[name] = str(getattr(before.environment, name)), str(getattr(after.environment, name))
    old["driver"] = str(before.device.driver if before.device else None)
    new["driver"] = str(after.device.driver if after.device else None)
    return [
        (name, old.get(name, "absent"), new.get(name, "absent"))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
