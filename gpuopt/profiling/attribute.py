"""Trace + Count -> op records with times, and the module tree.

A kernel belongs to the op that launched it (correlation id, then time on the launching thread), the op to the module whose range encloses it. FLOPs and bytes come from the
count of the same module, op and shapes; a count row that the trace runs more or less often is scaled by calls. Compiled code and CUDA graphs have no ranges: there a kernel
belongs to the launch of the artifact it is aligned with, or to the op that launches the same kernel without the graph (launched.py). What cannot be attributed is a row of its
own, module "?", under its own name: its time is never spread over others, its FLOPs are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpuopt.core.launches import Launch
from gpuopt.core.result import Ceilings, Count, KernelTime, ModuleRow, OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.core.trace import KINETO_DTYPES, CpuOp, Trace
from gpuopt.profiling import formulas, launched, roofline

UNKNOWN_MODULE = "?"


@dataclass(slots=True)
class _Row:
    """Time gathered for one output row."""

    op: str
    module: str
    module_class: str
    shapes: str
    dtype: str | None
    time_ns: float = 0.0
    launches: int = 0
    instances: set[Hashable] = field(default_factory=set)
    kernels: dict[str, float] = field(default_factory=dict)
    kernel_launches: dict[str, int] = field(default_factory=dict)
    sources: tuple[OpRecord, ...] = ()
    """The count rows behind it."""
    is_exact: bool = True
    """False when only module and op agree with the count, not the shapes: then the count's sum stands, whatever the number of calls."""
    flops: float | None = None
    bytes: float | None = None
    """A call, where the count has no row."""
    line: str = ""
    """Where the artifact says it comes from; "": the count's lines stand."""
    told: dict[int, Launch] = field(default_factory=dict)
    """Launches that carry their own FLOPs and bytes, each run once a call."""


def attribute(trace: Trace, count: Count, *, launches: Sequence[Launch] = (), twin: Trace | None = None) -> tuple[OpRecord, ...]:
    """Records in order of their time, longest first; times and FLOPs are of one forward (the mean over the traced steps).

    On a device the time is that of kernels and copies; without one it is each op's self time. Copies between host and device are rows `memcpy h2d`, `memcpy d2h`.

    Parameters
    ----------
    launches: what the traced artifact launches in a call, in order. A product's row is its module's in the count; ops fused into one kernel are one row that names them.
    twin: the same call as it was recorded into a CUDA graph, traced without the graph and with module ranges.
    """
    steps = max(1, len(trace.steps))
    index = _Index(count)
    wrappers = _wrappers(trace, index)
    rows: dict[tuple[str, ...], _Row] = {}
    origins = launched.origins(trace, launches, index.by_op) if launches else {}
    if trace.on_device:
        again = launched.by_twin(trace, twin) if twin is not None else {}
        twin_wrappers = _wrappers(twin, index) if twin is not None else set()
        for at, kernel in enumerate(trace.kernels):
            if kernel.step is None:
                continue
            if at in origins:
                row = _made_row(index, rows, origins[at], kernel.step)
            elif twin is not None and at in again:
                row = _row_of(twin, index, twin_wrappers, rows, again[at], kernel.name, is_graph=False, step=kernel.step)
            else:
                row = _row_of(trace, index, wrappers, rows, kernel.op, kernel.name, is_graph=kernel.graph_id is not None)
            _add(row, kernel.dur_ns, kernel.name)
        for transfer in trace.copies:
            if transfer.step is None:
                continue
            if transfer.kind in ("h2d", "d2h"):
                row = _copy_row(trace, rows, transfer.op, transfer.kind, transfer.memory)
                row.bytes = (row.bytes or 0.0) + transfer.bytes / steps
            else:
                row = _row_of(trace, index, wrappers, rows, transfer.op, f"Memcpy {transfer.kind}", is_graph=False)
            _add(row, transfer.dur_ns, f"Memcpy {transfer.kind}" + (f" ({transfer.memory})" if transfer.memory else ""))
    else:
        for op in trace.ops:
            if op.step is None:
                continue
            origin = next((origins[o.index] for o in trace.chain(op.index) if o.index in origins), None) if origins else None
            if origin is not None:
                row = _made_row(index, rows, origin, op.step)
            else:
                row = _row_of(trace, index, wrappers, rows, op.index, op.name, is_graph=False)
            _add(row, op.self_ns, "")
    in_part = {origin.module for origin in origins.values() if origin.is_part}
    records = _residual([_finish(row, steps) for row in rows.values()], count, in_part)
    return tuple(sorted(records, key=lambda r: -(r.time_ns or 0.0)))


