"""Differences of two runs -> tables side by side: parts of the waterfall, the module tree, and ops, kernels and lines that came, went or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError
from gpuopt.core.result import Report
from gpuopt.reports import figures as f
from gpuopt.reports.changes import Change, Delta
from gpuopt.reports.content.blocks import Cell, Column, Message, Table, View
from gpuopt.reports.content.grouped import stems
from gpuopt.reports.figures import clean

TITLE = "Where the difference lies"
MINOR = 0.005
"""Share of a call under which a difference has no colour."""
_ALL = ("module", "op", "kernel", "line")
_SHOWN = {"": ("module", "kernel"), "all": _ALL}
_TITLES = {"op": "Ops that changed", "kernel": "Kernels that came, went or changed", "line": "Lines that changed"}


def of_report(report: Report) -> list[Change]:
    """The comparisons that a report holds; none where its table was written by something else."""
    found = report.tables.get("changes")
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(isinstance(row, Mapping) for row in found):
        return []
    try:
        return [codec.from_plain(Change, row, what="tables.changes") for row in found]
    except GpuoptError:
        return []


def build(changes: Sequence[Change], view: View) -> list[Table]:
    tables = []
    for change in changes:
        suffix = f": {clean(change.run, 120)}" if change.run and len(changes) > 1 else ""
        if len(changes) > 1 and change.before != "before":
            suffix += f" ({clean(change.before, 60)} -> {clean(change.after, 60)})"
        tables.append(_waterfall(change, suffix))
        for by in _SHOWN.get(view.by, (view.by,)):
            if by == "module":
                tables += [_modules(change, view, suffix)] if change.modules else []
            elif rows := _rows(change, by):
                tables.append(_named(change, by, rows, view, suffix))
            elif view.by == by:
                why = f"neither report knows the {by}s that ran: compiled, on a CPU, or of an older version"
                tables.append(Table(title=f"{_TITLES[by]}{suffix}", columns=(Column(by),), rows=(), notes=(why,)))
    return tables


def headline(changes: Sequence[Change]) -> list[Message]:
    """`inductor takes 30.1 ms a call, 17.5 ms less than eager (47.6 ms): memory-bound -9.1 ms, launch gaps -3.2 ms`."""
    told = []
    for change in changes[:3]:
        won = change.after_ms - change.before_ms
        parts = sorted(
            (row for row in change.waterfall if abs(row.change_ms) > MINOR * change.before_ms), key=lambda row: -abs(row.change_ms)
        )
        why = ", ".join(f"{clean(row.name)} {f.signed_ms(row.change_ms)}" for row in parts[:3])
        how = (
            "the same as"
            if not parts and abs(won) <= MINOR * change.before_ms
            else f"{f.ms(abs(won))} {'less' if won < 0 else 'more'} than"
        )
        text = (
            f"{clean(change.after, 80)} takes {f.ms(change.after_ms)} a call, {how} {clean(change.before, 80)} ({f.ms(change.before_ms)})"
        )
        told.append(Message("info", text + (f": {why}" if why else "")))
    return told


def _rows(change: Change, by: str) -> tuple[Delta, ...]:
    rows: dict[str, tuple[Delta, ...]] = {"op": change.ops, "kernel": change.kernels, "line": change.lines}
    return rows[by]


def _sides(change: Change) -> tuple[Column, ...]:
    return (
        Column(clean(change.before, 28), right=True),
        Column(clean(change.after, 28), right=True),
        Column("difference", right=True),
        Column("change", right=True, spare=2),
    )


def _cells(row: Delta, whole_ms: float, strong: str = "") -> tuple[Cell, ...]:
    change = row.change_ms
    tone = "dim" if abs(change) < MINOR * whole_ms else "good" if change < 0 else "bad" if strong else "warn"
    relative = f.MISSING
    if row.before_ms is None:
        relative = "new"
    elif row.after_ms is None:
        relative = "gone"
    elif row.before_ms > 0:
        relative = f.change(change / row.before_ms)
    return (
        Cell(f.ms(row.before_ms), strong),
        Cell(f.ms(row.after_ms), strong),
        Cell(f.signed_ms(change), tone),
        Cell(relative, tone if relative != f.MISSING else "dim"),
    )


def _waterfall(change: Change, suffix: str) -> Table:
    whole = max(change.before_ms, change.after_ms)
    rows = [
        (Cell(clean(row.name)), *_cells(row, whole)) for row in change.waterfall if max(row.before_ms or 0.0, row.after_ms or 0.0) > 1e-6
    ]
    total = Delta(name="one call", before_ms=change.before_ms, after_ms=change.after_ms)
    rows.append((Cell("one call", "strong"), *_cells(total, whole, "strong")))
    notes = [clean(note) for note in change.notes]
    return Table(title=f"{TITLE}{suffix}", columns=(Column("part"), *_sides(change)), rows=tuple(rows), notes=tuple(notes))


def _named(change: Change, by: str, rows: Sequence[Delta], view: View, suffix: str) -> Table:
    """Largest difference first; what is not shown is summed, so that the differences add up to the call's."""
    named = [row for row in rows if row.name not in ("", "?")]
    shown, rest = named[: view.top], named[view.top :]
    if len(rest) == 1:
        shown, rest = named, []
    whole = max(change.before_ms, change.after_ms)
    told = [_named_row(clean(row.name, 100), row, by, whole) for row in shown]
    if rest:
        told.append(_named_row(f"{len(rest)} more", _added(rest), by, whole, "dim"))
    for row in rows:
        if row.name == "?":
            told.append(_named_row("? not attributed", row, by, whole, "warn"))
    for row in rows:
        if row.name == "" and ((row.before_ms or 0.0) > 0 or (row.after_ms or 0.0) > 0):
            told.append(_named_row("outside all of them", row, by, whole, "dim"))
    total = Delta(name="one call", before_ms=change.before_ms, after_ms=change.after_ms)
    told.append(_named_row("one call", total, by, whole, "strong"))
    columns = (
        Column(by, shrinks=24),
        *([Column("does", spare=3)] if by == "kernel" else []),
        *_sides(change),
        Column("calls", right=True, spare=4),
    )
    notes = (f"--top {len(named)} shows all",) if rest else ()
    return Table(title=f"{_TITLES[by]}{suffix}", columns=columns, rows=tuple(told), notes=notes)


