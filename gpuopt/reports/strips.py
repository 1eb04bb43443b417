"""Report -> bars in percent of a common scale: waterfalls side by side, samples with their error bars, gains of findings. Pure.

Percentages rather than pixels: a page draws them at any width, on paper and without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gpuopt.core.result import Finding, Report, Run, Waterfall, WaterfallPart
from gpuopt.reports import figures as f
from gpuopt.reports.changes import Delta
from gpuopt.reports.content import changes, naming
from gpuopt.reports.content.breakdown import part_tone
from gpuopt.reports.figures import clean

MAX_DOTS = 160
"""Samples drawn of a run, evenly through it; the figures beside it are of all."""
WIDEST = 0.5
"""Samples further from their median than this, relative, are drawn at the edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A bar, 0..100."""

    left: str
    width: str
    tone: str = ""
    told: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of the waterfall, in every run that was profiled."""

    name: str
    tone: str
    detail: str
    cells: tuple[tuple[Span, str, str], ...]
    """One a run: (bar, time, share of its wall time)."""
    change: str = ""
    """Second run against the first, where there are two."""
    change_tone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The whole of one run's wall time."""

    label: str
    wall: str
    spans: tuple[Span, ...]
    floors: tuple[Span, ...]
    """Least times the device allows: places without width."""
    traced: bool = False
    """The wall time is that of a trace from elsewhere: nobody timed it without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Falls:
    """Waterfalls on one scale of milliseconds."""

    stacks: tuple[Stack, ...]
    """One a run."""
    parts: tuple[Part, ...]
    empty: tuple[str, ...]
    """Parts that took no time in any run."""


def falls(report: Report) -> Falls | None:
    """All waterfalls of a report, part by part; None where it has none."""
    runs, label = _fallen(report)
    if not runs:
        return None
    whole = max(max(_wall(run), sum(max(0.0, p.ms) for p in _fall(run).parts)) for run in runs) or 1.0
    names = list(dict.fromkeys(part.name for run in runs for part in _fall(run).parts))
    empty = [
        n for n in names if n != "unaccounted" and not any(p.name == n and abs(p.ms) >= 1e-6 for run in runs for p in _fall(run).parts)
    ]
    return Falls(
        stacks=tuple(
            Stack(
                label=label(run),
                wall=f.ms(_wall(run)),
                spans=tuple(_stack(run, whole)),
                floors=tuple(_floors(run, whole)),
                traced=run.backend == "trace",
            )
            for run in runs
        ),
        parts=tuple(_part(name, runs, whole) for name in names if name not in empty),
        empty=tuple(clean(name) for name in empty),
    )


def _fallen(report: Report) -> tuple[list[Run], Callable[[Run], str]]:
    """Runs with a waterfall and what tells them apart; of a report that compares one pair, the two sides of it."""
    found = changes.of_report(report)
    if len(found) != 1:
        return [run for run in report.runs if run.waterfall is not None and run.waterfall.parts], naming.labels(report.runs)
    pair = found[0]

    def side(name: str, wall_ms: float, ms: Callable[[Delta], float | None]) -> Run:
        parts = tuple(WaterfallPart(name=row.name, ms=value) for row in pair.waterfall if (value := ms(row)) is not None)
        fall = Waterfall(wall_ms=wall_ms, parts=parts, unaccounted_ms=sum(part.ms for part in parts if part.name == "unaccounted"))
        return Run(model=name, backend="", waterfall=fall)

    runs = [side(pair.before, pair.before_ms, lambda row: row.before_ms), side(pair.after, pair.after_ms, lambda row: row.after_ms)]
    return runs, lambda run: clean(run.model, 60)


def _floors(run: Run, whole: float) -> Iterable[Span]:
    if run.bounds is None:
        return
    for what, ms in (("fused", run.bounds.fused_ms), ("op by op", run.bounds.unfused_ms)):
        if ms is not None and 0 < ms <= whole:
            yield Span(left=percent(ms / whole), width="0%", told=f"{f.ms(ms)}: least in {clean(run.bounds.precision, 12)}, {what}")


def tone_of(name: str) -> str:
    """The colour class of a part; what could be avoided stands out from what only takes long."""
    return "avoidable" if name.startswith("avoidable") else part_tone(name)


def _fall(run: Run) -> Waterfall:
    assert run.waterfall is not None
    return run.waterfall


def _wall(run: Run) -> float:
    return max(0.0, _fall(run).wall_ms)


def _stack(run: Run, whole: float) -> Iterable[Span]:
    start = 0.0
    for part in _fall(run).parts:
        ms = max(0.0, part.ms)
        if ms > 0:
            share = f", {f.share(ms / _wall(run))}" if _wall(run) > 0 else ""
            yield Span(
                left=percent(start / whole),
                width=percent(ms / whole),
                tone=tone_of(part.name),
                told=f"{clean(part.name)}: {f.ms(ms)}{share}",
            )
        start += ms


def _part(name: str, runs: Sequence[Run], whole: float) -> Part:
    cells, times, details = [], [], []
    for run in runs:
        start, ms = 0.0, None
        for part in _fall(run).parts:
            if part.name == name:
                ms = part.ms if abs(part.ms) >= 1e-6 else 0.0  # a sum's rounding is no nanosecond
                details.append(clean(part.detail))
                break
            start += max(0.0, part.ms)
        times.append(ms)
        width = max(0.0, ms or 0.0)
        wall = _wall(run)
        share = f.MISSING if ms is None or wall <= 0 else f.share(ms / wall)
        cells.append((Span(left=percent(start / whole), width=percent(width / whole), tone=tone_of(name)), f.ms(ms), share))
    change, tone = "", ""
    if len(runs) == 2 and times[0] is not None and times[1] is not None:
        difference = times[1] - times[0]
        change = "0" if abs(difference) < 5e-4 else ("+" if difference > 0 else "−") + f.ms(abs(difference))
        tone = "" if change == "0" else "bad" if difference > 0 else "good"
    detail = next((d for d in details if d), "") if len(runs) == 1 else ""
    return Part(name=clean(name), tone=tone_of(name), detail=detail, cells=tuple(cells), change=change, change_tone=tone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One timed run: how long against the others, and how much its samples scatter around their own median."""

    label: str
    bar: Span
    """Median, from zero to the slowest of the report."""
    median_text: str
    dots: tuple[str, ...]
    interval: Span | None
    """95% interval of the median."""
    p95: str | None
    told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """All timed runs; their scatter on one scale of percent."""

    rows: tuple[Strip, ...]
    middle: str
    """Where the median lies on the scale of scatter."""
    ticks: tuple[tuple[str, str], ...]
    """(place, text)"""


