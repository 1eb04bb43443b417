"""Roofline picture -> SVG elements: FLOP/s over intensity, and beside it the bandwidth of ops that only move data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from gpuopt.core.result import Ceiling, RooflinePoint
from gpuopt.reports import figures as f
from gpuopt.reports.roofline import Picture

TONES = {
    "compute": "#2f9e44",
    "memory": "#3987e5",
    "avoidable": "#e8590c",
    "copy": "#ae3ec9",
    "gap": "#e8a317",
    "other": "#15aabf",
    "unknown": "#98a2ad",
}
"""Colour of a class of time, wherever it is drawn."""

WIDTH, HEIGHT = 1080, 470
GAP, LEFT, RIGHT, TOP, BOTTOM = 84, 84, 216, 30, 50
SIDE = 250
"""Width of the panel of ops without FLOPs, where there are such."""
RADIUS = 17.0
"""Of the point with most time; area is time."""
MAX_LABELS = 6
MAX_POINTS = 2000
"""The largest by time are drawn; what is beyond would be dust under them."""


def roofline(picture: Picture) -> str:
    """<svg> with a title on each point; "" where nothing can be placed."""
    parts = [*_drawn(picture)]
    if not parts:
        return ""
    told = "FLOP/s over FLOPs a byte" + (", and bytes a second of ops without FLOPs" if picture.moving else "")
    return (
        f'<svg class="roofline" viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="Roofline: {told}, logarithmic">'
        + "".join(parts)
        + "</svg>"
    )


def _drawn(picture: Picture) -> Iterator[str]:
    computing, moving = _largest(picture.computing), _largest(picture.moving)
    roofs = picture.compute
    longest = max((p.time_ns or 0.0 for p in (*computing, *moving)), default=0.0)
    left = LEFT
    if moving:
        alone = not (computing or roofs)
        panel = _panel(
            left, WIDTH - RIGHT - left if alone else SIDE, [_bytes(p) for p in moving], [*map(_rate, moving), *_values(picture.bandwidth)]
        )
        yield from panel.axes("bytes moved", lambda v: f.si(v, "B"), lambda v: f.si(v, "B/s"), "ops without FLOPs: bytes a second")
        yield from _flat(panel, picture.bandwidth)
        yield from _points(panel, moving, _bytes, _rate, longest, labels=3, strokes=_strokes(panel, picture.bandwidth, ()))
        left += SIDE + GAP
        if alone:
            return
    if not computing and not roofs:
        return
    ridges = [row.value / slope.value for row in roofs for slope in picture.bandwidth]
    xs = [*map(_intensity, computing), *ridges] or [1.0, 1000.0]
    panel = _panel(left, WIDTH - RIGHT - left, xs, [*map(_speed, computing), *_values(roofs)])
    title = "ops with FLOPs: FLOP/s" if moving else "each run: FLOP/s" if picture.is_runs else "FLOP/s"
    yield from panel.axes("FLOPs a byte", _plain, lambda v: f.si(v, "FLOP/s"), title)
    yield from _roofs(panel, roofs, picture.bandwidth)
    strokes = _strokes(panel, roofs, picture.bandwidth)
    if picture.is_runs:  # a run's time is its height already
        yield from _points(panel, computing, _intensity, _speed, 0.0, labels=len(computing), strokes=strokes)
    else:
        yield from _points(panel, computing, _intensity, _speed, longest, labels=MAX_LABELS, strokes=strokes)


def _largest(points: Sequence[RooflinePoint]) -> list[RooflinePoint]:
    return sorted(points, key=lambda p: -(p.time_ns or 0.0))[:MAX_POINTS]


def _values(rows: Sequence[Ceiling]) -> list[float]:
    return [row.value for row in rows]


def _bytes(point: RooflinePoint) -> float:
    return point.bytes or 0.0


def _intensity(point: RooflinePoint) -> float:
    return (point.flops or 0.0) / (point.bytes or 1.0)


def _speed(point: RooflinePoint) -> float:
    return (point.flops or 0.0) / (point.time_ns or 1.0) * 1e9


def _rate(point: RooflinePoint) -> float:
    return (point.bytes or 0.0) / (point.time_ns or 1.0) * 1e9


def _panel(left: float, width: float, xs: Sequence[float], ys: Sequence[float]) -> _Panel:
    """Room for all of it, and a margin that leaves points off the frame."""
    return _Panel(left, width, *_span(xs, 0.35), *_span(ys, 0.3))


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    logs = [math.log10(v) for v in values if v > 0]
    return min(logs) - margin, max(logs) + margin


@dataclass(frozen=True, slots=True)
class _Panel:
    """Where a figure lies on the picture."""

    left: float
    width: float
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    @property
    def right(self) -> float:
        return self.left + self.width

    def x(self, value: float) -> float:
        return self.left + (math.log10(value) - self.low_x) / (self.high_x - self.low_x) * self.width

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)

    def axes(self, title: str, x_text: Callable[[float], str], y_text: Callable[[float], str], heading: str) -> Iterator[str]:
        """A line for each power of ten, and the names of the axes."""
        foot = HEIGHT - BOTTOM
        yield f'<text class="heading" x="{self.left:.0f}" y="14">{heading}</text>'
        for value in _ticks(self.low_x, self.high_x):
            x = self.x(value)
            yield f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{foot}"/>'
            yield f'<text x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{escape(_short(x_text(value)))}</text>'
        for value in _ticks(self.low_y, self.high_y):
            y = self.y(value)
            yield f'<line class="grid" x1="{self.left:.1f}" y1="{y:.1f}" x2="{self.right:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{self.left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(y_text(value)))}</text>'
        yield f'<text x="{self.left + self.width / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{title}</text>'


def _ticks(low: float, high: float) -> Iterator[float]:
    """Powers of ten, every third where there are many; with 2 and 5 where there are hardly any."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    step = max(1, math.ceil(len(powers) / 8))
    yield from (10.0**power for power in powers if power % step == 0)
    if len(powers) < 2:
        yield from (
            factor * 10.0**power
            for power in range(math.floor(low), math.ceil(high) + 1)
            for factor in (2.0, 5.0)
            if low <= math.log10(factor) + power <= high
        )


