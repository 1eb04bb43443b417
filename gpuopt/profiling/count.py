"""Module + inputs -> FLOPs and bytes by op and module, from the ATen calls of one forward on fake tensors: no memory, no GPU, no weights read.

The module is copied with its parameters faked, so neither its state nor its attributes change. Where a forward cannot run on fake tensors (it reads values,
an op has no fake kernel), the real module runs once on its own device, and the count says so.

Bytes are compulsory traffic an op at a time (`traffic`). Fusion is not assumed: their sum is what eager must move, an upper bound for anything that fuses.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count, OpRecord
from gpuopt.profiling import formulas, higher_order, lines, unseen
from gpuopt.profiling.traffic import regions_bytes, tensors_in, traffic
from gpuopt.programs import packing

CONVENTION = "2 FLOPs a multiply-add; products alone are counted; attention counted full, causal or not; padding counted like data"


def count(module_or_callable: Callable[..., Any], inputs: Inputs, *, tf32: bool = False) -> Count:
    """Count one call `module_or_callable(*inputs.args, **inputs.kwargs)`.

    Parameters
    ----------
    module_or_callable: an nn.Module (rows get its qualified names), a bound method of one, or anything that runs ATen ops.
    inputs: tensors on any device; their values are not read unless the forward reads them.
    tf32: float32 products run through tensor cores; their rows say `tf32` instead of `float32`.

    Returns
    -------
    `records` in order of first execution. `coverage` is the share of traffic in ops whose FLOPs are known (0 is known).
    `flops` of a record is None for an op that computes without a formula; it is named in `unknown_ops`.

    Raises
    ------
    Whatever the forward itself raises on real tensors, after fake ones failed too.
    """
    notes = [CONVENTION]
    try:
        counter = _count_fake(module_or_callable, inputs, tf32)
        method = "aten dispatch, fake tensors"
    except Exception as error:  # noqa: BLE001  anything can fail on fake tensors; the real run below is the judge and raises what is real
        counter = _count_real(module_or_callable, inputs, tf32)
        method = "aten dispatch, one real run"
        reason = str(error).strip().partition("\n")[0][:160]
        notes.append(f"fake tensors would not do ({type(error).__name__}: {reason}); the model was run once")
        if "data pointer" in str(error) or "not allocated" in str(error):
            notes.append(
                "it reads tensors' memory directly (a C++ extension?): what is multiplied there is seen by no ATen op and not counted"
            )
    root = _module_of(module_or_callable)
    return counter.result(method=method, notes=tuple(notes + counter.notes), num_parameters=_num_parameters(root))


def module_classes(module: nn.Module) -> dict[str, str]:
    """Qualified name -> class name; "" is the root."""
    return {name: type(child).__name__ for name, child in module.named_modules()}


def module_parameters(module: nn.Module) -> dict[str, int]:
    """Qualified name -> parameters in it and below, shared ones once; "" is the root."""
    return {name: packing.num_weights(child) for name, child in module.named_modules()}


def _module_of(target: Any) -> nn.Module | None:
    if isinstance(target, nn.Module):
        return target
    owner = getattr(target, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _num_parameters(module: nn.Module | None) -> int | None:
    return None if module is None else packing.num_weights(module)


def _count_fake(target: Any, inputs: Inputs, tf32: bool) -> _Counter:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = _module_of(target)
    if root is not None and not isinstance(root, torch.jit.ScriptModule):
        with FakeCopyMode(mode), torch.no_grad():
            twin = copy.deepcopy(root)
        _leave_meta(twin, mode)
        run = twin if target is root else getattr(twin, target.__name__)
        root = twin
    else:
        run = target

    home = _home(root)

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if home is not None and value.device != home:  # where inputs live does not change what is computed
            with mode:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=home)
        return mode.from_tensor(value, static_shapes=True)

    args = pytree.tree_map(fake, tuple(inputs.args))
    kwargs = pytree.tree_map(fake, dict(inputs.kwargs))
    counter = _Counter(root, tf32)
    with _quiet_fakes(), torch.inference_mode(False), torch.no_grad(), mode, counter.watching():
        lines.outermost(run, *args, **kwargs)
    return counter


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """PyTorch logs a traceback for each op that fails on fake tensors; here that is an expected turn, and the note says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