def strips(report: Report) -> Strips | None:
    """Samples, median, 95% interval and p95 of each timed run; None where nothing was timed."""
    runs = [run for run in report.runs if run.latency_ms is not None and run.latency_ms.median > 0]
    if not runs:
        return None
    name = naming.labels(report.runs)
    away = [v / _median(run) - 1 for run in runs for v in (*_dots(run), *_ends(run))]
    low, high = max(-WIDEST, min(away, default=0.0)), min(WIDEST, max(away, default=0.0))
    room = 0.08 * (high - low) or 0.01
    start, end = low - room, high + room

    def place(share: float) -> str:
        return percent((max(low, min(high, share)) - start) / (end - start))

    slowest = max(_median(run) for run in runs)
    rows = tuple(_strip(run, name(run), slowest, place) for run in runs)
    return Strips(rows=rows, middle=place(0.0), ticks=tuple((place(v), _signed(v)) for v in _ticks(start, end) if low <= v <= high))


def _median(run: Run) -> float:
    assert run.latency_ms is not None
    return run.latency_ms.median


def _dots(run: Run) -> list[float]:
    samples = run.samples_ns
    step = max(1, math.ceil(len(samples) / MAX_DOTS))
    return [ns / 1e6 for ns in samples[::step]]


def _ends(run: Run) -> list[float]:
    stats = run.latency_ms
    assert stats is not None
    return [v for v in (stats.ci95_low, stats.ci95_high, stats.p95) if v is not None]


