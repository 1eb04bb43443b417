"""What was seen of a user's own program, and the kernels of a trace -> tables and the sentence that sums them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuopt.core.result import Report
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Block, Cell, Column, Message, Messages, Table
from gpuopt.reports.figures import clean

OBSERVED = ("script", "trace")
"""In the place of a backend: runs that were watched, not built and timed."""
TOP = 15
"""Kernels shown; the report holds them all."""

_SITES = (
    ("loads", "Weights it loads and moves"),
    ("syncs", "Where it waits for the device"),
    ("copies", "Where it copies between host and device"),
)


def build(name: str, value: Any) -> list[Block] | None:
    """The blocks of `script`, `exit`, `kernels` and `lines`; None for a table that is not about a program."""
    if name == "script" and isinstance(value, Mapping):
        return _script(value)
    if name == "kernels" and isinstance(value, Sequence) and not isinstance(value, str):
        # Where no device ran anything the rows are ops, and the table of ops shows those.
        return [_kernels(value)] if any(not row.get("is_op") for row in value if isinstance(row, Mapping)) else []
    if name == "lines" and isinstance(value, Sequence) and not isinstance(value, str):
        return [_lines(value)] if value else []
    if name in ("devices", "communication") and isinstance(value, Sequence | Mapping):
        return []  # the notes tell them
    if name == "exit" and isinstance(value, Mapping):
        return []  # how it ended is its run's status
    return None


def headline(report: Report) -> list[Message]:
    """One sentence: how long it ran, and what of that went into its models, loads, waits and copies."""
    script = report.tables.get("script")
    if not isinstance(script, Mapping):
        return []
    told = [f"its models {_s(sum(_number(m, 'wall_s') for m in _rows(script, 'modules')))}"]
    for key, word in (("loads", "loading and moving weights"), ("syncs", "waiting for the device"), ("copies", "copies")):
        seconds = sum(_number(row, "seconds") for row in _rows(script, key))
        if seconds > 0:
            told.append(f"{word} {_s(seconds)}")
    own = _number(script, "overhead_s") + _number(script, "tracing_s")
    text = f"it ran for {_s(max(0.0, _number(script, 'wall_s') - own))} besides the {_s(own)} that observing took: {', '.join(told)} (host time)"
    return [Message("info", text)]


def notes(report: Report) -> list[Block]:
    """What is to be known about how a program or a trace was seen."""
    told = [note for run in report.runs if run.backend in OBSERVED and run.status == "ok" for note in run.notes]
    return (
        [Messages(title="How it was seen", items=tuple(Message("info", clean(note, 1000)) for note in dict.fromkeys(told)))] if told else []
    )


def _script(script: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    models = _rows(script, "modules")
    if models:
        columns = (
            Column("model"),
            Column("calls", right=True),
            Column("first", right=True, spare=3),
            Column("a call", right=True),
            Column("call to call", right=True),
            Column("on", spare=1),
            Column("inputs", spare=2),
            Column("where"),
        )
        rows = tuple(
            (
                Cell(f"{clean(m.get('name') or '', 30)} ({clean(m.get('module_class') or '', 40)})", "strong"),
                Cell(str(m.get("num_calls", ""))),
                Cell(_s(m.get("first_s"))),
                Cell(_s(m.get("typical_s"))),
                Cell(_s(m.get("period_s"))),
                Cell(clean(m.get("device") or "") or f.MISSING),
                Cell(", ".join(clean(i, 60) for i in m.get("inputs") or ()) or f.MISSING, "dim"),
                Cell(clean(m.get("line") or "", 120), "dim"),
            )
            for m in models
        )
        why = "host time: a GPU may still be at work when a call returns; call to call: from the start of one to the start of the next"
        blocks.append(Table(title="Models it calls", columns=columns, rows=rows, notes=(why,)))
    for key, title in _SITES:
        sites = sorted(_rows(script, key), key=lambda row: -_number(row, "seconds"))
        if sites:
            site_columns = (
                Column("where"),
                Column("what"),
                Column("times", right=True),
                Column("time", right=True),
                Column("bytes", right=True, spare=1),
            )
            shown = tuple(
                (
                    Cell(clean(row.get("line") or f.MISSING, 120), "strong"),
                    Cell(clean(row.get("what") or "", 60)),
                    Cell(str(row.get("count", ""))),
                    Cell(_s(row.get("seconds"))),
                    Cell(f.memory(_number(row, "bytes")) if _number(row, "bytes") else f.MISSING),
                )
                for row in sites[:TOP]
            )
            more = (f"{len(sites) - TOP} more in --json",) if len(sites) > TOP else ()
            blocks.append(Table(title=title, columns=site_columns, rows=shown, notes=more))
    return blocks


def _kernels(rows: Sequence[Mapping[str, Any]]) -> Table:
    has_ops = any(row.get("op") for row in rows)
    columns = (
        Column("kernel or op"),
        *((Column("mostly launched by", spare=1),) if has_ops else ()),
        Column("times", right=True),
        Column("a call", right=True),
        Column("of them", right=True),
    )
    shown = tuple(
        (
            Cell(clean(row.get("short") or row.get("kernel") or "", 90)),
            *((Cell(clean(row.get("op") or "", 50) or f.MISSING, "dim"),) if has_ops else ()),
            Cell(f.calls(_number(row, "count"))),
            Cell(f.ms(_number(row, "time_ms"))),
            Cell(f.percent(_number(row, "pct")), "", min(1.0, _number(row, "pct") / 100)),
        )
        for row in rows[:TOP]
    )
    left = len(rows) - TOP
    notes = (
        f"{left} more in --json; of them: of the summed times, which may overlap"
        if left > 0
        else "of them: of the summed times, which may overlap",
    )
    return Table(title="Kernels by time", columns=columns, rows=shown, notes=notes)


def _lines(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        Column("function of yours, by the line it begins at"),
        Column("launches", right=True),
        Column("a call", right=True),
        Column("of all", right=True),
    )
    shown = tuple(
        (
            Cell(clean(row.get("line") or "", 110)),
            Cell(f.calls(_number(row, "count"))),
            Cell(f.ms(_number(row, "time_ms"))),
            Cell(f.percent(_number(row, "pct")), "", min(1.0, _number(row, "pct") / 100)),
        )
        for row in rows[:TOP]
    )
    left = len(rows) - TOP
    return Table(title="Time by source line", columns=columns, rows=shown, notes=(f"{left} more in --json",) if left > 0 else ())


def _rows(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = table.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _s(value: Any) -> str:
    return f.ms(float(value) * 1e3) if isinstance(value, int | float) and not isinstance(value, bool) else f.MISSING
