"""Profiled run -> where its time goes: waterfall, module tree, roofline."""

from __future__ import annotations

from collections.abc import Sequence

from gpuopt.core.result import CEILING_OF_DTYPE, Ceilings, ModuleRow, RooflinePoint, Run
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Bar, Bars, Block, Cell, Column, Roofline, Table, View
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
    if run.modules:
        blocks.append(_modules(run, view, suffix))
    if run.roofline:
        blocks += _roofline(run, ceilings, view, suffix)
    return blocks


def _waterfall(run: Run, suffix: str) -> Bars:
    waterfall = run.waterfall
    assert waterfall is not None
    wall = waterfall.wall_ms
    bars = tuple(
        Bar(clean(part.name), f.ms(part.ms), part.ms / wall if wall > 0 else 0.0, part_tone(part.name), clean(part.detail))
        for part in waterfall.parts
        if part.ms > 0 or part.name == "unaccounted"
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


def _modules(run: Run, view: View, suffix: str) -> Table:
    shown = [row for row in run.modules if row.depth <= view.depth]
    hidden = len(run.modules) - len(shown)
    rows = []
    for row, stem in zip(shown, _stems(shown), strict=True):
        name = row.name.rpartition(".")[2] if row.name else clean(run.model, 40)
        rows.append(
            (
                Cell(f"{stem}{clean(name, 60)}"),
                Cell(clean(row.module_class, 40), "dim"),
                Cell(f.ns(row.time_ns)),
                Cell(f.percent(row.pct_of_time), "", None if row.pct_of_time is None else min(1.0, max(0.0, row.pct_of_time / 100))),
                Cell(f.si(row.flops, "FLOP")),
                Cell(f.percent(row.pct_of_ceiling)),
                Cell(f.si(row.num_parameters)),
            )
        )
    columns = (
        Column("module"),
        Column("class", spare=4),
        Column("time", right=True),
        Column("of time"),
        Column("FLOPs", right=True, spare=3),
        Column("of roofline", right=True, spare=1),
        Column("parameters", right=True, spare=5),
    )
    notes = (f"{f.plural(hidden, 'module')} below this depth: --depth {view.depth + 1} shows more",) if hidden else ()
    return Table(title=f"Modules{suffix}", columns=columns, rows=tuple(rows), notes=notes)


def _stems(rows: Sequence[ModuleRow]) -> list[str]:
    """Tree lines: `├─ `, `└─ `, `│  ` by what follows at each depth."""
    stems = []
    for index, row in enumerate(rows):
        stem = ""
        for level in range(1, row.depth + 1):
            more = False
            for later in rows[index + 1 :]:
                if later.depth < level:
                    break
                if later.depth == level:
                    more = True
                    break
            stem += ("├─ " if more else "└─ ") if level == row.depth else ("│  " if more else "   ")
        stems.append(stem)
    return stems


def _sort_key(point: RooflinePoint, by: str) -> float:
    if by == "gap":
        return (point.time_ns or 0.0) - (point.floor_ns or 0.0) if point.floor_ns is not None else 0.0
    return {"time": point.time_ns, "flops": point.flops, "bytes": point.bytes}[by] or 0.0


def _roofline(run: Run, ceilings: Ceilings, view: View, suffix: str) -> list[Block]:
    total = sum(point.time_ns or 0.0 for point in run.roofline)
    ordered = sorted(run.roofline, key=lambda p: _sort_key(p, view.by), reverse=True)
    shown = ordered[: view.top]
    rows = []
    for point in shown:
        part = (point.time_ns or 0.0) / total if total else None
        gap = None if point.time_ns is None or point.floor_ns is None else max(0.0, point.time_ns - point.floor_ns)
        rows.append(
            (
                Cell(clean(point.name, 60) + (f" ×{point.count}" if point.count > 1 else "")),
                Cell(clean(point.module, 60) or "(root)", "dim"),
                Cell(clean(point.dtype or f.MISSING), "dim"),
                Cell(f.ns(point.time_ns)),
                Cell(f.share(part), "", part),
                Cell(f.si(point.flops, "FLOP")),
                Cell(f.si(point.bytes, "B")),
                Cell(f.MISSING if point.intensity is None else f.rate(point.intensity)),
                Cell(clean(point.bound), {"compute": "compute", "memory": "memory"}.get(point.bound, "dim")),
                Cell(f.percent(point.pct_of_ceiling), _pct_tone(point.pct_of_ceiling)),
                Cell(clean(point.ceiling), "dim"),
                Cell(f.ns(gap)),
            )
        )
    columns = (
        Column("op"),
        Column("module", spare=4),
        Column("dtype", spare=7),
        Column("time", right=True),
        Column("of time"),
        Column("FLOPs", right=True, spare=5),
        Column("bytes", right=True, spare=6),
        Column("FLOP/B", right=True, spare=8),
        Column("bound"),
        Column("reaches", right=True),
        Column("of ceiling", spare=3),
        Column("to win", right=True, spare=1),
    )
    notes = ["reaches: floor time over measured time; to win: what lies above the floor, op by op, before any fusion"]
    rest = ordered[view.top :]
    if rest:
        left = sum(point.time_ns or 0.0 for point in rest)
        notes.append(f"{len(rest)} more ops, {f.share(left / total) if total else f.MISSING} of the time: --top {len(ordered)} shows all")
    notes += list(dict.fromkeys(f"{clean(p.name, 60)}: {clean(p.note)}" for p in shown if p.note))
    compute = tuple(
        row
        for quantity in dict.fromkeys(CEILING_OF_DTYPE.get(p.dtype or "", p.dtype or "") for p in run.roofline)
        for kind in ("measured", "spec")
        if (row := ceilings.find(quantity, kind)) is not None
    )
    return [
        Roofline(
            title=f"Roofline{suffix}",
            points=run.roofline,
            compute=compute,
            bandwidth=ceilings.find("memory", "measured") or ceilings.find("memory", "spec"),
        ),
        Table(title=f"Ops by {view.by}{suffix}", columns=columns, rows=tuple(rows), notes=tuple(notes)),
    ]


def _pct_tone(pct: float | None) -> str:
    if pct is None:
        return "dim"
    return "good" if pct >= 60 else "warn" if pct >= 25 else "bad"
