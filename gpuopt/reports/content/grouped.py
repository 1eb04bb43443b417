"""Profiled run -> tables by module, op, kernel and line; each ends in a row for the whole call, to which the others add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuopt.core.result import Run
from gpuopt.reports import figures as f
from gpuopt.reports import groups
from gpuopt.reports.content.blocks import Cell, Column, Table, View
from gpuopt.reports.figures import clean

LONGEST = 60
"""Characters of a name."""
_FIRST = {"place": "op", "op": "op", "kernel": "kernel", "line": "line"}
_TITLES = {"place": "Ops", "op": "Ops by name", "kernel": "Kernels", "line": "Lines"}
_DISTORTED = 0.2
"""Tracing that makes a call five times as long says little about who takes how much of it: a record costs a few µs an op, not several times the op."""
_DASH = Cell(f.MISSING, "dim")


def build(run: Run, view: View, suffix: str) -> list[Table]:
    """The tables that `view.by` asks for: without it the modules and the ops of layers alike."""
    wanted = {"": ("module", "place"), "all": ("module", "place", "op", "kernel", "line")}.get(view.by, (view.by,))
    tables = []
    for by in wanted:
        if by == "module":
            if run.modules or any(point.module not in ("", groups.UNKNOWN) for point in run.roofline) or view.by == "module":
                tables.append(modules(run, view, suffix))
        elif run.roofline and not (view.by == "all" and not _has(run, by)):
            tables.append(ranked(run, by, view, suffix))
    return tables


def _has(run: Run, by: str) -> bool:
    return {"kernel": groups.has_kernels(run), "line": groups.has_lines(run)}.get(by, True)


def ranked(run: Run, by: str, view: View, suffix: str) -> Table:
    """Rows most first, then "?", "N more", what lies outside, and the whole."""
    found = groups.grouped(run, by, view.sort)
    shown, rest = found.rows[: view.top], found.rows[view.top :]
    if len(rest) == 1:  # a row that says "1 more" says less than the row
        shown, rest = found.rows, ()
    rows = [_row(row, by, found.whole_ns) for row in shown]
    if rest:
        rows.append(_row(groups.added(rest, f"{len(rest)} more"), by, found.whole_ns, tone="dim"))
    if found.unknown:
        rows.append(_row(found.unknown, by, found.whole_ns, tone="warn"))
    if found.whole_ns and found.outside_ns > 5e-4 * found.whole_ns:
        rows.append(_plain(_outside(run), found.outside_ns, found.whole_ns))
    everything = groups.added([*found.rows, *([found.unknown] if found.unknown else [])], "one call")
    if by == "kernel":  # FLOPs and bytes are the ops': of some no kernel has them
        ops = groups.grouped(run, "place").rows
        everything = replace(everything, flops=groups.added(ops, "").flops, bytes=groups.added(ops, "").bytes)
    rows.append(_row(_whole(everything, found.whole_ns), by, found.whole_ns, tone="strong"))
    columns = (
        Column(_FIRST[by], shrinks=22),
        Column({"kernel": "does", "line": "op"}.get(by, "module"), spare=1, shrinks=18, is_path=True),
        Column("dtype", spare=8) if by in ("op", "place") else Column("module", spare=8, shrinks=18, is_path=True),
        Column("time", right=True),
        Column("of call"),
        Column("calls", right=True, spare=3),
        Column("FLOPs", right=True, spare=4),
        Column("bytes", right=True, spare=5),
        Column("bound", spare=7),
        Column("reaches", right=True, spare=2),
        Column("of ceiling", spare=9),
        Column("to win", right=True, spare=5),
    )
    order = "" if view.sort == "time" else f" by {'time to win' if view.sort == 'gap' else view.sort if view.sort == 'bytes' else 'FLOPs'}"
    return Table(
        title=f"{_TITLES[by]}{order}{suffix}", columns=columns, rows=tuple(rows), notes=tuple(_notes(run, by, found, shown, len(rest)))
    )


def _whole(row: groups.Row, whole_ns: float) -> groups.Row:
    return groups.Row(name=row.name, time_ns=whole_ns, calls=row.calls, flops=row.flops, bytes=row.bytes)


def _row(row: groups.Row, by: str, whole_ns: float, tone: str = "") -> tuple[Cell, ...]:
    share = row.time_ns / whole_ns if whole_ns else None
    is_whole = tone == "strong"
    name = "? not attributed" if row.name == groups.UNKNOWN else clean(row.name, 100 if by == "kernel" else LONGEST)
    if row.name == groups.UNKNOWN:
        row = replace(row, kind="")
    beside = {"kernel": clean(row.kind), "line": _ops(row)}.get(by, _places(row.where))
    third = clean(row.kind or ("" if is_whole or not row.where else f.MISSING)) if by in ("op", "place") else _places(row.where)
    gap = row.gap_ns
    return (
        Cell(name, tone),
        Cell(beside, "dim"),
        Cell(third, "dim"),
        Cell(f.ns(row.time_ns), tone if is_whole else ""),
        Cell(f.share(share), "", share),
        Cell(f.calls(row.calls)),
        Cell(f.si(row.flops, "FLOP")),
        Cell(f.si(row.bytes, "B")),
        Cell(
            row.bound if row.bound in ("compute", "memory", "both") else f.MISSING,
            row.bound if row.bound in ("compute", "memory") else "dim",
        ),
        Cell(f.percent(row.pct_of_ceiling), _pct_tone(row.pct_of_ceiling)),
        Cell(clean(", ".join(row.ceilings[:2])) or f.MISSING, "dim"),
        Cell(f.MISSING if gap is None else f.ns(gap)),
    )


def _plain(name: str, time_ns: float, whole_ns: float) -> tuple[Cell, ...]:
    share = time_ns / whole_ns if whole_ns else None
    return (Cell(name, "dim"), Cell(""), Cell(""), Cell(f.ns(time_ns)), Cell(f.share(share), "", share), *(_DASH,) * 7)


def _places(where: Sequence[str]) -> str:
    """The module with most time, and how many others."""
    if not where:
        return ""
    first = clean(where[0], 100) or "(root)"
    return first if len(where) == 1 else f"{first} +{len(where) - 1}"


def _ops(row: groups.Row) -> str:
    return clean(row.ops[0], LONGEST) + (f" +{len(row.ops) - 1}" if len(row.ops) > 1 else "") if row.ops else ""


def _outside(run: Run) -> str:
    return "the device waits" if on_device(run) else "outside any op"


def on_device(run: Run) -> bool:
    """Whether the records are of kernels; a CPU's are of ops."""
    return groups.has_kernels(run) or run.clock == "cuda-event"


