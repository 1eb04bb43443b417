"""A trace whose kernels carry no module (compiled code, CUDA-graph replays) + what was to be launched, or the same call traced without its graph -> where each kernel comes from."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpuopt.core import kernels as kernel_names
from gpuopt.core.launches import Launch, module_of
from gpuopt.core.result import OpRecord
from gpuopt.core.trace import Kernel, Trace
from gpuopt.profiling import align, formulas

WITHOUT_PRODUCTS = ("triton_poi_", "triton_red_", "triton_per_", "triton_for_")
"""Inductor names its generated kernels by kind; pointwise, reduction and persistent reduction hold no products (templates, `triton_tem_`, do)."""

_SHOWN_OPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a kernel comes from."""

    launch: int
    module: str
    op: str
    """`aten.addmm`; `add+native_layer_norm` where ops were fused."""
    line: str
    sources: tuple[OpRecord, ...]
    """Rows of the count whose FLOPs its module's launches of this op are, all together."""
    flops: float | None
    """A call, where there are none: 0 where nothing multiplies in it, None where that is not known."""
    is_part: bool = False
    """Not all of its module's launches of this op were found: the count's sum is more than these kernels did."""
    told: tuple[int, Launch] | None = None
    """The launch and its index, where its maker tells the work itself: `launch` is then the first one of the same node."""


def origins(trace: Trace, launches: Sequence[Launch], counted: Mapping[tuple[str, str], Sequence[OpRecord]]) -> dict[int, Origin]:
    """Index of a kernel in the trace, or without a device of an op, -> its origin; what could not be aligned is missing.

    counted: (module, canonical op) -> rows of the count. A compiler may turn an `addmm` into an `mm`, so products are looked up by their kind. Their sum is known only where
    all of a module's launches were found in every step.
    """
    products: dict[tuple[str, str], list[OpRecord]] = {}
    for (module, canon), rows in counted.items():
        products.setdefault((module, align.group(canon) or canon), []).extend(rows)
    found = by_launch(trace, launches)
    places = [_place_of(launch, products) for launch in launches]
    total: dict[tuple[str, str], int] = {}
    for place in places:
        total[place] = total.get(place, 0) + 1
    per_step: dict[tuple[str, str], dict[int, set[int]]] = {}
    for at, launch in found.items():
        step = (trace.kernels if trace.on_device else trace.ops)[at].step
        per_step.setdefault(places[launch], {}).setdefault(step or 0, set()).add(launch)
    heads: dict[str, int] = {}
    for at, one in enumerate(launches):
        heads.setdefault(one.name, at)
    made = {}
    for launch in set(found.values()):
        place, seen = places[launch], per_step[places[launch]]
        rows = products.get(place, [])
        # A graph compiled for other sizes is listed and does not run; a compiler may run fewer ops than were counted.
        wanted = min(total[place], sum(r.count for r in rows))
        is_complete = len(seen) == len(trace.steps) and min(map(len, seen.values())) >= wanted
        made[launch] = _origin(launch, launches[launch], place, tuple(rows), is_complete=is_complete, head=heads[launches[launch].name])
    return {at: made[launch] for at, launch in found.items()}


def _origin(at: int, launch: Launch, place: tuple[str, str], rows: tuple[OpRecord, ...], *, is_complete: bool, head: int) -> Origin:
    name = f"aten.{launch.name.rpartition('.')[2]}" if launch.name.startswith("extern_kernels.") else launch.name
    if launch.kind == "node" and launch.dtype is not None:
        return Origin(
            launch=head,
            module=place[0],
            op=launch.ops[0] if len(launch.ops) == 1 else fused_text(launch),
            line=launch.lines[-1] if launch.lines else "",
            sources=(),
            flops=launch.flops,
            told=(at, launch),
        )
    if launch.kind != "extern":
        name = max(rows, key=lambda r: r.flops or 0.0).op if rows and launch.kind == "triton" else fused_text(launch)
    is_zero = launch.name.startswith(WITHOUT_PRODUCTS) or (launch.kind == "extern" and formulas.is_known_zero(name.replace(".", "::", 1)))
    return Origin(
        launch=at,
        module=place[0],
        op=name,
        line=launch.lines[-1] if launch.lines else "",
        sources=rows if is_complete else (),
        flops=0.0 if is_zero and not rows else None,
        is_part=not is_complete,
    )


def _place_of(launch: Launch, products: Mapping[tuple[str, str], Sequence[OpRecord]]) -> tuple[str, str]:
    """(module, kind of product or canonical op); the second is "" for what the count cannot have a row of."""
    module = module_of(launch) or ""
    if launch.kind == "triton":
        kind = kernel_names.kind(launch.name)
        return module, kind if kind in ("product", "attention") else ""
    canons = [canonical(launch.name)] if launch.kind == "extern" else [formulas.canonical(op.replace(".", "::", 1)) for op in launch.ops]
    keys = [align.group(canon) or canon for canon in canons]
    return module, next((key for key in keys if (module, key) in products), keys[0] if keys else "")


