"""Count + ceilings + what crosses the border of a call -> the least time it can take: op by op, fused into one, and in other precisions. Pure, but for `external`, which asks tensors
for their sizes.

Op by op: sum of max(FLOPs / peak of the dtype, bytes / bandwidth). Fused: everything overlaps and no intermediate leaves the chip, so only the sum of the FLOPs and the buffers
that come from outside or go there count, each once. Nothing of this precision beats the second; a compiler may beat the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gpuopt.core.live import Inputs
from gpuopt.core.result import CEILING_OF_DTYPE, Bounds, Ceilings, Count, OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.profiling import formulas
from gpuopt.profiling.count import dtype_name

PRECISIONS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""What another precision may be -> bytes an element."""
_FLOATING = {"float64", "float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"}
_SIXTEEN = ("fp16", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """Bytes of the buffers a call reads from outside itself or leaves behind, each distinct one once, by dtype."""

    by_dtype: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        return math.fsum(self.by_dtype.values())


def external(module: nn.Module | None, inputs: Inputs, outputs: Any, count: Count) -> External:
    """Parameters, floating buffers, inputs and outputs of one call.

    Parameters
    ----------
    outputs: what a call returned, any nesting; None leaves them out and says so.
    count: of the same call: of a table that is only looked up, the rows it takes are read, not the table.
    """
    tensors: dict[int, Tensor] = {}
    rows: dict[int, float] = {}
    notes: list[str] = []
    if module is not None:
        looked_up = _looked_up(module, count)
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            tensors[id(tensor)] = tensor
            if id(tensor) in looked_up:
                rows[id(tensor)] = looked_up[id(tensor)]
    else:
        notes.append("parameters are not counted: the module is not known")
    for tensor in pytree.tree_leaves((tuple(inputs.args), dict(inputs.kwargs), outputs)):
        if isinstance(tensor, Tensor):
            tensors[id(tensor)] = tensor
    if outputs is None:
        notes.append("outputs are not counted")
    by_dtype: dict[str, float] = {}
    for key, tensor in tensors.items():
        size = float(tensor.numel() * tensor.element_size())
        name = dtype_name(tensor.dtype)
        by_dtype[name] = by_dtype.get(name, 0.0) + min(size, rows.get(key, size))
    return External(by_dtype=by_dtype, notes=tuple(notes))


def _looked_up(module: nn.Module, count: Count) -> dict[int, float]:
    """id of a weight that only embeddings use -> bytes of the rows a call takes."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            users.setdefault(id(parameter), []).append((name, child))
    taken: dict[str, float] = {}
    for record in count.records:
        shapes = record.shapes.split(", ")
        if record.op.startswith("aten.embedding") and len(shapes) >= 2 and "" not in shapes:
            taken[record.module] = taken.get(record.module, 0.0) + record.count * math.prod(int(n) for n in shapes[1].split("x"))
    found = {}
    for key, owners in users.items():
        tables = [child.weight for _, child in owners if isinstance(child, nn.Embedding)]
        if len(tables) == len(owners) and all(name in taken for name, _ in owners):
            found[key] = sum(taken[name] for name, _ in owners) * tables[0].shape[1] * tables[0].element_size()
    return found


def build(count: Count, ceilings: Ceilings, outside: External | None = None, *, kind: str = "measured") -> Bounds:
    """Bounds of one call of `count`, milliseconds.

    Parameters
    ----------
    outside: from `external`; without it there is no fused bound.
    kind: of the ceilings; the other kind stands in where one has no row, and the notes say so.
    """
    notes = list(outside.notes) if outside is not None else ["no fused bound: the buffers of the call are not known"]
    peaks = _Peaks(ceilings, kind)
    main = max(count.flops_by_dtype, key=lambda d: count.flops_by_dtype[d], default="")
    precision = CEILING_OF_DTYPE.get(main, main)
    unfused, compute = _floors(count.records, peaks, None)
    moved = peaks.move(outside.bytes) if outside is not None else None
    by_precision: dict[str, float] = {}
    fused_by_precision: dict[str, float] = {}
    for name in PRECISIONS:
        if name == precision or not peaks.known(name) or main not in _FLOATING:
            continue
        there, products = _floors(count.records, peaks, name)
        if there is not None:
            by_precision[name] = there
        if outside is not None and products is not None and (bytes_s := peaks.move(_recast(outside, name))) is not None:
            fused_by_precision[name] = min(max(products, bytes_s), there if there is not None else math.inf)
    if count.unknown_ops:
        notes.append(f"without the FLOPs of {', '.join(count.unknown_ops[:3])}: no formula")
    fused = max(compute, moved) if compute is not None and moved is not None else None
    if fused is not None and unfused is not None:
        fused = min(fused, unfused)  # a parameter that no op of this call reads (an idle expert) is no bound
    return Bounds(
        precision=precision,
        unfused_ms=unfused,
        fused_ms=fused,
        by_precision=by_precision,
        fused_by_precision=fused_by_precision,
        bytes_fused=outside.bytes if outside is not None else None,
        kind=kind,
        notes=(*notes, *peaks.notes),
    )


class _Peaks:
    """Ceilings as milliseconds; which rows stood in for others is noted."""

    def __init__(self, ceilings: Ceilings, kind: str) -> None:
        self.ceilings = ceilings
        self.kinds = (kind, "spec" if kind == "measured" else "measured")
        self.notes: list[str] = []

    def known(self, dtype: str) -> bool:
        return any(self.ceilings.flops(dtype, kind) for kind in self.kinds)

    def multiply(self, flops: float, dtype: str | None) -> float | None:
        for kind in self.kinds:
            if peak := self.ceilings.flops(dtype, kind):
                self._note(CEILING_OF_DTYPE.get(dtype or "", dtype or ""), kind)
                return flops / peak * 1e3
        return None

    def move(self, size: float) -> float | None:
        for kind in self.kinds:
            if bandwidth := self.ceilings.bandwidth(kind):
                self._note("memory", kind)
                return size / bandwidth * 1e3
        return None

    def _note(self, quantity: str, kind: str) -> None:
        text = f"{quantity} by its {kind} ceiling: there is no {self.kinds[0]} one"
        if kind != self.kinds[0] and text not in self.notes:
            self.notes.append(text)


def _floors(records: Iterable[OpRecord], peaks: _Peaks, precision: str | None) -> tuple[float | None, float | None]:
    """(sum over ops of the larger floor, sum of the compute floors) in ms, in another precision where one is named; None where a ceiling is missing."""
    total: list[float] = []
    compute: list[float] = []
    for record in records:
        dtype, size = _as(record, precision, peaks)
        multiplying = peaks.multiply(record.flops, dtype) if record.flops else 0.0
        moving = peaks.move(size) if size else 0.0
        if multiplying is None:
            return None, None
        compute.append(multiplying)
        if moving is None:
            return None, None
        total.append(max(multiplying, moving))
    return math.fsum(total), math.fsum(compute)


def _as(record: OpRecord, precision: str | None, peaks: _Peaks) -> tuple[str | None, float]:
    """(dtype, bytes) of an op in another precision. Eight bits are for matrix products: everything else stays at sixteen."""
    size = record.bytes or 0.0
    if precision is None or record.dtype not in _FLOATING:
        return record.dtype, size
    width = PRECISIONS[precision]
    dtype = precision
    canonical = formulas.canonical(record.op.replace(".", "::", 1))
    if width == 1 and (not record.flops or canonical == "attention"):
        width = 2
        dtype = next((p for p in _SIXTEEN if peaks.known(p)), precision)
    return dtype, size * width / DTYPE_BYTES.get(record.dtype or "", 4 if record.dtype == "tf32" else width)


def _recast(outside: External, precision: str) -> float:
    return math.fsum(
        size * PRECISIONS[precision] / DTYPE_BYTES[name] if name in _FLOATING and name in DTYPE_BYTES else size
        for name, size in outside.by_dtype.items()
    )