def _named_row(name: str, row: Delta, by: str, whole: float, tone: str = "") -> tuple[Cell, ...]:
    sides = [f.calls(calls) if calls is not None else "0" for calls in (row.before_calls, row.after_calls)]
    has_calls = row.before_calls is not None or row.after_calls is not None
    calls = (sides[0] if sides[0] == sides[1] else f"{sides[0]} -> {sides[1]}") if has_calls else f.MISSING
    does = (Cell(clean(row.kind), "dim"),) if by == "kernel" else ()
    return (Cell(name, tone), *does, *_cells(row, whole, tone if tone == "strong" else ""), Cell(calls, "dim"))


def _added(rows: Sequence[Delta]) -> Delta:
    def total(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.fsum(known) if known else None

    return Delta(
        name="",
        before_ms=total([row.before_ms for row in rows]),
        after_ms=total([row.after_ms for row in rows]),
        before_calls=total([row.before_calls for row in rows]),
        after_calls=total([row.after_calls for row in rows]),
    )


def _modules(change: Change, view: View, suffix: str) -> Table:
    """Siblings by their largest difference; at each level what is not shown is summed."""
    whole = max(change.before_ms, change.after_ms)
    children: dict[str, list[Delta]] = {}
    for row in change.modules:
        if row.name not in ("", "?"):
            children.setdefault(row.name.rpartition(".")[0], []).append(row)
    unknown = next((row for row in change.modules if row.name == "?"), None)
    root = Delta(name="", before_ms=change.before_ms, after_ms=change.after_ms)
    lines: list[tuple[int, str, Delta, str]] = []
    is_cut = False

    def walk(row: Delta, depth: int, name: str) -> None:
        nonlocal is_cut
        lines.append((depth, name, row, "strong" if depth == 0 else ""))
        if depth >= view.depth:
            return
        below = sorted(children.get(row.name, ()), key=lambda child: -abs(child.change_ms))
        shown, rest = (below, []) if len(below) <= view.top + 1 else (below[: view.top], below[view.top :])
        for child in shown:
            walk(child, depth + 1, clean(child.name.rpartition(".")[2], 60))
        if rest:
            is_cut = True
            lines.append((depth + 1, f"{len(rest)} more", _added(rest), "dim"))
        if depth == 0 and unknown is not None:
            lines.append((1, "? not attributed", unknown, "warn"))
        if below:
            all_below = [*below, *([unknown] if depth == 0 and unknown is not None else [])]
            own = _less(row, _added(all_below))
            if max(own.before_ms or 0.0, own.after_ms or 0.0) > MINOR * whole:
                lines.append((depth + 1, "outside its modules" if depth == 0 else "(its own ops)", own, "dim"))

    walk(root, 0, "one call")
    hidden = sum(row.name.count(".") + 1 > view.depth for row in change.modules if row.name not in ("", "?"))
    rows = [
        (Cell(f"{stem}{name}", tone), Cell(clean(row.kind, 40), "dim"), *_cells(row, whole, tone if tone == "strong" else ""))
        for (_, name, row, tone), stem in zip(lines, stems([depth for depth, *_ in lines]), strict=True)
    ]
    notes = ["siblings by their difference, largest first"]
    if hidden:
        notes.append(f"{f.plural(hidden, 'module')} below this depth: --depth {view.depth + 1} shows more")
    if is_cut:
        notes.append(f"--top {max(map(len, children.values()))} shows all siblings")
    columns = (Column("module", shrinks=24), Column("class", spare=3), *_sides(change))
    return Table(title=f"Modules that changed{suffix}", columns=columns, rows=tuple(rows), notes=tuple(notes))


def _less(row: Delta, part: Delta) -> Delta:
    def left(whole: float | None, of: float | None) -> float | None:
        return None if whole is None else max(0.0, whole - (of or 0.0))

    return Delta(name="", before_ms=left(row.before_ms, part.before_ms), after_ms=left(row.after_ms, part.after_ms))
