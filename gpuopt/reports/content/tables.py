"""Facts of single verbs (the backend matrix, checks of a conversion) -> tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuopt.core.result import Report
from gpuopt.reports import figures as f
from gpuopt.reports.content import changes, program
from gpuopt.reports.content.blocks import Block, Cell, Column, Facts, Table, View
from gpuopt.reports.content.verdicts import comparison
from gpuopt.reports.figures import clean


def build(report: Report, view: View) -> list[Block]:
    """A table of a known name has its own form; any other list of rows, or mapping, is shown as it is."""
    blocks: list[Block] = []
    for name, value in report.tables.items():
        if (own := program.build(name, value)) is not None:
            blocks += own
        elif name == "matrix" and isinstance(value, Sequence):
            blocks.append(_matrix(value, report))
        elif name == "compare" and isinstance(value, Sequence):
            blocks.append(comparison(value))
        elif name == "changes" and (found := changes.of_report(report)):
            blocks += changes.build(found, view)
        elif name in ("form", "model") and "matrix" in report.tables:
            continue  # in the title of the matrix
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and all(isinstance(row, Mapping) for row in value):
            blocks.append(_plain_table(name, value))
        elif isinstance(value, Mapping) and value:
            blocks.append(Facts(title=_titled(name), rows=tuple((clean(_titled(str(k)).lower()), _plain(v)) for k, v in value.items())))
    return blocks


def _titled(name: str) -> str:
    return clean(name.replace("_", " ").capitalize(), 60)


def _plain(value: Any) -> Cell:
    if value is None:
        return Cell(f.MISSING, "dim")
    if isinstance(value, bool):
        return Cell("yes", "good") if value else Cell("no", "bad")
    if isinstance(value, float):
        return Cell(f.digits(value, 4))
    if isinstance(value, list | tuple):
        return Cell(", ".join(_plain(v).text for v in value) or f.MISSING)
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{clean(k)} {_plain(v).text}" for k, v in value.items()) or f.MISSING)
    return Cell(clean(value, 300))


def _plain_table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = list(dict.fromkeys(str(key) for row in rows for key in row))
    numeric = {
        key for key in keys if all(isinstance(row.get(key), int | float | None) and not isinstance(row.get(key), bool) for row in rows)
    }
    columns = tuple(Column(_titled(key).lower(), right=key in numeric, spare=index) for index, key in enumerate(keys))
    return Table(title=_titled(name), columns=columns, rows=tuple(tuple(_plain(row.get(key)) for key in keys) for row in rows))


def _matrix(cells: Sequence[Mapping[str, Any]], report: Report) -> Table:
    """One row a backend: what it is, the precisions it can be asked for here, and why the rest cannot be."""
    precisions = list(dict.fromkeys(p for cell in cells for p in cell.get("precisions", {})))
    rows = []
    for cell in cells:
        missing, by_precision = cell.get("reason") or "", cell.get("precisions") or {}
        rows.append(
            (
                Cell(clean(cell.get("backend", "?")), "dim" if missing else "strong"),
                *(_mark(missing, by_precision, p) for p in precisions),
                Cell(clean(cell.get("route") or ""), "dim"),
                Cell(clean(missing, 300) if missing else _refused(by_precision), "warn" if missing else "dim"),
                Cell(", ".join(clean(p) for p in cell.get("presets") or ()), "dim"),
                Cell(clean(cell.get("summary") or ""), "dim"),
            )
        )
    columns = (
        Column("backend"),
        *(Column(clean(p)) for p in precisions),
        Column("route", spare=2),
        Column("why not"),
        Column("presets", spare=3),
        Column("what it is", spare=4),
    )
    told = [clean(report.tables.get("model") or "", 60), f"form: {clean(report.tables['form'])}" if report.tables.get("form") else ""]
    told += [clean(report.device.id) if report.device else ""]
    marks = ("● can run here   ○ cannot",) if precisions else ()
    return Table(title="Backends", columns=columns, rows=tuple(rows), notes=marks, beside=" · ".join(part for part in told if part))


def _refused(by_precision: Mapping[str, str]) -> str:
    """`fp8, int8: no kernels`: precisions with the same reason are told together."""
    reasons: dict[str, list[str]] = {}
    for precision, reason in by_precision.items():
        if reason:
            reasons.setdefault(clean(reason, 300), []).append(clean(precision))
    return "; ".join(f"{', '.join(which)}: {reason}" for reason, which in reasons.items())


def _mark(missing: str, by_precision: Mapping[str, str], precision: str) -> Cell:
    if missing or precision not in by_precision:
        return Cell("○" if missing else " ", "dim")
    return Cell("○", "warn") if by_precision[precision] else Cell("●", "good")