def _made_row(index: _Index, rows: dict[tuple[str, ...], _Row], origin: launched.Origin, step: int) -> _Row:
    """The row of a kernel whose launch is known."""
    first = max(origin.sources, key=lambda r: r.flops or 0.0) if origin.sources else None
    row = rows.setdefault(
        ("launch", origin.module, origin.op),
        _Row(
            op=origin.op,
            module=origin.module,
            module_class=index.classes.get(origin.module, ""),
            shapes=first.shapes if first is not None else "",
            dtype=first.dtype if first is not None else None,
            is_exact=False,
            sources=origin.sources,
            flops=origin.flops,
        ),
    )
    row.line = ", ".join(dict.fromkeys(filter(None, [*row.line.split(", "), origin.line])))
    row.instances.add((step, origin.launch))
    if origin.told is not None:
        at, launch = origin.told
        row.told[at] = launch
        row.dtype = row.dtype or launch.dtype
    return row


def _residual(records: list[OpRecord], count: Count, in_part: Container[str]) -> list[OpRecord]:
    """A fused product (cuDNN's LSTM) whose module was counted in parts, on another device, gets what the module's other rows leave of its count.

    Only where it is the module's one row of that kind: two would have to share, and nothing says how; nor where some of its time went elsewhere (`in_part`).
    """
    fused: dict[str, list[int]] = {}
    for at, record in enumerate(records):
        if (
            record.flops is None
            and record.module not in in_part
            and record.module != UNKNOWN_MODULE
            and formulas.is_product(record.op.replace(".", "::", 1))
        ):
            fused.setdefault(record.module, []).append(at)
    for module, places in fused.items():
        counted = [r for r in count.records if r.module == module]
        if len(places) != 1 or any(r.flops is None for r in counted):
            continue
        left = math.fsum(r.flops or 0.0 for r in counted) - math.fsum(r.flops or 0.0 for r in records if r.module == module)
        if left > 0:
            dtype = max((r for r in counted if r.flops), key=lambda r: r.flops or 0.0).dtype
            records[places[0]] = replace(records[places[0]], flops=left, dtype=dtype)
    return records


def coverage(records: Iterable[OpRecord]) -> float:
    """Share of the time in records whose FLOPs are known (0 is known), 0..1; 0 where nothing was timed."""
    rows = list(records)
    total = math.fsum(r.time_ns or 0.0 for r in rows)
    return math.fsum(r.time_ns or 0.0 for r in rows if r.flops is not None) / total if total else 0.0


def _add(row: _Row, dur_ns: int, kernel: str) -> None:
    row.time_ns += dur_ns
    row.launches += 1
    if kernel:
        row.kernels[kernel] = row.kernels.get(kernel, 0.0) + dur_ns
        row.kernel_launches[kernel] = row.kernel_launches.get(kernel, 0) + 1


