"""Trace + records -> which share of the work each part of the waterfall has: tensor cores, other products, memory, and passes over data that need not be. Pure.

What a kernel is comes from its name and the op that launched it, what bounds it from the records it ran for. Two kinds of pass change no value: another layout, another dtype.
A pointwise pass is avoidable where its neighbour on the stream passes over as many elements: one of them could do the work of both. The longest of a run stays, or
the reduction among them; a lone pass between two products stays too, because not every library can take it into the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import torch

from gpuopt.core import kernels
from gpuopt.core.result import Ceilings, OpRecord
from gpuopt.core.trace import CpuOp, Trace
from gpuopt.profiling import formulas
from gpuopt.profiling.onnx_classes import CLASSES
from gpuopt.profiling.roofline import floor_ns, link_of

TENSOR, OTHER, MEMORY = "tensor-core compute", "other compute", "memory-bound"
LAYOUT, CASTS, POINTWISE = "avoidable: layout", "avoidable: casts", "avoidable: unfused pointwise"
OVERHEAD = "overhead"
"""No part: an op that neither multiplies nor moves, which only a CPU's trace times."""

TENSOR_DTYPES = frozenset({"float16", "bfloat16", "tf32", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"})
"""Dtypes whose products go through tensor cores where a kernel's name does not say: there is no other unit that computes in them at speed."""

_LAYOUT_OPS = frozenset(
    "aten::contiguous aten::clone aten::reshape aten::_reshape_copy aten::permute_copy aten::transpose_copy aten::t_copy aten::view_copy".split()
)
_CAST_OPS = frozenset({"aten::_to_copy", "aten::to", "aten::type_as", "prims::convert_element_type"})
_POINTWISE_OPS = frozenset(
    """
    aten::gelu aten::hardswish aten::mish aten::threshold aten::masked_fill aten::where aten::dropout aten::native_dropout aten::glu aten::prelu aten::_prelu_kernel
    aten::batch_norm aten::native_batch_norm aten::_native_batch_norm_legit_no_training aten::cudnn_batch_norm aten::_batch_norm_impl_index
    """.split()
)
"""Element by element without PyTorch's tag that says so; batch norm in eval mode is one multiply-add an element."""
_REDUCTION_OPS = frozenset(
    """
    aten::softmax aten::_softmax aten::_safe_softmax aten::_log_softmax aten::layer_norm aten::native_layer_norm aten::group_norm aten::native_group_norm aten::rms_norm
    aten::_fused_rms_norm aten::max_pool2d aten::max_pool2d_with_indices aten::avg_pool2d aten::adaptive_avg_pool2d aten::_adaptive_avg_pool2d aten::cumsum
    """.split()
)
_PASSES = frozenset({kernels.POINTWISE, kernels.REDUCTION, kernels.CAST, kernels.LAYOUT})


@dataclass(slots=True)
class Split:
    """How the work divides."""

    shares: dict[str, float] = field(default_factory=dict)
    """Part (or `OVERHEAD`) -> share of the work's time; they sum to 1 where anything was timed."""
    counts: dict[str, float] = field(default_factory=dict)
    """Part -> kernels or ops a call."""
    unknown: float = 0.0
    """Share in kernels whose FLOPs are not known: judged by name alone."""


@dataclass(slots=True)
class Unit:
    """One kernel, device copy or CPU op in the order of execution."""

    name: str
    found: str
    """A class of core/kernels.py."""
    start_ns: int
    time_ns: float
    lane: tuple[int, str]
    """Step and stream, or step and thread."""
    size: int | None
    """Elements of its largest operand."""
    is_fused: bool = False
    is_redundant: bool = False


def bound_class(record: OpRecord, ceilings: Ceilings) -> str:
    """`compute`, `memory`, `unknown` (no formula, or no ceiling), or `overhead`: neither FLOPs nor bytes."""
    if record.flops == 0 and record.bytes == 0:
        return OVERHEAD
    return floor_ns(record, ceilings)[1]


def of_device(trace: Trace, records: Iterable[OpRecord], ceilings: Ceilings) -> Split:
    """Over kernels and device-to-device copies of the steps. A kernel that served several ops is divided among their bounds by the ops' times."""
    by_kernel: dict[str, list[tuple[OpRecord, str]]] = {}
    nameless: list[tuple[OpRecord, str]] = []
    for record in records:
        if not record.time_ns or link_of(record) is not None:
            continue
        row = (record, bound_class(record, ceilings))
        for name in record.kernels:
            by_kernel.setdefault(name, []).append(row)
        if not record.kernels:
            nameless.append(row)
    units = _units_of_device(trace)
    mark_redundant(units)
    times: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    unknown: list[float] = []
    for unit in units:
        rows = by_kernel.get(unit.name, nameless)
        total = math.fsum(r.time_ns or 0.0 for r, _ in rows)
        weighed = [(r.dtype, b, (r.time_ns or 0.0) / total) for r, b in rows] if total else [(None, "unknown", 1.0)]
        for dtype, bound, weight in weighed:
            part = _part(unit, dtype, bound)
            times.setdefault(part, []).append(unit.time_ns * weight)
            counts[part] = counts.get(part, 0.0) + weight
            if bound == "unknown" and part in (TENSOR, OTHER):
                unknown.append(unit.time_ns * weight)
    steps = max(1, len(trace.steps))
    return _split(times, {part: n / steps for part, n in counts.items()}, unknown)


def of_host(trace: Trace, records: Iterable[OpRecord], ceilings: Ceilings) -> Split:
    """Over the records of a trace without a device: there the ops are the work, and no tensor cores are told apart."""
    units = _units_of_host(trace)
    mark_redundant(units)
    passes = math.fsum(u.time_ns for u in units if u.found == kernels.POINTWISE)
    redundant = math.fsum(u.time_ns for u in units if u.is_redundant) / passes if passes else 0.0
    times: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    unknown: list[float] = []
    for record in records:
        if not record.time_ns:
            continue
        bound = bound_class(record, ceilings)
        found = op_class(record.op.replace(".", "::", 1))
        if bound == OVERHEAD:
            pieces = [(OVERHEAD, 1.0)]
        elif found == kernels.POINTWISE and bound != "compute":
            pieces = [(POINTWISE, redundant), (MEMORY, 1.0 - redundant)]
        else:
            pieces = [({kernels.LAYOUT: LAYOUT, kernels.CAST: CASTS}.get(found, MEMORY if bound == "memory" else OTHER), 1.0)]
        for part, weight in pieces:
            times.setdefault(part, []).append(record.time_ns * weight)
            counts[part] = counts.get(part, 0.0) + record.count * weight
        if bound == "unknown":
            unknown.append(record.time_ns)
    return _split(times, counts, unknown)


def _split(times: dict[str, list[float]], counts: dict[str, float], unknown: list[float]) -> Split:
    sums = {part: math.fsum(found) for part, found in times.items()}
    total = math.fsum(sums.values())
    if not total:
        return Split()
    return Split(shares={part: ns / total for part, ns in sums.items()}, counts=counts, unknown=math.fsum(unknown) / total)


def _part(unit: Unit, dtype: str | None, bound: str) -> str:
    match unit.found:
        case kernels.LAYOUT:
            return LAYOUT
        case kernels.CAST:
            return CASTS
        case kernels.POINTWISE:
            return POINTWISE if unit.is_redundant else MEMORY
        case kernels.COPY | kernels.REDUCTION:
            return MEMORY
    if bound in ("memory", OVERHEAD):
        return MEMORY
    known = kernels.on_tensor_cores(unit.name)
    if known is None and dtype in TENSOR_DTYPES and (bound == "compute" or unit.found != kernels.OTHER):
        known = True
    return TENSOR if known else OTHER


def _units_of_device(trace: Trace) -> list[Unit]:
    units = []
    for kernel in trace.kernels:
        if kernel.step is not None:
            op = trace.ops[kernel.op] if kernel.op is not None and kernel.graph_id is None else None
            found = kernels.COPY if kernel.is_memset else _class_of(trace, kernel.name, op)
            lane = (kernel.step, str(kernel.stream))
            units.append(
                Unit(
                    name=kernel.name,
                    found=found,
                    start_ns=kernel.start_ns,
                    time_ns=kernel.dur_ns,
                    lane=lane,
                    size=_size(op),
                    is_fused=kernels.is_fused(kernel.name),
                )
            )
    for copy in trace.copies:
        if copy.step is not None and copy.kind not in ("h2d", "d2h"):
            op = trace.ops[copy.op] if copy.op is not None else None
            # A plain copy inside `contiguous` or `clone` is of the same kind as the kernel that runs where strides differ.
            found = kernels.LAYOUT if any(o.name in _LAYOUT_OPS for o in trace.chain(copy.op)) else kernels.COPY
            lane = (copy.step, str(copy.stream))
            units.append(
                Unit(name=f"Memcpy {copy.kind}", found=found, start_ns=copy.start_ns, time_ns=copy.dur_ns, lane=lane, size=_size(op))
            )
    return units


def _class_of(trace: Trace, name: str, op: CpuOp | None) -> str:
    """By name; where the same kernel does several things, by the op that launched it."""
    found = kernels.kernel_class(name)
    if op is None:
        return found
    if op.name == "aten::copy_" and ("direct_copy" in name or found in (kernels.POINTWISE, kernels.OTHER)):
        if len(op.dtypes) >= 2 and op.dtypes[0] != op.dtypes[1]:
            return kernels.CAST
        if len(op.dtypes) >= 2:
            # The same dtype: into a new tensor that only lies otherwise, or into one that is there to be filled (a cache).
            return kernels.LAYOUT if any(o.name in _LAYOUT_OPS | _CAST_OPS for o in trace.chain(op.index)) else kernels.COPY
    if found == kernels.OTHER:
        return next((c for o in trace.chain(op.index) if "::" in o.name and (c := op_class(o.name)) != kernels.OTHER), found)
    return found


@cache
def op_class(name: str) -> str:
    """A class of core/kernels.py for a schema name (`aten::mm`); products are `other product` whatever runs them."""
    plain = formulas.family(name)
    if formulas.canonical(name) == "attention":
        return kernels.ATTENTION
    if formulas.is_product(name) or formulas.canonical(name) in ("convolution", "rnn"):
        return kernels.OTHER_PRODUCT
    for ops, found in (
        (_LAYOUT_OPS, kernels.LAYOUT),
        (_CAST_OPS, kernels.CAST),
        (_POINTWISE_OPS, kernels.POINTWISE),
        (_REDUCTION_OPS, kernels.REDUCTION),
    ):
        if plain in ops:
            return found
    namespace, _, op = plain.partition("::")
    if namespace == "onnx":
        return CLASSES.get(op, kernels.OTHER)
    packet = getattr(torch.ops.aten, op, None) if namespace == "aten" else None
    tags = {tag for o in packet.overloads() for tag in getattr(packet, o).tags} if packet is not None else set()
    if torch.Tag.pointwise in tags:
        return kernels.POINTWISE
    return kernels.REDUCTION if torch.Tag.reduction in tags else kernels.OTHER


def _units_of_host(trace: Trace) -> list[Unit]:
    """The outermost ops that are work: what runs inside one is part of it, views and dispatch are none."""
    units: list[Unit] = []
    inside: set[int] = set()
    for op in trace.ops:  # those around an op come before it
        if op.parent in inside:
            inside.add(op.index)
        elif op.step is not None and (found := op_class(op.name)) != kernels.OTHER:
            inside.add(op.index)
            units.append(
                Unit(name=op.name, found=found, start_ns=op.start_ns, time_ns=op.dur_ns, lane=(op.step, op.thread), size=_size(op))
            )
    return units


def _size(op: CpuOp | None) -> int | None:
    return max((math.prod(shape) for shape in op.shapes), default=None) if op is not None else None


def mark_redundant(units: list[Unit]) -> None:
    """Mark the pointwise passes that a neighbour could do as well: see the head of this file."""
    lanes: dict[tuple[int, str], list[Unit]] = {}
    for unit in sorted(units, key=lambda u: u.start_ns):
        lanes.setdefault(unit.lane, []).append(unit)
    for lane in lanes.values():
        run: list[Unit] = []
        for unit in lane:
            joins = unit.found in _PASSES
            if run and (not joins or not _alike(run[-1], unit)):
                _mark_run(run)
                run = []
            if joins:
                run.append(unit)
        _mark_run(run)


def _alike(one: Unit, other: Unit) -> bool:
    return one.size is None or other.size is None or one.size == other.size


def _mark_run(run: list[Unit]) -> None:
    passes = [u for u in run if u.found == kernels.POINTWISE and not u.is_fused]
    if len(run) < 2 or not passes:
        return
    keeps = any(u.found == kernels.REDUCTION or (u.is_fused and u.found == kernels.POINTWISE) for u in run)
    kept = None if keeps else max(passes, key=lambda u: u.time_ns)
    for unit in passes:
        unit.is_redundant = unit is not kept