def _notes(run: Run, by: str, found: groups.Groups, shown: Sequence[groups.Row], more: int) -> list[str]:
    notes = []
    what = {"kernel": "a kernel's name", "line": "a line of the model's code", "op": "an op"}.get(by)
    if what is not None and found.attributed is not None:
        notes.append(f"{f.share(found.attributed)} of the time of {'kernels' if on_device(run) else 'ops'} is attributed to {what}")
    if by == "kernel" and not groups.has_kernels(run):
        notes.append("no kernel is known: a CPU's ops have none, and reports of older versions kept none")
    if by == "line" and not groups.has_lines(run):
        notes.append("no line is known: the model's code was not run op by op (compiled, ONNX), or all of it lies in torch")
    if by == "kernel" and any(len(point.kernels) > 1 for point in run.roofline):
        notes.append("FLOPs and bytes are counted an op: where an op runs several kernels, no row has them, only the sum of the ops")
    notes += scaled(run, found.scale)
    if more:
        notes.append(f"--top {len(found.rows)} shows all")
    if by in ("place", "op"):
        notes.append("reaches: floor time over measured time; to win: what lies above the floor, op by op, before any fusion")
    told = [f"{clean(row.name, LONGEST)}: {clean(row.notes[0], 200)}" for row in shown if row.notes]
    if len(told) > 3:
        told = [*told[:3], f"and {len(told) - 3} more rows with such a note: --format html or --json"]
    return notes + list(dict.fromkeys(told))


