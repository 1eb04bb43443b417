"""Gates, findings and comparisons -> tables with a verdict in each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuopt.core.result import Report
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Message, Messages, Table
from gpuopt.reports.figures import clean


def gates(report: Report) -> list[Block]:
    if not report.gates:
        return []
    rows = tuple(
        (
            Cell(clean(g.name)),
            Cell(clean(g.run)),
            Cell(clean(g.figure)),
            Cell(clean(g.limit)),
            Cell("passed", "good") if g.passed else Cell("MISSED", "bad"),
        )
        for g in report.gates
    )
    columns = (Column("gate"), Column("run"), Column("figure", right=True), Column("limit", right=True), Column("verdict"))
    return [Table(title="Gates", columns=columns, rows=rows)]


_SEVERITY_ORDER = {"error": 0, "warning": 1, "info": 2}


def findings(report: Report) -> list[Block]:
    told = [x for x in report.findings if x.code != "guessed-inputs"]  # the headline says it
    if not told:
        return []
    ordered = sorted(told, key=lambda x: _SEVERITY_ORDER.get(x.severity, 3))
    items = tuple(
        Message(x.severity if x.severity in _SEVERITY_ORDER else "info", clean(x.message, 1000), clean(x.fix, 600), clean(x.code, 20))
        for x in ordered
    )
    return [Messages(title="Findings", items=items)]


def comparison(rows_in: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in rows_in:
        verdict = str(row.get("verdict", ""))
        tone = {"faster": "good", "fixed": "good", "slower": "bad", "broken": "bad", "inconclusive": "warn"}.get(verdict, "dim")
        low, high = row.get("change_low"), row.get("change_high")
        rows.append(
            (
                Cell(clean(row.get("run", ""), 120)),
                Cell(f.ms(row.get("before_ms"))),
                Cell(f.ms(row.get("after_ms"))),
                Cell(signed(row.get("change")), tone),
                Cell(f"{signed(low)} … {signed(high)}" if low is not None and high is not None else f.MISSING, "dim"),
                Cell(verdict, tone),
                Cell(clean(row.get("reason", ""), 300), "dim"),
            )
        )
    columns = (
        Column("run"),
        Column("before", right=True),
        Column("after", right=True),
        Column("change", right=True),
        Column("95% interval", right=True, spare=2),
        Column("verdict"),
        Column("why", spare=1),
    )
    return Table(
        title="Before and after", columns=columns, rows=tuple(rows), notes=("change of the median time a call; above zero is slower",)
    )


def signed(value: float | None) -> str:
    """0.052 -> `+5.2%`."""
    if value is None:
        return f.MISSING
    return "0%" if abs(value) < 5e-5 else f"{value * 100:+.1f}%"