def fused_text(launch: Launch) -> str:
    """`add+native_layer_norm`: the ops in it as its maker names them; its own name where it names none."""
    names = list(dict.fromkeys(op.rpartition(".")[2] for op in launch.ops))
    more = len(names) - _SHOWN_OPS
    return "+".join(names[:_SHOWN_OPS]) + (f"+{more} more" if more > 0 else "") if names else launch.name


def canonical(name: str) -> str:
    """`extern_kernels.addmm`, `aten.addmm`, `addmm` -> what formulas.canonical calls the op."""
    namespace, _, plain = name.removeprefix("extern_kernels.").rpartition(".")
    return formulas.canonical(f"{namespace or 'aten'}::{'addmm' if plain == 'bias_addmm' else plain}")


def by_launch(trace: Trace, launches: Sequence[Launch]) -> dict[int, int]:
    """Index of a kernel in the trace -> index of its launch. What belongs to none, or to one of which no module is known, is missing.

    Without a device the same of ops: a generated C++ kernel shows in no trace of a CPU, the library's ops between them do.
    """
    known = {canonical(launch.name) for launch in launches if launch.kind == "extern"}
    found: dict[int, int] = {}
    seen: dict[tuple[object, ...], list[int | None]] = {}
    work = _steps(trace) if trace.on_device else _called(trace)
    for kernels in work.values():
        if trace.on_device:
            ran = [_ran(trace, trace.kernels[at], known) for at in kernels]
        else:
            ran = [_ran_on_host(trace, at, known) for at in kernels]
        # The steps of a trace mostly run the same kernels: what counts is which of them share a call, not that call's number.
        calls: dict[Hashable, int] = {}
        key = tuple((r.name, r.op, r.is_foreign, calls.setdefault(r.instance, len(calls))) for r in ran)
        if key not in seen:
            seen[key] = align.match(ran, launches, canonical)
        found |= {at: launch for at, launch in zip(kernels, seen[key], strict=True) if launch is not None}
    return {at: launch for at, launch in found.items() if module_of(launches[launch]) is not None}


def by_twin(trace: Trace, twin: Trace) -> dict[int, int]:
    """Index of a replayed kernel in the trace -> index of the op in the twin that launches the same kernel: of the same name, in the same order.

    twin: the same call without its graph, with module ranges. A graph may hold a few kernels more or less (copies, what a model does differently while it is recorded).
    """
    reference = next(iter(_steps(twin).values()), [])
    ops = [twin.kernels[at].op for at in reference]
    names = [twin.kernels[at].name for at in reference]
    places = [_place(twin, op) for op in ops]
    found: dict[int, int] = {}
    seen: dict[tuple[str, ...], list[int | None]] = {}
    for kernels in _steps(trace, only_graphs=True).values():
        ran = tuple(trace.kernels[at].name for at in kernels)
        if ran not in seen:
            seen[ran] = align.common(ran, names, lambda a, b: a == b, settled=lambda a, b: places[a] == places[b])
        for at, partner in zip(kernels, seen[ran], strict=True):
            op = ops[partner] if partner is not None else None
            if op is not None:
                found[at] = op
    return found


def _steps(trace: Trace, *, only_graphs: bool = False) -> dict[int, list[int]]:
    """Step -> its kernels, in order of their start."""
    found: dict[int, list[int]] = {}
    for at, kernel in enumerate(trace.kernels):
        if kernel.step is not None and (kernel.graph_id is not None or not only_graphs):
            found.setdefault(kernel.step, []).append(at)
    return found


def _called(trace: Trace) -> dict[int, list[int]]:
    """Step -> the ops nothing but compiled code is around, in order."""
    found: dict[int, list[int]] = {}
    for op in trace.ops:
        if op.step is not None and "::" in op.name and not any("::" in above.name for above in trace.chain(op.parent)):
            found.setdefault(op.step, []).append(op.index)
    return {step: sorted(ops, key=lambda at: trace.ops[at].start_ns) for step, ops in found.items()}


def _ran_on_host(trace: Trace, at: int, known: Iterable[str]) -> align.Ran:
    canon = formulas.canonical(trace.ops[at].name)
    return align.Ran(name=trace.ops[at].name, op=canon, instance=at) if canon in known else align.Ran(name="", is_foreign=True)


def _ran(trace: Trace, kernel: Kernel, known: Iterable[str]) -> align.Ran:
    if kernel.graph_id is not None:
        return align.Ran(name=kernel.name)
    ops = [op for op in trace.chain(kernel.op) if "::" in op.name]
    mine = next((op for op in reversed(ops) if formulas.canonical(op.name) in known), None)
    if mine is None:
        return align.Ran(name=kernel.name, is_foreign=bool(ops))
    return align.Ran(name=kernel.name, op=formulas.canonical(mine.name), instance=mine.index)


def _place(trace: Trace, op: int | None) -> tuple[str | None, str]:
    found = next(iter(trace.chain(op)), None)
    return (found.module, found.name) if found is not None else (None, "")