def _strip(run: Run, label: str, slowest: float, place: Callable[[float], str]) -> Strip:
    stats = run.latency_ms
    assert stats is not None
    told = f"median {f.ms(stats.median)}"
    interval = None
    if stats.ci95_low is not None and stats.ci95_high is not None:
        told += f", 95% interval {f.ms(stats.ci95_low)} to {f.ms(stats.ci95_high)}"
        left, right = place(stats.ci95_low / stats.median - 1), place(stats.ci95_high / stats.median - 1)
        interval = Span(left=left, width=f"{max(0.0, float(right[:-1]) - float(left[:-1])):.2f}%")
    if stats.p95 is not None:
        told += f", p95 {f.ms(stats.p95)}"
    told += f"; {f.plural(stats.num_samples, 'sample')}"
    return Strip(
        label=label,
        bar=Span(left="0%", width=percent(stats.median / slowest)),
        median_text=f.ms(stats.median),
        dots=tuple(dict.fromkeys(place(ms / stats.median - 1) for ms in _dots(run))),
        interval=interval,
        p95=place(stats.p95 / stats.median - 1) if stats.p95 is not None else None,
        told=told,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round values, zero among them where it lies between."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 6)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _signed(share: float) -> str:
    return "median" if share == 0 else f"{share * 100:+.3g}%".replace("-", "−")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A finding with its price."""

    severity: str
    code: str
    rule: str
    message: str
    fix: str
    where: str
    predicted: Span | None
    predicted_text: str
    measured: str | None
    measured_text: str
    confirmed: bool | None
    is_safe: bool


_SEVERITIES = {"error": 0, "warning": 1, "info": 2}


def findings(report: Report) -> tuple[Told, ...]:
    """Errors first, then by the middle of the predicted gain; bars on the scale of the largest."""
    shown = [x for x in report.findings if x.code != "guessed-inputs"]  # the headline says it
    ordered = sorted(shown, key=lambda x: (x.severity != "error", -_middle(x), _SEVERITIES.get(x.severity, 3)))
    tops = [v for x in ordered for v in (x.gain_high_ms, x.measured_gain_ms) if v is not None and v > 0]
    whole = max(tops, default=1.0) * 1.04
    wall = next((run.latency_ms.median for run in report.runs if run.latency_ms is not None), None)
    return tuple(_told(x, whole, wall) for x in ordered)


def _middle(x: Finding) -> float:
    return ((x.gain_low_ms or 0.0) + (x.gain_high_ms or 0.0)) / 2


def _told(x: Finding, whole: float, wall: float | None) -> Told:
    predicted, text = None, ""
    if x.gain_low_ms is not None and x.gain_high_ms is not None:
        low, high = sorted((max(0.0, x.gain_low_ms), max(0.0, x.gain_high_ms)))
        predicted = Span(left=percent(low / whole), width=percent((high - low) / whole))
        text = f.ms(low) if f.ms(low) == f.ms(high) else f"{f.ms(low)} to {f.ms(high)}"
        if wall:
            text += f", {f.share(low / wall)} to {f.share(high / wall)} of a call"
    counts = [f"{x.count} a call"] if x.count is not None and x.count > 1 else []
    where = [clean(x.module, 120) if x.module else "", clean(x.op, 80) if x.op else "", clean(x.line, 160) if x.line else "", *counts]
    measured = x.measured_gain_ms
    return Told(
        severity=x.severity if x.severity in _SEVERITIES else "info",
        code=clean(x.code, 24),
        rule=clean(x.rule, 60),
        message=clean(x.message, 1000),
        fix=clean(x.fix, 600),
        where=" · ".join(part for part in where if part),
        predicted=predicted,
        predicted_text=text,
        measured=percent(max(0.0, measured) / whole) if measured is not None else None,
        measured_text="" if measured is None else ("−" if measured < 0 else "") + f.ms(abs(measured)),
        confirmed=x.confirmed,
        is_safe=x.safe,
    )


def percent(share: float) -> str:
    """0..1 -> `12.34%`, kept within the scale."""
    return f"{max(0.0, min(1.0, share)) * 100:.2f}%"
