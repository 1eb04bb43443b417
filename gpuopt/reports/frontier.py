"""Budgets of a streamed model -> SVG: milliseconds a forward over bytes on the device, with the bound, everything resident and other libraries beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from gpuopt.core.result import Report
from gpuopt.core.streamed import StreamArm, StreamRow
from gpuopt.core.streaming import Plan
from gpuopt.reports import figures as f
from gpuopt.reports.figures import clean
from gpuopt.reports.plots import TONES
from gpuopt.reports.svg import STYLE

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT, LEADING = 820, 400, 78, 24, 34, 58, 20
HEAD = 62
"""Of a sheet that stands alone: its title."""
STREAMED, BOUND = "streamed", "the bound: max(compute, streamed bytes / link)"
COLOURS = ("memory", "avoidable", "copy", "gap", "other", "unknown")
"""Of others, in the order they come in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One way to run the model."""

    series: str
    num_bytes: int
    ms: float
    label: str
    """Of its point: `50%`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All of them, on one scale."""

    marks: tuple[Mark, ...]
    of_peaks: bool
    """Whether `num_bytes` is the device's memory at its peak, or the weights there."""
    per: str
    """`a token`, `a forward`."""

    @property
    def series(self) -> tuple[str, ...]:
        """Names, ours first."""
        return tuple(dict.fromkeys(mark.series for mark in self.marks))


def picture(reports: Sequence[Report]) -> Picture | None:
    """Reports of one workload as one picture; None where there are not two points to compare."""
    found: list[tuple[str, int | None, int, float, str]] = []
    bounds: list[tuple[int | None, int, float, str]] = []
    per = "a forward"
    for report in reports:
        told = report.streamed
        for row in told.rows if told is not None else ():
            if row.measured is None:
                continue
            plan = row.measured.plan
            per = "a token" if row.measured.workload.startswith("decode") else per
            found.append((STREAMED, row.measured.peak_device_bytes, held(plan), row.measured.median_ms, budget(plan)))
            bounds.append((row.measured.peak_device_bytes, held(plan), plan.bound_ms, budget(plan)))
        for arm in told.arms if told is not None else ():
            point = _point(arm, told.rows if told is not None else ())
            if point is not None and arm.median_ms is not None:
                found.append((clean(arm.name, 60), arm.peak_device_bytes, point[0], arm.median_ms, point[1]))
    if len(found) < 2:
        return None
    of_peaks = all(peak for _, peak, _, _, _ in found)
    marks = [Mark(series=name, num_bytes=(peak or 0) if of_peaks else size, ms=ms, label=text) for name, peak, size, ms, text in found]
    marks += [Mark(series=BOUND, num_bytes=(peak or 0) if of_peaks else size, ms=ms, label=text) for peak, size, ms, text in bounds]
    # What several reports measured is drawn as the first one has it.
    marks = list({(mark.series, mark.label): mark for mark in reversed(marks)}.values())[::-1]
    order = {STREAMED: 0, BOUND: 1}
    return Picture(
        marks=tuple(sorted(marks, key=lambda m: (order.get(m.series, 2), m.num_bytes) if m.series in order else (2, 0))),
        of_peaks=of_peaks,
        per=per,
    )


def _point(arm: StreamArm, rows: Sequence[StreamRow]) -> tuple[int, str] | None:
    """(bytes of weights on the device, label) of an arm; None where no row says."""
    plans = [row.planned for row in rows if row.planned is not None]
    if not plans:
        return None
    if arm.row is None:
        return plans[0].anatomy.weight_bytes, "all"
    plan = rows[arm.row].planned
    if plan is None:
        return None
    if arm.budgeted:
        return held(plan), budget(plan)
    largest = max((unit.num_bytes for unit in plan.anatomy.units), default=0)
    return sum(plan.anatomy.fixed.values()) + 2 * largest, "no budget"


def held(plan: Plan) -> int:
    """Bytes of weights on the device at once."""
    return plan.ledger.fixed + plan.ledger.residents + plan.ledger.slots


def budget(plan: Plan) -> str:
    """`50%`, `8.00 GiB`."""
    if plan.spec.budget_share is not None:
        return f"{100 * plan.spec.budget_share:g}%"
    return f.memory(plan.spec.budget_bytes)


def svg(report: Report) -> str:
    """For a page that has the report's other pictures; "" where there is nothing to compare."""
    found = picture([report]) if report.streamed is not None else None
    if found is None:
        return ""
    height = _height(found)
    return (
        f'<svg class="frontier" viewBox="0 0 {WIDTH} {height}" width="100%" role="img" '
        f'aria-label="{escape(_title(found))}">{"".join(_drawn(found))}</svg>'
    )