def scaled(run: Run, scale: float) -> list[str]:
    """What to say of times that are not as the trace has them."""
    if abs(scale - 1.0) < 0.0005:
        return []
    if on_device(run):
        why = "kernels of several streams overlap, or clocks differed"
    elif scale < _DISTORTED:
        why = (
            f"traced, it took {f.digits(1 / scale, 2)} times as long, as it does on a busy machine, or with ops too short to trace:"
            " profile again before you rely on the order of the rows"
        )
    else:
        why = "tracing slows each op down"
    return [f"times are the trace's × {f.digits(scale)}, so that they add up to the untraced call: {why}"]


def modules(run: Run, view: View, suffix: str) -> Table:
    """The tree to `view.depth`, in the order it runs."""
    found = groups.tree(run)
    shown = [node for node in found.nodes if node.depth <= view.depth]
    hidden = len(found.nodes) - len(shown)
    extra: list[tuple[str, groups.Node | float]] = []
    if found.has_times and view.depth > 0:
        extra += [("(its own ops)", found.own)] if found.own and (found.own.time_ns or 0.0) > 0 else []
        extra += [("? not attributed", found.unknown)] if found.unknown else []
        if found.whole_ns and found.outside_ns > 5e-4 * found.whole_ns:
            extra.append((_outside(run), found.outside_ns))
    depths = [node.depth for node in shown] + [1] * len(extra)
    rows = []
    for node, stem in zip(shown, stems(depths), strict=False):
        name = node.name.rpartition(".")[2] if node.name else clean(run.model, 40)
        rows.append(_node(f"{stem}{clean(name, LONGEST)}", node, found.whole_ns))
    for (name, held), stem in zip(extra, stems(depths)[len(shown) :], strict=True):
        if isinstance(held, groups.Node):
            rows.append(_node(f"{stem}{name}", held, found.whole_ns, "warn" if name.startswith("?") else "dim"))
        else:
            rows.append(_node(f"{stem}{name}", groups.Node(name="", time_ns=held), found.whole_ns, "dim"))
    columns = (
        Column("module", shrinks=24),
        Column("class", spare=5),
        Column("time", right=True),
        Column("of call"),
        Column("ops", right=True, spare=7),
        Column("FLOPs", right=True, spare=3),
        Column("bytes", right=True, spare=6),
        Column("of roofline", right=True, spare=1),
        Column("parameters", right=True, spare=8),
    )
    notes = []
    if found.has_times and found.attributed is not None and run.roofline:
        notes.append(f"{f.share(found.attributed)} of the time of {'kernels' if on_device(run) else 'ops'} is attributed to a module")
        notes += scaled(run, found.scale)
    elif run.roofline and view.by == "module":
        notes.append("nothing of the trace could be attributed to a module")
    if hidden:
        notes.append(f"{f.plural(hidden, 'module')} below this depth: --depth {view.depth + 1} shows more")
    return Table(title=f"Modules{suffix}", columns=columns, rows=tuple(rows), notes=tuple(notes))


def _node(name: str, node: groups.Node, whole_ns: float, tone: str = "") -> tuple[Cell, ...]:
    share = node.time_ns / whole_ns if node.time_ns is not None and whole_ns else None
    return (
        Cell(name, tone),
        Cell(clean(node.module_class, 40), "dim"),
        Cell(f.ns(node.time_ns)),
        Cell(f.share(share), "", None if share is None else min(1.0, max(0.0, share))),
        Cell(f.calls(node.calls)),
        Cell(f.si(node.flops, "FLOP")),
        Cell(f.si(node.bytes, "B")),
        Cell(f.percent(node.pct_of_ceiling)),
        Cell(f.si(node.num_parameters)),
    )


def stems(depths: Sequence[int]) -> list[str]:
    """Tree lines: `├─ `, `└─ `, `│  ` by what follows at each depth."""
    follows: dict[int, bool] = {}  # depth -> whether a sibling at it comes later, before its parent ends
    found = []
    for depth in reversed(depths):
        rails = "".join("│  " if follows.get(level) else "   " for level in range(1, depth))
        found.append(rails + ("" if depth == 0 else "├─ " if follows.get(depth) else "└─ "))
        follows = {level: more for level, more in follows.items() if level < depth}
        follows[depth] = True
    return found[::-1]


def _pct_tone(pct: float | None) -> str:
    if pct is None:
        return "dim"
    return "good" if pct >= 60 else "warn" if pct >= 25 else "bad"
