"""Sweep -> SVG: latency and samples a second over batch, a line a device and candidate, with the batch where one overtakes the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from gpuopt.core.result import Report
from gpuopt.core.sweep import Curve, Point, Sweep
from gpuopt.reports import figures as f
from gpuopt.reports.content.devices import name
from gpuopt.reports.figures import clean
from gpuopt.reports.plots import TONES

WIDTH, HEIGHT, TOP, FOOT, LEFT, GAP, KEY = 1080, 360, 34, 56, 78, 90, 22
COLOURS = ("memory", "compute", "copy", "gap", "other", "avoidable")
"""Of the devices, in their order."""
DASHES = ("", "7 4", "2 4", "9 3 2 3")
"""Of the candidates on one device, in theirs."""


def svg(report: Report) -> str:
    """Two panels on logarithmic axes; "" where no curve has a point."""
    sweep = report.sweep
    if sweep is None or not any(curve.points for curve in sweep.curves):
        return ""
    drawn = [curve for curve in sweep.curves if curve.points]
    wide = (WIDTH - 2 * LEFT - GAP) / 2
    parts = [
        *_panel(report, sweep, drawn, LEFT, wide, "a call", lambda p: p.latency_ms, f.ms),
        *_panel(report, sweep, drawn, LEFT + wide + LEFT + GAP / 2, wide - GAP / 2, "samples a second", lambda p: p.samples_per_s, f.rate),
        *_key(report, drawn),
    ]
    height = HEIGHT + KEY * math.ceil(len(drawn) / 3)
    return (
        f'<svg class="devices" viewBox="0 0 {WIDTH} {height}" width="100%" role="img" '
        f'aria-label="Time of a call and samples a second over batch, logarithmic">{"".join(parts)}</svg>'
    )


def _panel(
    report: Report,
    sweep: Sweep,
    curves: Sequence[Curve],
    left: float,
    wide: float,
    title: str,
    value: Callable[[Point], float],
    text: Callable[[float], str],
) -> Iterator[str]:
    batches = sorted({p.batch for c in curves for p in c.points})
    values = [v for c in curves for p in c.points if (v := value(p)) > 0]
    if not values:
        return
    low, high = math.log2(batches[0]), math.log2(batches[-1])
    bottom, top = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08

    def x(batch: float) -> float:
        return left + wide * ((math.log2(batch) - low) / (high - low) if high > low else 0.5)

    def y(v: float) -> float:
        return HEIGHT - FOOT - (math.log10(v) - bottom) / (top - bottom) * (HEIGHT - TOP - FOOT)

    yield f'<text class="heading" x="{left:.0f}" y="16">{escape(title)}</text>'
    for tick in _ticks(bottom, top):
        yield f'<line class="grid" x1="{left:.1f}" y1="{y(tick):.1f}" x2="{left + wide:.1f}" y2="{y(tick):.1f}"/>'
        yield f'<text x="{left - 8:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(text(tick))}</text>'
    step = max(1, math.ceil(len(batches) / 9))
    for batch in batches[::step]:
        yield f'<text x="{x(batch):.1f}" y="{HEIGHT - FOOT + 18:.1f}" text-anchor="middle">{batch}</text>'
    yield f'<text x="{left + wide / 2:.1f}" y="{HEIGHT - FOOT + 38:.1f}" text-anchor="middle">batch</text>'
    for batch, told in _marks(report, sweep):
        yield f'<line class="roof spec" x1="{x(batch):.1f}" y1="{TOP}" x2="{x(batch):.1f}" y2="{HEIGHT - FOOT}"><title>{escape(told)}</title></line>'
        end = x(batch) > left + wide * 0.6
        yield f'<text class="name" x="{x(batch) + (-6 if end else 6):.1f}" y="{TOP + 2}" text-anchor="{"end" if end else "start"}">from {batch}</text>'
    for curve in curves:
        colour, dash = _style(report, curve, curves)
        places = [(x(p.batch), y(value(p)), p) for p in curve.points if value(p) > 0]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"{_dashed(dash)}/>'
        for px, py, point in places:
            told = f"{name(report, curve.device)}, {clean(curve.what, 60)}, batch {point.batch}: {text(value(point))}"
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"><title>{escape(told)}</title></circle>'


def _marks(report: Report, sweep: Sweep) -> list[tuple[int, str]]:
    """Where one device overtakes another; each batch once."""
    found: dict[int, str] = {}
    for row in sweep.crossovers:
        if row.from_batch is not None:
            how = ", interpolated" if row.interpolated else ""
            found.setdefault(
                row.from_batch, f"{name(report, row.winner or '')} wins from batch {row.from_batch} on{how} ({clean(row.what)})"
            )
    return sorted(found.items())


def _key(report: Report, curves: Sequence[Curve]) -> Iterator[str]:
    for index, curve in enumerate(curves):
        px, py = LEFT + (index % 3) * 330, HEIGHT + KEY * (index // 3)
        colour, dash = _style(report, curve, curves)
        yield f'<line x1="{px}" y1="{py - 4}" x2="{px + 28}" y2="{py - 4}" stroke="{colour}" stroke-width="2.2"{_dashed(dash)}/>'
        yield f'<text x="{px + 36}" y="{py}">{escape(f"{name(report, curve.device)}, {clean(curve.what, 36)}")}</text>'


def _style(report: Report, curve: Curve, curves: Sequence[Curve]) -> tuple[str, str]:
    ids = [device.id for device in report.devices]
    whats = list(dict.fromkeys(other.what for other in curves))
    index = ids.index(curve.device) if curve.device in ids else 0
    return TONES[COLOURS[index % len(COLOURS)]], DASHES[whats.index(curve.what) % len(DASHES)]


def _dashed(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten; powers alone where that would be many."""
    found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5) if low <= math.log10(m) + e <= high]
    powers = [v for v in found if f"{v:.0e}"[0] == "1"]
    return powers if len(found) > 8 and len(powers) > 1 else found