class _Index:
    """Count rows by what a trace can know of them."""

    def __init__(self, count: Count) -> None:
        self.exact: dict[tuple[str, str, str], list[OpRecord]] = {}
        self.by_op: dict[tuple[str, str], list[OpRecord]] = {}
        anywhere: dict[tuple[str, str], list[OpRecord]] = {}
        for record in count.records:
            canon = formulas.canonical(record.op.replace(".", "::", 1))
            self.exact.setdefault((record.module, canon, record.shapes), []).append(record)
            self.by_op.setdefault((record.module, canon), []).append(record)
            anywhere.setdefault((canon, _key_shapes(canon, record.shapes)), []).append(record)
        self.classes = {r.module: r.module_class for r in count.records}
        self.anywhere: dict[tuple[str, str], OpRecord] = {}
        for key, found in anywhere.items():
            costs = {(r.flops / r.count if r.flops is not None else None, r.dtype) for r in found}
            if len(costs) == 1 and found[0].flops is not None:  # the same shapes cost the same wherever they are called
                self.anywhere[key] = found[0]

    def match(self, trace: Trace, op: int | None, wrappers: Container[int] = ()) -> tuple[CpuOp, str, str, bool] | None:
        """(op of the chain, module, canonical name, whether its shapes match too) or None.

        The outermost match wins: the count stops where PyTorch dispatches, so whatever runs inside a counted op is part of it.
        """
        chain = [o for o in trace.chain(op) if o.module is not None]
        loose: tuple[CpuOp, str, str, bool] | None = None
        for candidate in reversed(chain):
            module, canon = str(candidate.module), formulas.canonical(candidate.name)
            if (module, canon, shapes_text(candidate.shapes)) in self.exact:
                return candidate, module, canon, True
            if loose is None and candidate.index not in wrappers and (module, canon) in self.by_op:
                loose = candidate, module, canon, False
        return loose


def _key_shapes(canon: str, shapes: str) -> str:
    """A folded bias or a mask more or less does not change a product's cost: compare its operands alone."""
    keep = {"convolution": 2, "attention": 3}.get(canon)
    return ", ".join(shapes.split(", ")[:keep]) if keep else shapes


def shapes_text(shapes: tuple[tuple[int, ...], ...]) -> str:
    """As count.shapes_text writes them."""
    return ", ".join("x".join(str(n) for n in shape) for shape in shapes)


def _wrappers(trace: Trace, index: _Index) -> set[int]:
    """Ops whose products are done by an op below them: what is left to themselves is dispatch, not work."""
    found: set[int] = set()
    for op in trace.ops:
        if op.step is None or op.parent is None or op.parent in found:
            continue
        is_product = formulas.is_product(op.name)
        if not is_product:
            match = index.match(trace, op.index)
            is_product = match is not None and match[0].index == op.index and any(r.flops != 0 for r in index.by_op[match[1], match[2]])
        if is_product:
            for above in trace.chain(op.parent):
                if above.index in found:
                    break
                found.add(above.index)
    return found


def _row_of(
    trace: Trace,
    index: _Index,
    wrappers: set[int],
    rows: dict[tuple[str, ...], _Row],
    op: int | None,
    kernel: str,
    *,
    is_graph: bool,
    step: int = 0,
) -> _Row:
    """`step` tells calls apart where one traced op stands for the same one in several steps."""
    match = None if is_graph else index.match(trace, op, wrappers)
    if match is not None:
        found, module, canon, is_exact = match
        shapes = shapes_text(found.shapes) if is_exact else "*"
        sources = index.exact[module, canon, shapes] if is_exact else index.by_op[module, canon]
        first = max(sources, key=lambda r: r.count)
        row = rows.setdefault(
            ("count", module, canon, shapes),
            _Row(
                # The count may have been made for another device: `…_for_cpu` would be no name for a GPU's kernel.
                op=found.name.replace("::", ".", 1) if "::" not in canon and "." not in canon else first.op,
                module=module,
                module_class=first.module_class,
                shapes=first.shapes,
                dtype=first.dtype,
                sources=tuple(sources),
                is_exact=is_exact,
            ),
        )
        row.instances.add((step, found.index))
        return row
    innermost = next(iter(trace.chain(op)), None)
    if is_graph or innermost is None or "::" not in innermost.name:
        module = innermost.module if innermost is not None and innermost.module is not None and not is_graph else UNKNOWN_MODULE
        name = kernel if is_graph or trace.on_device or innermost is None else innermost.name
        row = rows.setdefault(("kernel", module, name), _Row(op=name, module=module, module_class="", shapes="", dtype=None))
        if name.startswith((*launched.WITHOUT_PRODUCTS, "Memset", "Memcpy")):
            row.flops = 0.0
        return row
    module = innermost.module if innermost.module is not None else UNKNOWN_MODULE
    shapes = shapes_text(innermost.shapes)
    key = ("op", module, innermost.name, shapes)
    row = rows.get(key) or rows.setdefault(
        key,
        _Row(
            op=innermost.name.replace("::", ".", 1),
            module=module,
            module_class=innermost.module_class,
            shapes=shapes,
            dtype=next((KINETO_DTYPES[t] for t in innermost.dtypes if t in KINETO_DTYPES), None),
        ),
    )
    row.instances.add((step, innermost.index))
    if len(row.instances) == 1 and row.flops is None:
        row.flops, row.bytes, row.dtype = _cost(innermost, index, row.dtype, is_wrapper=innermost.index in wrappers)
    if innermost.flops is not None and innermost.line:
        row.line = ", ".join(dict.fromkeys([*filter(None, row.line.split(", ")), innermost.line]))
    return row