def sheet(reports: Sequence[Report], title: str) -> str:
    """An SVG file that stands alone, light and dark; "" where there is nothing to compare."""
    found = picture(reports)
    if found is None:
        return ""
    height = _height(found) + HEAD
    device = reports[0].device.name if reports[0].device is not None else "a device on paper"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
            f"<title>{escape(f'{title}: {_title(found)}')}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="sheet" width="{WIDTH}" height="{height}"/>',
            f'<text class="title" x="24" y="32">{escape(clean(title, 90))}</text>',
            f'<text x="24" y="52">{escape(clean(device, 60))}, medians; the vertical axis is logarithmic</text>',
            f'<g transform="translate(0 {HEAD})">',
            *_drawn(found),
            "</g>",
            "</svg>",
            "",
        ]
    )


def _title(found: Picture) -> str:
    return f"milliseconds {found.per} over bytes on the device, {len(found.series)} series"


def _height(found: Picture) -> int:
    return HEIGHT + LEADING * math.ceil(len(found.series) / 2)


def _drawn(found: Picture) -> Iterator[str]:
    most = max(mark.num_bytes for mark in found.marks) * 1.04
    low = math.log10(min(mark.ms for mark in found.marks)) - 0.08
    high = math.log10(max(mark.ms for mark in found.marks)) + 0.12

    def x(num_bytes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * num_bytes / most

    def y(ms: float) -> float:
        return HEIGHT - FOOT - (math.log10(ms) - low) / (high - low) * (HEIGHT - TOP - FOOT)

    yield f'<text class="heading" x="{LEFT}" y="18">{"a token" if found.per == "a token" else "a forward"}</text>'
    for tick in _powers(low, high):
        yield f'<line class="grid" x1="{LEFT}" y1="{y(tick):.1f}" x2="{WIDTH - RIGHT}" y2="{y(tick):.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(f.ms(tick))}</text>'
    step = _step(most)
    for number in range(int(most / step) + 1):
        yield f'<line class="grid" x1="{x(number * step):.1f}" y1="{HEIGHT - FOOT}" x2="{x(number * step):.1f}" y2="{HEIGHT - FOOT + 5}"/>'
        yield f'<text x="{x(number * step):.1f}" y="{HEIGHT - FOOT + 20}" text-anchor="middle">{escape(f.si(number * step, "B"))}</text>'
    axis = "memory of the device that is taken, at its peak" if found.of_peaks else "weights on the device at once"
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - FOOT + 42}" text-anchor="middle">{axis}</text>'
    for index, name in enumerate(found.series):
        colour, dash = _style(name, found.series)
        places = [mark for mark in found.marks if mark.series == name]
        if len(places) > 1:
            path = " ".join(f"{x(mark.num_bytes):.1f},{y(mark.ms):.1f}" for mark in places)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        for mark in places if name != BOUND else ():
            px, py = x(mark.num_bytes), y(mark.ms)
            told = f"{name}, {mark.label}: {f.ms(mark.ms)} {found.per}, {f.memory(mark.num_bytes)}"
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"><title>{escape(told)}</title></circle>'
            if name == STREAMED:
                yield f'<text class="name" x="{px:.1f}" y="{py - 10:.1f}" text-anchor="middle">{escape(mark.label)}</text>'
        kx, ky = LEFT + (index % 2) * (WIDTH - LEFT - RIGHT) / 2, HEIGHT + 4 + LEADING * (index // 2)
        yield f'<line x1="{kx:.0f}" y1="{ky - 4}" x2="{kx + 26:.0f}" y2="{ky - 4}" stroke="{colour}" stroke-width="2"{dash}/>'
        if name != BOUND:
            yield f'<circle cx="{kx + 13:.0f}" cy="{ky - 4}" r="5" fill="{colour}"/>'
        yield f'<text x="{kx + 34:.0f}" y="{ky}">{escape(name)}</text>'


def _style(name: str, series: Sequence[str]) -> tuple[str, str]:
    if name == STREAMED:
        return TONES["compute"], ""
    if name == BOUND:
        return TONES["unknown"], ' stroke-dasharray="6 4"'
    others = [one for one in series if one not in (STREAMED, BOUND)]
    return TONES[COLOURS[others.index(name) % len(COLOURS)]], ' stroke-dasharray="2 4"'


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten within."""
    return [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5) if low <= math.log10(m) + e <= high]


def _step(most: float) -> float:
    """1, 2 or 5 of a power of ten, so that there are at most seven."""
    power = 10.0 ** math.floor(math.log10(max(most, 1) / 7))
    return next(m * power for m in (1, 2, 5, 10) if most / (m * power) <= 7)