def _short(text: str) -> str:
    """`1.00 TB/s` -> `1 TB/s`."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".rstrip()


def _plain(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"1e{round(math.log10(value))}"


def _roofs(panel: _Panel, roofs: Sequence[Ceiling], slopes: Sequence[Ceiling]) -> Iterator[str]:
    """Each bandwidth as a slope up to the highest compute ceiling of its kind, each compute ceiling from there on."""
    low_x, high_x = 10.0**panel.low_x, 10.0**panel.high_x
    low_y, high_y = 10.0**panel.low_y, 10.0**panel.high_y
    for slope in slopes:
        tops = [row.value for row in roofs if row.kind == slope.kind] or [row.value for row in roofs] or [high_y]
        start, knee = max(low_x, low_y / slope.value), min(high_x, max(tops) / slope.value)
        if start < knee:
            x1, y1, x2, y2 = panel.x(start), panel.y(start * slope.value), panel.x(knee), panel.y(knee * slope.value)
            yield _line(slope, x1, y1, x2, y2)
            if slope is slopes[0]:
                angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
                at_x, at_y = x1 + (x2 - x1) * 0.25, y1 + (y2 - y1) * 0.25 - 8
                yield (
                    f'<text class="name" x="{at_x:.1f}" y="{at_y:.1f}" transform="rotate({angle:.2f} {at_x:.1f} {at_y:.1f})">'
                    f"{escape(ceiling_name(slope))}</text>"
                )
    names = []
    for row in roofs:
        slope_of_kind = next((s for s in slopes if s.kind == row.kind), slopes[0] if slopes else None)
        start = max(low_x, row.value / slope_of_kind.value) if slope_of_kind else low_x
        y = panel.y(row.value)
        yield _line(row, panel.x(min(start, high_x)), y, panel.right, y)
        names.append((y, ceiling_name(row)))
    yield from _names(panel, names)


def _strokes(panel: _Panel, roofs: Sequence[Ceiling], slopes: Sequence[Ceiling]) -> list[_Box]:
    """Where the lines run, as small boxes: names of points keep off them where they can."""
    boxes = []
    for slope in slopes:
        for step in range(60):
            intensity = 10.0 ** (panel.low_x + (panel.high_x - panel.low_x) * step / 60)
            if intensity * slope.value < max((row.value for row in roofs), default=math.inf):
                x, y = panel.x(intensity), panel.y(intensity * slope.value)
                boxes.append((x - 8, y - 8, x + 8, y + 8))
    low = slopes[0].value if slopes else math.inf
    for row in roofs:
        y = panel.y(row.value)
        boxes.append((panel.x(max(10.0**panel.low_x, row.value / low)), y - 3, panel.right, y + 3))
    return boxes


def _flat(panel: _Panel, rows: Sequence[Ceiling]) -> Iterator[str]:
    for row in rows:
        y = panel.y(row.value)
        yield _line(row, panel.left, y, panel.right, y)


def _names(panel: _Panel, names: Sequence[tuple[float, str]]) -> Iterator[str]:
    last = -math.inf
    for y, text in sorted(names):
        last = max(y, last + 15.0)
        yield f'<text class="name" x="{panel.right + 8:.1f}" y="{last + 4:.1f}">{escape(text)}</text>'


def _line(row: Ceiling, x1: float, y1: float, x2: float, y2: float) -> str:
    kind = row.kind if row.kind in ("measured", "sustained", "spec") else "spec"
    told = f"{ceiling_name(row)}: {f.clean(row.source)}"
    return f'<line class="roof {kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"><title>{escape(told)}</title></line>'


def ceiling_name(row: Ceiling) -> str:
    """`fp16 768 TFLOP/s, measured`."""
    kind = "data sheet" if row.kind == "spec" else f.clean(row.kind, 20)
    return f"{f.clean(row.quantity, 20)} {f.ceiling(row.value, row.unit)}, {kind}"


def _points(
    panel: _Panel,
    points: Sequence[RooflinePoint],
    x_of: Callable[[RooflinePoint], float],
    y_of: Callable[[RooflinePoint], float],
    longest_ns: float,
    *,
    labels: int,
    strokes: Sequence[_Box],
) -> Iterator[str]:
    """Area is time, against the longest of the picture; the largest of each name carries it."""
    placed: list[tuple[float, float, float, RooflinePoint]] = []
    for point in points:
        x, y = panel.x(x_of(point)), panel.y(y_of(point))
        radius = max(2.5, RADIUS * math.sqrt((point.time_ns or 0.0) / longest_ns)) if longest_ns > 0 else 7.0
        placed.append((x, y, radius, point))
        tone = point.bound if point.bound in ("compute", "memory") else "unknown"
        yield f'<circle class="t-{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(told(point))}</title></circle>'
    taken: list[_Box] = []
    named: set[str] = set()
    for x, y, radius, point in placed:
        name = f.clean(point.name, 34)
        if name in named or len(named) >= labels:
            continue
        others = [(ox - r, oy - r, ox + r, oy + r) for ox, oy, r, p in placed[:60] if p is not point]
        box = _room(panel, x, y, radius, 6.8 * len(name), [*taken, *others, *strokes]) or _room(panel, x, y, radius, 6.8 * len(name), taken)
        if box is not None:
            named.add(name)
            taken.append(box)
            yield f'<text class="name" x="{box[0]:.1f}" y="{box[3] - 4:.1f}">{escape(name)}</text>'


_Box = tuple[float, float, float, float]


def _room(panel: _Panel, x: float, y: float, radius: float, width: float, taken: Sequence[_Box]) -> _Box | None:
    """Right of a point, left, above or below it: the first place where a text hides nothing."""
    away = radius + 5
    for left, middle in ((x + away, y), (x - away - width, y), (x - width / 2, y - away - 6), (x - width / 2, y + away + 6)):
        box = (left, middle - 8, left + width, middle + 8)
        inside = left >= panel.left and box[2] <= panel.right and middle > TOP and middle < HEIGHT - BOTTOM
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return box
    return None


def told(point: RooflinePoint) -> str:
    """A point in one line, for a tooltip."""
    speed = (
        f"{f.si(_speed(point), 'FLOP/s')} at {f.rate(_intensity(point))} FLOP/B"
        if point.flops and point.bytes
        else f.si(_rate(point), "B/s")
    )
    return (
        f"{f.clean(point.name, 80)} in {f.clean(point.module, 80) or '(root)'}: {f.ns(point.time_ns)}, {speed}, "
        f"{f.percent(point.pct_of_ceiling)} of {f.clean(point.ceiling) or 'an unknown ceiling'}"
        + (f"; {f.clean(point.note)}" if point.note else "")
    )


def key(picture: Picture) -> list[str]:
    """The bounds that occur, in the order of TONES."""
    found = {p.bound if p.bound in ("compute", "memory") else "unknown" for p in (*picture.computing, *picture.moving)}
    return [name for name in TONES if name in found]


def unplaced(picture: Picture) -> str:
    """What of the time lies nowhere on the picture, in words; "" where all of it does."""
    total = sum(p.time_ns or 0.0 for p in picture.points)
    here = sum(p.time_ns or 0.0 for p in (*picture.computing, *picture.moving))
    count = sum(1 for p in picture.points if (p.time_ns or 0.0) > 0) - len(picture.computing) - len(picture.moving)
    if count <= 0 or total <= 0:
        return ""
    return f"{f.plural(count, 'op')} with {f.share((total - here) / total)} of the time have no known FLOPs or bytes, so no place here"


def sources(picture: Picture) -> list[str]:
    """Where the ceilings drawn come from: each source once, with what it says."""
    told: dict[tuple[str, str], list[str]] = {}
    for row in (*picture.bandwidth, *picture.compute):
        told.setdefault((row.kind, f.clean(row.source, 150)), []).append(f.clean(row.quantity, 20))
    return [
        f"{', '.join(names)} {'data sheet' if kind == 'spec' else f.clean(kind, 20)}: {source}" for (kind, source), names in told.items()
    ]