def _cost(op: CpuOp, index: _Index, dtype: str | None, *, is_wrapper: bool) -> tuple[float | None, float | None, str | None]:
    """(FLOPs, bytes, dtype) of one call of an op the count has no row of in its module."""
    if op.flops is not None:  # whoever traced it knows
        return op.flops, op.bytes, dtype
    if is_wrapper:
        return 0.0, 0.0, dtype
    canon = formulas.canonical(op.name)
    known = index.anywhere.get((canon, _key_shapes(canon, shapes_text(op.shapes))))
    if known is not None and known.flops is not None:
        return known.flops / known.count, (known.bytes or 0.0) / known.count, known.dtype
    flops = formulas.flops_from_shapes(op.name, op.shapes)
    if not flops:
        return flops, None, dtype
    width = DTYPE_BYTES.get(dtype or "")
    if width is None:
        return flops, None, dtype
    sizes = [math.prod(s) for s in op.shapes]
    # Output elements: an attention's are its query's, a product's are its FLOPs over 2·k.
    left = (
        op.shapes[1]
        if formulas.family(op.name) in ("aten::addmm", "aten::baddbmm", "aten::_addmm_activation", "aten::addbmm")
        else op.shapes[0]
    )
    written = sizes[0] if canon == "attention" else flops / (2.0 * left[-1])
    return flops, (math.fsum(sizes) + written) * width, dtype


def _copy_row(trace: Trace, rows: dict[tuple[str, ...], _Row], op: int | None, kind: str, memory: str) -> _Row:
    innermost = next(iter(trace.chain(op)), None)
    module = innermost.module if innermost is not None and innermost.module is not None else UNKNOWN_MODULE
    name = f"memcpy {kind}" + (f" ({memory})" if memory else "")
    row = rows.setdefault(
        ("copy", module, name),
        _Row(op=name, module=module, module_class=innermost.module_class if innermost else "", shapes="", dtype=None),
    )
    row.flops = 0.0
    return row


def _finish(row: _Row, steps: int) -> OpRecord:
    flops, moved = row.flops, row.bytes
    calls = len(row.instances) / steps if row.instances else row.launches / steps
    if row.sources:
        runs = calls / sum(r.count for r in row.sources) if row.is_exact else 1.0
        known = [r.flops for r in row.sources if r.flops is not None]
        flops = math.fsum(known) * runs if len(known) == len(row.sources) else None
        moved = math.fsum(r.bytes or 0.0 for r in row.sources) * runs
    elif row.told:
        known = [launch.flops for launch in row.told.values() if launch.flops is not None]
        flops = math.fsum(known) if len(known) == len(row.told) else None
        moved = math.fsum(launch.bytes or 0.0 for launch in row.told.values())
    elif row.instances:
        flops = flops * calls if flops is not None else None
        moved = moved * calls if moved is not None else None
    names = sorted(row.kernels, key=lambda k: (-row.kernels[k], k))
    return OpRecord(
        op=row.op,
        module=row.module,
        dtype=row.dtype,
        count=max(1, round(calls)),
        time_ns=row.time_ns / steps,
        flops=flops,
        bytes=moved,
        kernels=tuple(names),
        kernel_times=tuple(KernelTime(name=k, time_ns=row.kernels[k] / steps, count=row.kernel_launches[k] / steps) for k in names),
        line=row.line or ", ".join(dict.fromkeys(r.line for r in row.sources if r.line)) or None,
        module_class=row.module_class,
        shapes=row.shapes,
    )


