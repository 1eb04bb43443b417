"""The records of a run -> rows by op, kernel, source line or place, and the module tree, each summing to one call. Pure.

A row "?" holds what could not be attributed and `outside_ns` the time in which none of them ran, so that nothing is lost between a table and the wall time. Trace times that add
up to more than the call took untraced (a profiler slows a CPU's ops down, streams of a GPU overlap) are scaled to it, as the waterfall's are; where the waterfall scaled kernels
for their clocks, these are scaled likewise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpuopt.core import kernels
from gpuopt.core.result import KERNELS_SCALED, ModuleRow, RooflinePoint, Run

UNKNOWN = "?"
WAITING = ("copy calls", "launch gaps", "synchronisation", "python and framework", "idle", "unaccounted")
"""Parts of the waterfall in which no kernel and no transfer runs."""
_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")
_OP = re.compile(r"(?:\w+\.)+\w+|memcpy .*")
"""Names of ops (`aten.mm`, `onnx.Conv`) and of our own rows of copies; what else stands under module "?" is a kernel's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one name takes of a call."""

    name: str
    where: tuple[str, ...] = ()
    """Modules it belongs to, numbers as `*`, the one with most time first."""
    ops: tuple[str, ...] = ()
    """Names of its ops, the one with most time first."""
    kind: str = ""
    """The dtype it computes in, or what kind of work a kernel does; "" where that differs."""
    time_ns: float = 0.0
    calls: float = 0.0
    flops: float | None = None
    """Of those that are known; None where none is."""
    bytes: float | None = None
    floor_ns: float | None = None
    """Least time of those that have one."""
    floored_ns: float = 0.0
    """What those take that have one, of `time_ns`."""
    pct_of_ceiling: float | None = None
    """Floor over time of those that have a floor; None where they are less than half of the time."""
    bound: str = "unknown"
    """`compute`, `memory`, `unknown`, or `both`."""
    ceilings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    num_records: int = 1

    @property
    def gap_ns(self) -> float | None:
        """Time above the floor of those that have one: what has none may win nothing. None where none has."""
        return None if self.floor_ns is None else max(0.0, self.floored_ns - self.floor_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """One grouping of a run: `rows`, `unknown` and `outside_ns` add up to `whole_ns`."""

    rows: tuple[Row, ...]
    unknown: Row | None
    """Time that could not be attributed."""
    outside_ns: float
    """Of the call, in which nothing of the trace ran: a device that waits, a host outside any op."""
    whole_ns: float
    """One call, untraced."""
    scale: float
    """What trace times were multiplied by to fit into it; 1 where they did."""

    @property
    def attributed(self) -> float | None:
        """Share of the recorded time in rows with a name, 0..1; None where nothing was timed."""
        missed = self.unknown.time_ns if self.unknown else 0.0
        told = math.fsum(row.time_ns for row in self.rows)
        return told / (told + missed) if told + missed > 0 else None


def alike(module: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`: layers of a stack are one place."""
    return _INDEX.sub(r"\1*", module)


def grouped(run: Run, by: str, sort: str = "time") -> Groups:
    """Rows of `run.roofline` by `op`, `kernel`, `line` or `place` (an op in modules alike), most first by `sort`: `time`, `flops`, `bytes` or `gap`."""
    scale, whole = _fit(run)
    sums: dict[tuple[str, ...], _Sum] = {}
    for key, name, share in _pieces(run.roofline, by):
        sums.setdefault(key, _Sum(name=name)).add(share)
    rows = {key: found.row(scale, by) for key, found in sums.items()}
    unknown = rows.pop((UNKNOWN,), None)
    ordered = sorted(rows.values(), key=lambda row: -_sort_key(row, sort))
    used = math.fsum(row.time_ns for row in (*ordered, *([unknown] if unknown else [])))
    return Groups(rows=tuple(ordered), unknown=unknown, outside_ns=max(0.0, whole - used), whole_ns=whole, scale=scale)


def added(rows: Sequence[Row], name: str) -> Row:
    """Many rows as one."""
    flops = [r.flops for r in rows if r.flops is not None]
    moved = [r.bytes for r in rows if r.bytes is not None]
    floors = [r for r in rows if r.floor_ns is not None]
    time = math.fsum(r.time_ns for r in rows)
    floored = math.fsum(r.floored_ns for r in floors)
    floor = math.fsum(r.floor_ns or 0.0 for r in floors)
    return Row(
        name=name,
        time_ns=time,
        calls=math.fsum(r.calls for r in rows),
        flops=_total(flops, of=len(rows)),
        bytes=_total(moved, of=len(rows)),
        floor_ns=floor if floors else None,
        floored_ns=floored,
        pct_of_ceiling=100.0 * floor / floored if floored and floored >= 0.5 * time else None,
        num_records=sum(r.num_records for r in rows),
    )


def _total(known: Sequence[float], *, of: int) -> float | None:
    """The sum of what is known; None where that is nothing, or nothing but zeros beside figures that are not known: "0 FLOP" would be a claim about those."""
    total = math.fsum(known)
    return total if known and (total or len(known) == of) else None


def has_kernels(run: Run) -> bool:
    """Whether the report says which kernels ran."""
    return any(point.kernels for point in run.roofline)


def has_lines(run: Run) -> bool:
    return any(point.line for point in run.roofline)


def _fit(run: Run) -> tuple[float, float]:
    """(what to multiply trace times by, the whole call in ns)."""
    recorded = math.fsum(point.time_ns or 0.0 for point in run.roofline)
    wall = run.waterfall.wall_ms * 1e6 if run.waterfall else (run.latency_ms.median * 1e6 if run.latency_ms else 0.0)
    if wall <= 0 or not recorded:
        return 1.0, recorded if wall <= 0 else wall
    if run.waterfall and KERNELS_SCALED in run.waterfall.method:  # up or down: the device was never idle, or busier than the call was long
        waiting = math.fsum(p.ms for p in run.waterfall.parts if p.name in WAITING) * 1e6
        return max(0.0, wall - waiting) / recorded, wall
    return min(1.0, wall / recorded), wall


def _sort_key(row: Row, sort: str) -> float:
    return {"time": row.time_ns, "flops": row.flops, "bytes": row.bytes, "gap": row.gap_ns}[sort] or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """A record, or what one kernel did of it."""

    point: RooflinePoint
    time_ns: float
    calls: float
    flops: float | None
    bytes: float | None
    floor_ns: float | None
    kind: str


def _whole(point: RooflinePoint) -> _Share:
    return _Share(
        point=point,
        time_ns=point.time_ns or 0.0,
        calls=point.count,
        flops=point.flops,
        bytes=point.bytes,
        floor_ns=point.floor_ns,
        kind=point.dtype or "",
    )


def _pieces(points: Iterable[RooflinePoint], by: str) -> Iterator[tuple[tuple[str, ...], str, _Share]]:
    """(key, name, share); the key ("?",) is what cannot be attributed."""
    for point in points:
        if by == "kernel":
            yield from _of_kernels(point)
            continue
        name, share = point.name, _whole(point)
        if point.module == UNKNOWN and not _OP.fullmatch(point.name):
            name = kernels.short(point.name)
            if by == "op":
                yield (UNKNOWN,), UNKNOWN, share
                continue
        if by == "line":
            yield ((point.line,), point.line, share) if point.line else ((UNKNOWN,), UNKNOWN, share)
        elif by == "op":
            yield (name, point.dtype or ""), name, share
        else:
            yield (name, point.dtype or "", alike(point.module)), name, share


def _of_kernels(point: RooflinePoint) -> Iterator[tuple[tuple[str, ...], str, _Share]]:
    """Each kernel's own time. FLOPs, bytes and floor are known of an op: they go with its kernel where it has one, else nowhere."""
    if not point.kernels:
        yield (UNKNOWN,), UNKNOWN, _whole(point)
        return
    alone = len(point.kernels) == 1
    for kernel in point.kernels:
        name, kind = kernels.short(kernel.name), kernels.kind(kernel.name)
        share = _Share(
            point=point,
            time_ns=kernel.time_ns,
            calls=kernel.count,
            flops=point.flops if alone else None,
            bytes=point.bytes if alone else None,
            floor_ns=point.floor_ns if alone else None,
            kind=kind,
        )
        yield (name, kind), name, share


@dataclass(slots=True)
class _Sum:
    name: str
    shares: list[_Share] = field(default_factory=list)

    def add(self, share: _Share) -> None:
        self.shares.append(share)

    def row(self, scale: float, by: str) -> Row:
        shares = self.shares
        time = math.fsum(s.time_ns for s in shares)
        floored = [s for s in shares if s.floor_ns is not None and s.time_ns > 0]
        floor, under = math.fsum(s.floor_ns or 0.0 for s in floored), math.fsum(s.time_ns for s in floored)
        flops, moved = [s.flops for s in shares if s.flops is not None], [s.bytes for s in shares if s.bytes is not None]
        places = _most((alike(s.point.module), s.time_ns) for s in shares)
        kinds = {s.kind for s in shares}
        bounds = _most((s.point.bound, s.time_ns) for s in floored)
        return Row(
            name=self.name,
            where=tuple(places),
            ops=tuple(_most((s.point.name, s.time_ns) for s in shares)) if by == "line" else (),
            kind=kinds.pop() if len(kinds) == 1 else "",
            time_ns=time * scale,
            calls=math.fsum(s.calls for s in shares),
            flops=_total(flops, of=len(shares)),
            bytes=_total(moved, of=len(shares)),
            floor_ns=floor if floored else None,
            floored_ns=under * scale,
            pct_of_ceiling=100.0 * floor / (under * scale) if under * scale and under >= 0.5 * time else None,
            bound="unknown" if not bounds else bounds[0] if len(bounds) == 1 else "both",
            ceilings=tuple(_most((s.point.ceiling, s.time_ns) for s in floored if s.point.ceiling)),
            notes=tuple(dict.fromkeys(s.point.note for s in shares if s.point.note)) if by in ("op", "place") else (),
            num_records=len(shares),
        )


def _most(items: Iterable[tuple[str, float]]) -> list[str]:
    """Names by the sum of their figures, largest first."""
    sums: dict[str, float] = {}
    for name, value in items:
        sums[name] = sums.get(name, 0.0) + value
    return sorted(sums, key=lambda name: -sums[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A module with everything below it."""

    name: str
    """Qualified; "" is the whole call."""
    module_class: str = ""
    depth: int = 0
    time_ns: float | None = None
    calls: float | None = None
    """Of ops."""
    flops: float | None = None
    bytes: float | None = None
    pct_of_ceiling: float | None = None
    num_parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The call and its modules, in the order they run, to any depth; `own`, `unknown` and `outside_ns` are what of the call no module below the root has."""

    nodes: tuple[Node, ...]
    own: Node | None
    """Ops the root runs itself."""
    unknown: Node | None
    outside_ns: float
    whole_ns: float
    scale: float
    has_times: bool
    """Whether times are known below the root."""

    @property
    def attributed(self) -> float | None:
        """Share of the recorded time that belongs to a module, 0..1."""
        used = self.whole_ns - self.outside_ns
        return (used - ((self.unknown.time_ns or 0.0) if self.unknown else 0.0)) / used if used > 0 else None


def tree(run: Run) -> Tree:
    """The module tree of a run: names, FLOPs and bytes of `run.modules` where it has them, else of its records; times of the records."""
    scale, whole = _fit(run)
    known = {row.name: row for row in run.modules}
    below: dict[str, list[RooflinePoint]] = {}
    own: dict[str, list[RooflinePoint]] = {}
    for point in run.roofline:
        if point.module == UNKNOWN:
            own.setdefault(UNKNOWN, []).append(point)
            continue
        own.setdefault(point.module, []).append(point)
        for name in _path(point.module):
            below.setdefault(name, []).append(point)
    has_times = any(name for name in below) or (not run.roofline and any(r.name and r.time_ns is not None for r in run.modules))
    used = math.fsum(point.time_ns or 0.0 for point in run.roofline) * scale
    order = {name: at for at, name in enumerate(dict.fromkeys(["", *known, *(n for name in below for n in _path(name))]))}
    nodes = [_node(name, known.get(name), below.get(name, []), scale, has_times, whole) for name in order]
    nodes.sort(key=lambda node: tuple(order.get(name, order[node.name]) for name in _path(node.name)))
    mine = own.get("", []) if len(nodes) > 1 else []
    return Tree(
        nodes=tuple(nodes),
        own=_node("", None, mine, scale, True, None) if mine and has_times else None,
        unknown=_node(UNKNOWN, None, own[UNKNOWN], scale, True, None) if UNKNOWN in own else None,
        outside_ns=max(0.0, whole - used) if run.roofline else 0.0,
        whole_ns=whole,
        scale=scale,
        has_times=has_times,
    )


def _node(name: str, row: ModuleRow | None, points: Sequence[RooflinePoint], scale: float, has_times: bool, whole: float | None) -> Node:
    time = math.fsum(p.time_ns or 0.0 for p in points) * scale if points else None
    if not points and row is not None:
        time = row.time_ns
    floors = [min(p.floor_ns or 0.0, (p.time_ns or 0.0) * scale) for p in points]
    known_flops = bool(points) and all(p.flops is not None for p in points)
    known_bytes = bool(points) and all(p.bytes is not None for p in points)
    is_root = name == "" and whole is not None
    if is_root:
        time = whole or time
    return Node(
        name=name,
        module_class=row.module_class if row else "",
        depth=0 if is_root else row.depth if row else name.count(".") + 1,
        time_ns=time if has_times or is_root else None,
        calls=sum(p.count for p in points) if points else None,
        flops=row.flops if row else math.fsum(p.flops or 0.0 for p in points) if known_flops else None,
        bytes=row.bytes if row else math.fsum(p.bytes or 0.0 for p in points) if known_bytes else None,
        pct_of_ceiling=100.0 * math.fsum(floors) / time
        if time and floors and any(floors)
        else row.pct_of_ceiling
        if row and not points
        else None,
        num_parameters=row.num_parameters if row else None,
    )


def times(run: Run) -> Mapping[str, Node]:
    """Qualified name -> module, the root left out; "?" is what belongs to none."""
    found = tree(run)
    return {node.name: node for node in (*found.nodes[1:], *([found.unknown] if found.unknown else []))}


def _path(module: str) -> list[str]:
    """`a.b` -> ["", "a", "a.b"]."""
    parts = module.split(".") if module else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
