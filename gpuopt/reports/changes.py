"""Run × Run -> where the difference lies: parts of the waterfall, modules, ops, kernels and lines, before and after. Pure.

Times are one call's and add up on either side, so the differences add up to that of the wall times. What one side does not have is None there, not 0: it came, or it went.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpuopt.core.result import WATERFALL_PARTS, Run, Waterfall
from gpuopt.reports import groups

BY = ("op", "kernel", "line")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One name on both sides, milliseconds a call."""

    name: str
    before_ms: float | None = None
    after_ms: float | None = None
    kind: str = ""
    """A module's class; what a kernel does; a dtype where both sides have the same."""
    before_calls: float | None = None
    after_calls: float | None = None

    @property
    def change_ms(self) -> float:
        """After less before: below zero is time won."""
        return (self.after_ms or 0.0) - (self.before_ms or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Two runs, part by part."""

    run: str
    """What the two have in common."""
    before: str
    after: str
    """What tells them apart; `before` and `after` where nothing does."""
    before_ms: float
    after_ms: float
    """Wall time of a call."""
    waterfall: tuple[Delta, ...] = ()
    """In the order of WATERFALL_PARTS, adding up to the wall times."""
    modules: tuple[Delta, ...] = ()
    """Every module of either, parents first, with all below it; "" is the call, "?" what belongs to none."""
    ops: tuple[Delta, ...] = ()
    kernels: tuple[Delta, ...] = ()
    lines: tuple[Delta, ...] = ()
    """Each by its largest difference first; "?" is what could not be attributed, "" the time outside all of them."""
    notes: tuple[str, ...] = ()


def change(before: Run, after: Run, *, run: str, labels: tuple[str, str] = ("before", "after")) -> Change | None:
    """None where either was not profiled."""
    if before.waterfall is None or after.waterfall is None:
        return None
    by = {name: _grouped(before, after, name) for name in BY}
    return Change(
        run=run,
        before=labels[0],
        after=labels[1],
        before_ms=before.waterfall.wall_ms,
        after_ms=after.waterfall.wall_ms,
        waterfall=tuple(_parts(before.waterfall, after.waterfall)),
        modules=tuple(_modules(before, after)),
        ops=by["op"],
        kernels=by["kernel"] if groups.has_kernels(before) or groups.has_kernels(after) else (),
        lines=by["line"] if groups.has_lines(before) or groups.has_lines(after) else (),
        notes=tuple(_notes(before, after, labels)),
    )


def _parts(before: Waterfall, after: Waterfall) -> Iterable[Delta]:
    mine, other = ({part.name: part.ms for part in fall.parts} for fall in (before, after))
    for name in dict.fromkeys((*WATERFALL_PARTS[:-1], *mine, *other, WATERFALL_PARTS[-1])):
        if name in mine or name in other:
            yield Delta(name=name, before_ms=mine.get(name), after_ms=other.get(name))


def _modules(before: Run, after: Run) -> Iterable[Delta]:
    """Parents before children, in the order of the first run, then what only the second has."""
    sides = [groups.tree(run) for run in (before, after)]
    if not all(side.has_times for side in sides):
        return
    found: list[Mapping[str, groups.Node]] = [
        {node.name: node for node in (*side.nodes, *([side.unknown] if side.unknown else []))} for side in sides
    ]
    for name in dict.fromkeys((*found[0], *found[1])):
        mine, other = found[0].get(name), found[1].get(name)
        yield Delta(
            name=name,
            before_ms=_ms(mine.time_ns) if mine else None,
            after_ms=_ms(other.time_ns) if other else None,
            kind=(mine.module_class if mine else "") or (other.module_class if other else ""),
            before_calls=mine.calls if mine else None,
            after_calls=other.calls if other else None,
        )


def _ms(time_ns: float | None) -> float | None:
    return None if time_ns is None else time_ns / 1e6


def _grouped(before: Run, after: Run, by: str) -> tuple[Delta, ...]:
    sides: list[dict[str, list[groups.Row]]] = []
    outside = []
    for run in (before, after):
        side: dict[str, list[groups.Row]] = {}
        found = groups.grouped(run, by)
        for row in (*found.rows, *([found.unknown] if found.unknown else [])):
            side.setdefault(row.name, []).append(row)
        sides.append(side)
        outside.append(found.outside_ns / 1e6)
    deltas = []
    for name in dict.fromkeys((*sides[0], *sides[1])):
        mine, other = sides[0].get(name), sides[1].get(name)
        kinds = {row.kind for row in (*(mine or ()), *(other or ()))}
        deltas.append(
            Delta(
                name=name,
                before_ms=_sum(row.time_ns for row in mine) / 1e6 if mine else None,
                after_ms=_sum(row.time_ns for row in other) / 1e6 if other else None,
                kind=kinds.pop() if len(kinds) == 1 and name != groups.UNKNOWN else "",
                before_calls=_sum(row.calls for row in mine) if mine else None,
                after_calls=_sum(row.calls for row in other) if other else None,
            )
        )
    deltas.append(Delta(name="", before_ms=outside[0], after_ms=outside[1]))
    return tuple(sorted(deltas, key=lambda d: -abs(d.change_ms)))


def _sum(values: Iterable[float]) -> float:
    return math.fsum(values)


def _notes(before: Run, after: Run, labels: tuple[str, str]) -> Iterable[str]:
    for run, label in zip((before, after), labels, strict=True):
        if run.roofline and not groups.tree(run).has_times:
            yield f"{label}: no time of it could be attributed to a module"
    names = [{part.name for part in run.waterfall.parts} for run in (before, after) if run.waterfall]
    if len(names) == 2 and not names[0] <= names[1] | {"unaccounted"} and not names[1] <= names[0]:
        yield "the two reports name the parts differently: one is of an older version of gpuopt"