def modules(
    records: Iterable[OpRecord],
    count: Count,
    wall_ms: float | None = None,
    *,
    ceilings: Ceilings | None = None,
    parameters: Mapping[str, int] | None = None,
    classes: Mapping[str, str] | None = None,
) -> tuple[ModuleRow, ...]:
    """The module tree, each row with everything below it, in the order of execution; first the root.

    FLOPs and bytes are the count's, so they are there for compiled models too; times are the records'. Time that belongs to no module ("?") is in the root alone.

    Parameters
    ----------
    records: from `attribute`; empty where nothing was traced, then times are None but the root's, which is `wall_ms`.
    ceilings: adds `pct_of_ceiling`, the floor of each module's ops over its time.
        An op that a cache served faster than memory could counts as at its ceiling, not above.
    parameters, classes: from `count.module_parameters` and `count.module_classes`; without them containers that run no op of their own have neither.
    """
    timed = list(records)
    has_modules = any(r.module not in ("", UNKNOWN_MODULE) for r in timed)
    names: dict[str, str] = {"": ""}
    for record in count.records:
        for name in _path(record.module):
            names.setdefault(name, "")
        names[record.module] = record.module_class or names[record.module]
    for record in timed:
        if record.module != UNKNOWN_MODULE:
            for name in _path(record.module):
                names.setdefault(name, "")
            names[record.module] = record.module_class or names[record.module]
    flops: dict[str, list[float]] = {}
    moved: dict[str, list[float]] = {}
    unknown: set[str] = set()
    for record in count.records:
        for name in _path(record.module):
            flops.setdefault(name, []).append(record.flops or 0.0)
            moved.setdefault(name, []).append(record.bytes or 0.0)
            if record.flops is None:
                unknown.add(name)
    times: dict[str, list[float]] = {}
    floors: dict[str, list[float]] = {}
    for record in timed:
        for name in [""] if record.module == UNKNOWN_MODULE else _path(record.module):
            times.setdefault(name, []).append(record.time_ns or 0.0)
            if ceilings is not None:
                floors.setdefault(name, []).append(min(roofline.floor_ns(record, ceilings)[0] or 0.0, record.time_ns or 0.0))
    total = math.fsum(times.get("", ())) or (wall_ms or 0.0) * 1e6
    rows = []
    for name in names:
        if name == "":
            time_ns: float | None = total or None
        else:
            time_ns = math.fsum(times.get(name, ())) if has_modules else None
        is_known = name not in unknown and name in flops
        rows.append(
            ModuleRow(
                name=name,
                module_class=(classes or {}).get(name, names[name]),
                depth=0 if name == "" else name.count(".") + 1,
                time_ns=time_ns,
                flops=math.fsum(flops[name]) if is_known else None,
                bytes=math.fsum(moved[name]) if name in moved else None,
                num_parameters=(parameters or {}).get(name, count.num_parameters if name == "" else None),
                pct_of_time=100.0 * time_ns / total if time_ns is not None and total else None,
                pct_of_ceiling=100.0 * math.fsum(floors[name]) / time_ns if time_ns and floors.get(name) else None,
            )
        )
    return tuple(sorted(rows, key=_tree_order(list(names))))


def _path(module: str) -> list[str]:
    """`a.b` -> ["", "a", "a.b"]."""
    if module == "":
        return [""]
    parts = module.split(".")
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _tree_order(names: list[str]) -> Callable[[ModuleRow], tuple[int, ...]]:
    """Parents before children, siblings as they first ran."""
    seen = {name: at for at, name in enumerate(names)}
    return lambda row: tuple(seen[name] for name in _path(row.name))
