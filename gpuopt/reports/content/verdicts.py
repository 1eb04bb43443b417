"""Gates, findings and comparisons -> tables with a verdict in each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuopt.core.result import Finding, Report
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
    columns = (Column("gate"), Column("run"), Column("figure"), Column("limit"), Column("verdict"))
    return [Table(title="Gates", columns=columns, rows=rows)]


_SEVERITY_ORDER = {"error": 0, "warning": 1, "info": 2}


def findings(report: Report) -> list[Block]:
    told = [x for x in report.findings if x.code != "guessed-inputs"]  # the headline says it
    if not told:
        return []
    ordered = sorted(told, key=lambda x: (_SEVERITY_ORDER.get(x.severity, 3), -(x.gain_high_ms or 0.0)))
    run = next((run for run in report.runs if run.latency_ms), None)
    wall_ms = run.latency_ms.median if run and run.latency_ms else None
    items = tuple(
        Message(
            x.severity if x.severity in _SEVERITY_ORDER else "info",
            clean(x.message, 1000) + (f" ({clean(x.line, 120)})" if x.line else "") + price(x, wall_ms),
            clean(x.fix, 600),
            clean(f"{x.code} {x.rule}".strip(), 60),
        )
        for x in ordered
    )
    return [Messages(title="Findings", items=items)]


def price(finding: Finding, wall_ms: float | None) -> str:
    """`: gives back 3.1 to 4.4 ms a call (7% to 9%), measured 3.9 ms as predicted`, or nothing where it has no price."""
    low, high, found = finding.gain_low_ms, finding.gain_high_ms, finding.measured_gain_ms
    text = ""
    if low is not None and high is not None:
        text = f": gives back {f.ms(low)} to {f.ms(high)} a call"
        if wall_ms:
            text += f" ({f.share(low / wall_ms)} to {f.share(high / wall_ms)})"
    if found is not None:
        gave = f"gave back {f.ms(found)}" if found >= 0 else f"cost {f.ms(-found)}"
        verdict = {True: ", as predicted", False: ", not as predicted", None: ""}[finding.confirmed]
        text += f"; measured: {gave}{verdict}"
    return text


def comparison(rows_in: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in rows_in:
        verdict = str(row.get("verdict", ""))
        tone = {"faster": "good", "fixed": "good", "slower": "bad", "broken": "bad", "inconclusive": "warn", "no result": "warn"}.get(
            verdict, "dim"
        )
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