def _home(module: nn.Module | None) -> torch.device | None:
    """The one device all parameters are on; None where there are none, or several."""
    devices = {p.device for p in module.parameters()} if module is not None else set()
    return devices.pop() if len(devices) == 1 else None


def _leave_meta(module: nn.Module, mode: FakeTensorMode) -> None:
    """Move faked `meta` tensors to a fake CPU in place, tied ones together: a model without weights is counted as a real device runs it, where attention has a fused op."""
    moved: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in moved:
                    with mode:
                        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    moved[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
                table[name] = moved[id(tensor)]  # type: ignore[assignment]


def _count_real(target: Any, inputs: Inputs, tf32: bool) -> _Counter:
    root = _module_of(target)
    home = _home(root)

    def move(value: Any) -> Any:
        return value.to(home) if isinstance(value, torch.Tensor) and home is not None else value

    args, kwargs = pytree.tree_map(move, (tuple(inputs.args), dict(inputs.kwargs)))
    counter = _Counter(root, tf32)
    with torch.no_grad(), counter.watching(), unseen.HandedOut(counter.record_unseen):
        lines.outermost(target, *args, **kwargs)
    return counter


@contextmanager
def module_events(root: nn.Module, enter: Callable[[str, nn.Module], None], leave: Callable[[str, nn.Module], None]) -> Iterator[None]:
    """Call `enter` and `leave` around the forward of every submodule of `root`, with its qualified name (of a shared module, the first).

    Hooks are global ones filtered by identity: a hook on the modules themselves would switch nn.TransformerEncoderLayer off its fast path.
    """
    names = {id(module): name for name, module in root.named_modules()}

    def before(module: nn.Module, args: Any) -> None:
        name = names.get(id(module))
        if name is not None:
            enter(name, module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        name = names.get(id(module))
        if name is not None:
            leave(name, module)

    handles = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Row:
    """Calls of one (op, module, dtype, shapes), summed."""

    module_class: str
    count: int = 0
    flops: float | None = 0.0
    bytes: float = 0.0
    lines: dict[str, None] = field(default_factory=dict)
    """Where in the model's code they were called, in the order seen."""


_METADATA = frozenset(
    """
    aten::size aten::sym_size aten::stride aten::sym_stride aten::storage_offset aten::sym_storage_offset aten::numel aten::sym_numel aten::dim aten::is_contiguous
    aten::sym_is_contiguous aten::is_strides_like_format aten::is_non_overlapping_and_dense aten::is_same_size prim::layout prim::device prim::is_nested
    aten::sym_constrain_range aten::sym_constrain_range_for_size aten::_assert_tensor_metadata
    """.split()
)
"""Questions about a tensor: nothing runs, no row."""


@dataclass(slots=True)
class _Counter:
    """Collects rows while a forward runs."""

    root: nn.Module | None
    tf32: bool
    rows: dict[tuple[str, str, str | None, str], _Row] = field(default_factory=dict)
    stack: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    depth: int = 0
    """Recorded ops now running: what one of them launches is part of it."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        fast = torch.backends.mha.get_fastpath_enabled()
        # One fused op for a whole encoder layer has a formula too, and the same total; without it the rows name the layer's parts.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                warnings.catch_warnings(),
                torch.jit._fuser.optimized_execution(False),
                higher_order.uncompiled_flex_attention(),
                unseen.triton_launches(self.record_unseen),
                _Mode(self),
            ):
                # A compiled module is counted too (nothing compiles under a mode); that its outermost hook fires twice changes no row.
                warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
                if self.root is None:
                    yield
                else:
                    with module_events(self.root, self._enter, self._leave):
                        yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _enter(self, name: str, module: nn.Module) -> None:
        self.stack.append((name, type(module).__name__))

    def _leave(self, name: str, module: nn.Module) -> None:
        # A module that raised leaves hooks of its callers unpaired only if somebody caught it; drop down to its own frame.
        while self.stack and self.stack.pop()[0] != name:
            pass

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an op whose inside is its own business."""
        self.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.depth -= 1

    def record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        name = func._schema.name
        if name in _METADATA:
            return
        bound = bind(func._schema, args, kwargs)
        flops = formulas.flops_of(func, bound, args, kwargs, out)
        dtype = compute_dtype(name, bound, out)
        if self.tf32 and dtype == "float32" and flops and formulas.family(name) not in formulas.NOT_TENSOR_CORES:
            dtype = "tf32"
        moved = traffic(func, bound, out)
        if flops is None and moved == 0:
            flops = 0.0  # an unknown op that touches no memory computes nothing: a custom view, an assertion
        self._add(name.replace("::", "."), dtype, shapes_text(pytree.tree_leaves(list(bound.values()))), flops, moved)

    def record_higher_order(self, name: str, flops: float | None, tensors: list[torch.Tensor], out: Any) -> None:
        self._add(
            name,
            dtype_name(tensors[0].dtype) if tensors else None,
            shapes_text(tensors),
            flops,
            regions_bytes(tensors) + regions_bytes(out),
        )

    def record_unseen(self, name: str, tensors: list[torch.Tensor]) -> bool:
        """A row for what computes outside the dispatcher; False where its tensors are fake, so that it cannot run."""
        if self.depth == 0:
            self._add(name, dtype_name(tensors[0].dtype) if tensors else None, shapes_text(tensors), None, regions_bytes(tensors))
        return not any(isinstance(t, FakeTensor) for t in tensors)

    def _add(self, op: str, dtype: str | None, shapes: str, flops: float | None, moved: float) -> None:
        module, module_class = self.stack[-1] if self.stack else ("", type(self.root).__name__ if self.root is not None else "")
        row = self.rows.setdefault((op, module, dtype, shapes), _Row(module_class=module_class))
        row.count += 1
        if (line := lines.of_model()) is not None:
            row.lines[line] = None
        row.flops = None if flops is None or row.flops is None else row.flops + flops
        row.bytes += moved

    def result(self, *, method: str, notes: tuple[str, ...], num_parameters: int | None) -> Count:
        records = tuple(
            OpRecord(
                op=op,
                module=module,
                dtype=dtype,
                count=row.count,
                flops=row.flops,
                bytes=row.bytes,
                module_class=row.module_class,
                shapes=shapes,
                line=lines.joined(row.lines),
            )
            for (op, module, dtype, shapes), row in self.rows.items()
        )
        return summarize(records, method=method, notes=notes, num_parameters=num_parameters)


def summarize(records: tuple[OpRecord, ...], *, method: str, notes: tuple[str, ...] = (), num_parameters: int | None = None) -> Count:
    """Rows -> Count: totals, coverage, and what is unknown, worst first."""
    by_dtype: dict[str, float] = {}
    unknown: dict[str, float] = {}
    for record in records:
        if record.flops is None:
            unknown[record.op] = unknown.get(record.op, 0.0) + (record.bytes or 0.0)
        elif record.flops:
            by_dtype[record.dtype or "?"] = by_dtype.get(record.dtype or "?", 0.0) + record.flops
    moved = math.fsum(r.bytes or 0.0 for r in records)
    missed = math.fsum(unknown.values())
    coverage = 1.0 - missed / moved if moved else float(not unknown)
    return Count(
        records=records,
        flops=math.fsum(r.flops or 0.0 for r in records),
        flops_by_dtype=by_dtype,
        bytes=moved,
        coverage=coverage,
        unknown_ops=tuple(sorted(unknown, key=lambda op: (-unknown[op], op))),
        num_parameters=num_parameters,
        method=method,
        notes=notes,
    )


class _Mode(TorchDispatchMode):
    """Sees every ATen call of this thread, below autograd and autocast."""

    supports_higher_order_operators = True

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        if any(issubclass(t, torch.Tensor) and not issubclass(t, FakeTensor) and _dispatches(t) for t in types):
            return NotImplemented  # a wrapper (a quantised weight, DTensor) unpacks itself into plain ops, which come back here
        if func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # Under inference_mode composite ops (linear, matmul, lstm) arrive whole: take them apart, with the kernel eager itself would use
            # (`decompose` would prefer a Python decomposition that copies more).
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = _fake_output(func, args, kwargs)
        if out is None:
            out = self.counter.call(func, args, kwargs)
        self.counter.record(func, args, kwargs, out)
        return out

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        pieces = higher_order.pieces(func)
        if pieces is not None:
            with self:
                return pieces(*args, **kwargs)
        name = func.name()
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = self.counter.call(func, args, kwargs)  # a mode that answers NotImplemented here makes that the op's result
        flops = higher_order.flops(name, args)
        formula = flop_registry.get(func)
        if flops is None and formula is not None:
            flops = float(formula(*args, **kwargs, out_val=out))
        self.counter.record_higher_order(name, flops, tensors, tensors_in(out))
        return out


def _fake_output(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an op returns on fake tensors where PyTorch's own rule refuses dtypes that its kernels take; None: ask PyTorch.

    `_grouped_mm` runs in float32 and float16 too (on a CPU by a loop, on a GPU by a fallback), its fake rule knows bfloat16 alone (torch 2.13): every float32 mixture of
    experts would otherwise have to be run, and one without weights could not be counted.
    """
    if func._schema.name != "aten::_grouped_mm" or not isinstance(args[0], FakeTensor) or args[0].dtype == torch.bfloat16:
        return None
    bound = bind(func._schema, args, kwargs)
    a, b, offs = bound["self"], bound["mat2"], bound.get("offs")
    groups = [int(offs.shape[0])] if a.dim() == b.dim() == 2 and offs is not None else []
    batch = [a.shape[0]] if a.dim() == b.dim() == 3 else groups
    return a.new_empty([*batch, a.shape[-2], b.shape[-1]], dtype=bound.get("out_dtype") or a.dtype)


def _dispatches(cls: type) -> bool:
    return getattr(cls, "__torch_dispatch__", None) is not torch._C._disabled_torch_dispatch_impl and cls is not nn.Parameter


def bind(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name; those left at their default are absent."""
    return {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}


_OPERANDS = ("mat1", "batch1", "mat", "vec1", "query", "q", "src", "input", "data", "inp", "X", "qx", "x", "x1", "i1", "self")
"""Argument names that hold what a product multiplies, before those that are added to it (`self` of addmm)."""


def dtype_name(dtype: Any) -> str:
    """`torch.float16` -> `float16`; torch's quantised types by the integers they hold."""
    name = str(dtype).removeprefix("torch.")
    return {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}.get(name, name)


def compute_dtype(name: str, bound: Mapping[str, Any], out: Any) -> str | None:
    """Dtype an op computes in: of a product, its operands'; of anything else, its first floating output's."""
    if formulas.is_product(name):
        for key in _OPERANDS:
            value = bound.get(key)
            if isinstance(value, torch.Tensor):
                return dtype_name(value.dtype)
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    tensors = outputs or [t for t in pytree.tree_leaves(list(bound.values())) if isinstance(t, torch.Tensor)]
    if not tensors:
        return None
    return dtype_name(next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype))


def shapes_text(values: list[Any]) -> str:
    """Shapes of the tensors with at least one dimension: `8x128, 128x256`. The same text is made from a trace, and rows are joined by it."""
    return ", ".join("x".join(str(int(n)) for n in v.shape) for v in values if isinstance(v, torch.Tensor) and v.dim() > 0)
