"""Profiled run -> where its time goes: waterfall, module tree, roofline."""

from __future__ import annotations

from gpuopt.core.result import CEILING_OF_DTYPE, Ceilings, Run
from gpuopt.reports import figures as f
from gpuopt.reports.content import grouped
from gpuopt.reports.content.blocks import Bar, Bars, Block, Roofline, View
from gpuopt.reports.figures import clean

_PART_TONES = (
    ("unaccounted", "unknown"),
    ("avoidable", "memory"),
    ("launch", "gap"),
    ("gap", "gap"),
    ("idle", "gap"),
    ("synchronisation", "gap"),
    ("python", "gap"),
    ("host", "copy"),
    ("copy", "copy"),
    ("compute", "compute"),
    ("memory", "memory"),
)
"""Words of part names, today's and those of older reports (`compute-bound`, `host-to-device`)."""


def part_tone(name: str) -> str:
    """The colour class of a waterfall part: `compute`, `memory`, `copy`, `gap`, `unknown` or `other`."""
    lowered = name.lower()
    return next((tone for word, tone in _PART_TONES if word in lowered), "other")


def build(run: Run, ceilings: Ceilings, view: View, label: str) -> list[Block]:
    suffix = f": {label}" if label else ""
    blocks: list[Block] = []
    if run.waterfall:
        blocks.append(_waterfall(run, suffix))
    if run.roofline:
        blocks.append(_roofline(run, ceilings, suffix))
    if run.roofline or run.modules:
        blocks += grouped.build(run, view, suffix)
    return blocks


def _waterfall(run: Run, suffix: str) -> Bars:
    waterfall = run.waterfall
    assert waterfall is not None
    wall = waterfall.wall_ms
    bars = tuple(
        Bar(clean(part.name), f.ms(part.ms), part.ms / wall if wall > 0 else 0.0, part_tone(part.name), clean(part.detail))
        for part in waterfall.parts
        if part.ms > 1e-6 or part.name == "unaccounted"
    )
    notes = [f"of {f.ms(wall)} wall time, {'traced' if run.backend == 'trace' else 'untraced'}"]
    if allowed := _allowed(run):
        notes.append(allowed)
    if wall > 0 and abs(waterfall.unaccounted_ms) / wall > 0.05:
        notes.append(f"{f.share(abs(waterfall.unaccounted_ms) / wall)} could not be placed: read the slices as lower bounds")
    if waterfall.method:
        notes.append(clean(waterfall.method))
    return Bars(title=f"Where the time goes{suffix}", bars=bars, notes=tuple(notes))


def _allowed(run: Run) -> str:
    """`81% of what fp16 allows op by op (37.8 ms), 59% of what it allows fused (28.1 ms); fp8 would allow 23.1 ms`; "" without bounds."""
    bounds = run.bounds
    took = run.latency_ms.median if run.latency_ms else None
    if bounds is None or not took:
        return ""
    said = [
        f"{f.share(ms / took)} of what {clean(bounds.precision)} allows {how} ({f.ms(ms)})"
        for how, ms in (("op by op", bounds.unfused_ms), ("fused", bounds.fused_ms))
        if ms is not None
    ]
    lower = {name: ms for name, ms in bounds.by_precision.items() if bounds.unfused_ms is None or ms < 0.95 * bounds.unfused_ms}
    other = [f"{clean(name)} would allow {f.ms(ms)}" for name, ms in sorted(lower.items(), key=lambda i: i[1])[:2]]
    return "; ".join(t for t in (", ".join(said), ", ".join(other)) if t)


def _roofline(run: Run, ceilings: Ceilings, suffix: str) -> Roofline:
    compute = tuple(
        row
        for quantity in dict.fromkeys(CEILING_OF_DTYPE.get(p.dtype or "", p.dtype or "") for p in run.roofline)
        for kind in ("measured", "spec")
        if (row := ceilings.find(quantity, kind)) is not None
    )
    return Roofline(
        title=f"Roofline{suffix}",
        points=run.roofline,
        compute=compute,
        bandwidth=ceilings.find("memory", "measured") or ceilings.find("memory", "spec"),
    )
