"""Roofline -> inline SVG: ops as points on logarithmic axes, under the ceilings of the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from gpuopt.core.result import CEILING_OF_DTYPE, Ceiling, RooflinePoint
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Roofline

TONES = {
    "compute": "#2f9e44",
    "memory": "#3987e5",
    "copy": "#ae3ec9",
    "gap": "#e8a317",
    "other": "#15aabf",
    "unknown": "#98a2ad",
}
"""Colour of a class of time, wherever it is drawn."""

WIDTH, HEIGHT = 1080, 460
LEFT, RIGHT, TOP, BOTTOM = 86, 210, 18, 46
MAX_LABELS = 6


def roofline(block: Roofline) -> str:
    """An <svg> with a title on each point; a sentence where nothing can be placed."""
    placed = [(p, p.intensity, p.flops / p.time_ns * 1e9) for p in block.points if p.intensity and p.flops and p.time_ns]
    if not placed or block.bandwidth is None:
        return '<p class="note">no op has a time, a FLOP count and a byte count, so there is nothing to draw</p>'
    roofs = [row for row in block.compute if row.value > 0]
    xs = [x for _, x, _ in placed] + [row.value / block.bandwidth.value for row in roofs]
    ys = [y for _, _, y in placed] + [row.value for row in roofs]
    axes = _Axes(_decades(xs, 0.7), _decades(ys, 0.35))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="Roofline: FLOP/s over FLOPs a byte, logarithmic">',
        *axes.grid(),
        *_roofs(axes, roofs, block.bandwidth),
        *_points(axes, placed),
        "</svg>",
        _key(placed, block.bandwidth, roofs),
    ]
    return "".join(parts)


class _Axes:
    """Where a figure lies on the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.low_x, self.high_x = x
        self.low_y, self.high_y = y

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.low_x) / (self.high_x - self.low_x)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (math.log10(value) - self.low_y) / (self.high_y - self.low_y)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        """A line for each power of ten, and the names of the axes."""
        parts = []
        for power in range(math.ceil(self.low_x), math.floor(self.high_x) + 1):
            x = self.x(10.0**power)
            parts.append(f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_power(power)}</text>')
        for power in range(math.ceil(self.low_y), math.floor(self.high_y) + 1):
            y = self.y(10.0**power)
            parts.append(f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(f.si(10.0**power, "FLOP/s").replace(".00", "").replace(".0 ", " "))}</text>'
            )
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">FLOPs a byte</text>')
        return parts


def _decades(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Logarithms of both ends, with a margin."""
    logs = [math.log10(v) for v in values if v > 0]
    return min(logs) - margin, max(logs) + margin


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 4 else f"1e{power}"


def _roofs(axes: _Axes, roofs: Sequence[Ceiling], bandwidth: Ceiling) -> list[str]:
    """The memory slope up to the highest compute ceiling, and each compute ceiling from the slope on."""
    parts = []
    left, right = 10.0**axes.low_x, 10.0**axes.high_x
    top = max((row.value for row in roofs), default=10.0**axes.high_y)
    start = max(left, 10.0**axes.low_y / bandwidth.value)
    knee = min(right, top / bandwidth.value)
    if start < knee:
        x1, y1, x2, y2 = axes.x(start), axes.y(start * bandwidth.value), axes.x(knee), axes.y(knee * bandwidth.value)
        parts.append(
            f'<line class="roof" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"><title>{_title(bandwidth)}</title></line>'
        )
        angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
        at_x, at_y = x1 + (x2 - x1) * 0.3, y1 + (y2 - y1) * 0.3 - 8
        parts.append(
            f'<text class="name" x="{at_x:.1f}" y="{at_y:.1f}" transform="rotate({angle:.2f} {at_x:.1f} {at_y:.1f})">'
            f"{escape(bandwidth.quantity)} {escape(f.ceiling(bandwidth.value, bandwidth.unit))}, {escape(_kind(bandwidth))}</text>"
        )
    names = []
    for row in sorted(roofs, key=lambda r: -r.value):
        y, x1 = axes.y(row.value), axes.x(max(left, min(right, row.value / bandwidth.value)))
        kind = " spec" if row.kind == "spec" else ""
        parts.append(
            f'<line class="roof{kind}" x1="{x1:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"><title>{_title(row)}</title></line>'
        )
        names.append((y, f"{f.clean(row.quantity)} {f.ceiling(row.value, row.unit)}, {_kind(row)}"))
    for y, text in _spread(names, 15.0):
        parts.append(f'<text class="name" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{escape(text)}</text>')
    return parts


def _spread(names: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Heights at least `gap` apart, in order, as near to where they belong as going down the list allows."""
    placed: list[tuple[float, str]] = []
    for y, text in sorted(names):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, text))
    return placed


def _kind(row: Ceiling) -> str:
    return "data sheet" if row.kind == "spec" else f.clean(row.kind)


def _title(row: Ceiling) -> str:
    return escape(f"{f.clean(row.quantity)} {f.ceiling(row.value, row.unit)}, {row.kind}: {f.clean(row.source)}")


def _points(axes: _Axes, placed: Sequence[tuple[RooflinePoint, float, float]]) -> list[str]:
    """Area is share of time; the largest few carry their name."""
    total = sum(p.time_ns or 0.0 for p, _, _ in placed)
    parts = []
    labels: list[tuple[float, float, str]] = []
    for index, (point, intensity, speed) in enumerate(sorted(placed, key=lambda item: -(item[0].time_ns or 0.0))):
        share = (point.time_ns or 0.0) / total
        x, y, radius = axes.x(intensity), axes.y(speed), max(4.0, 26.0 * math.sqrt(share))
        tone = point.bound if point.bound in ("compute", "memory") else "unknown"
        told = (
            f"{f.clean(point.name, 80)} in {f.clean(point.module, 80) or '(root)'}: {f.ns(point.time_ns)}, {f.si(speed, 'FLOP/s')} at {f.rate(intensity)} FLOP/B, "
            f"{f.percent(point.pct_of_ceiling)} of {f.clean(point.ceiling) or 'an unknown ceiling'}"
            + (f"; {f.clean(point.note)}" if point.note else "")
        )
        parts.append(
            f'<circle class="t-{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill-opacity="0.8"><title>{escape(told)}</title></circle>'
        )
        if index < MAX_LABELS and all(abs(y - other_y) > 14 or abs(x - other_x) > 170 for other_x, other_y, _ in labels):
            labels.append((x, y, f.clean(point.name, 32)))
            end = x > WIDTH - RIGHT - 160
            at = x - radius - 5 if end else x + radius + 5
            parts.append(
                f'<text class="name" x="{at:.1f}" y="{y + 4:.1f}" text-anchor="{"end" if end else "start"}">{escape(f.clean(point.name, 32))}</text>'
            )
    return parts


def _key(placed: Sequence[tuple[RooflinePoint, float, float]], bandwidth: Ceiling, roofs: Sequence[Ceiling]) -> str:
    bounds = [
        b
        for b in ("compute", "memory", "unknown")
        if any((p.bound if p.bound in ("compute", "memory") else "unknown") == b for p, _, _ in placed)
    ]
    items = [f'<span><i class="t-{b}"></i>{b}-bound</span>' for b in bounds] + ["<span>area: share of time</span>"]
    sources = dict.fromkeys(f"{CEILING_OF_DTYPE.get(row.quantity, row.quantity)} {_kind(row)}: {row.source}" for row in (bandwidth, *roofs))
    return f'<p class="key">{"".join(items)}</p><p class="note">{escape("; ".join(f.clean(s) for s in sources))}</p>'
