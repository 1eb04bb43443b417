"""Model + inputs -> ExportedProgram and a .pt2 file; an ExportedProgram -> the same in another floating dtype."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from gpuopt.converters import precision
from gpuopt.converters.publish import publish
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision
from gpuopt.programs.export import Ranges, trace
from gpuopt.programs.export import export as export_module


def export(model: Model, inputs: Inputs, dynamic: Ranges | None = None) -> ExportedProgram:
    """`programs.export.export` of a Model: dimensions in `dynamic` stay open within their range, outputs are plain. An exported model gives its own program.

    Raises UsageError for a letter no input has, Unsupported for another form and with torch's reason where the model cannot be exported.
    """
    if model.form == "exported":
        return model.exported  # type: ignore[no-any-return]
    if model.form != "module":
        raise Unsupported(
            f"a model of form {model.form!r} cannot be exported: torch.export needs an nn.Module", fix="export the source model"
        )
    return export_module(model.module, inputs, dynamic, name=model.name)


def save(program: ExportedProgram, path: Path) -> Path:
    """Write a .pt2 file, whole or not at all. Raises ResourceError for a full disk (where torch 2.13 may abort the process instead: call from a child)."""
    with publish(path) as temporary:
        torch.export.save(program, temporary)
    return path


def recast(program: ExportedProgram, to: Precision) -> ExportedProgram:
    """The same program in another floating dtype: its weights cast, its graph traced again. Raises Unsupported where a dtype is written into the graph."""
    target = getattr(torch, to.dtype)
    fix = f"cast the source model to {to}, then export it"
    for node in program.graph.nodes:
        written = [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, torch.dtype) and v.is_floating_point and v != target]
        if node.op == "call_function" and written:
            raise Unsupported(
                f"the exported program has {str(written[0]).removeprefix('torch.')} written into its graph ({node.target} at {node.name}): a cast would not reach it",
                fix=fix,
            )
    module = precision.copied(program.module(check_guards=False))  # the program's own weights are behind it
    precision.cast(module, to, ())
    if program.example_inputs is None:
        raise Unsupported("the exported program was saved without example inputs, and is traced again from them", fix=fix)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(target) if t.is_floating_point() else t, program.example_inputs)
    names = [
        node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    dims: dict[str, Any] = {}

    def shape_of(fake: torch.Tensor) -> dict[int, Any]:
        return {axis: _dim_again(size, program, dims) for axis, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)}

    flat, spec = pytree.tree_flatten((args, kwargs))
    open_args, open_kwargs = pytree.tree_unflatten(
        [shape_of(fake) if isinstance(leaf, torch.Tensor) else None for leaf, fake in zip(flat, names, strict=True)], spec
    )
    shapes = inspect.signature(module.forward).bind(*open_args, **open_kwargs).arguments
    return trace(module, args, kwargs, shapes, name=f"the exported program in {to}", remedy=lambda error: fix)


def _dim_again(size: Any, program: ExportedProgram, dims: dict[str, Any]) -> Any:
    """The Dim that this symbol came from; AUTO for what was computed from another one."""
    bounds = program.range_constraints.get(size.node.expr)
    if bounds is None:
        return Dim.AUTO
    name = str(size)
    if name not in dims:
        low, high = int(bounds.lower), bounds.upper
        dims[name] = Dim(name, min=low, max=int(high) if high < 2**31 else None)
    return dims[name]
