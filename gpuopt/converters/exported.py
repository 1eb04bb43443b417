"""Model + inputs -> ExportedProgram, with free dimensions left open; and that to a .pt2 file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from gpuopt.converters.publish import publish
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision

Ranges = Mapping[str, tuple[int, int]]
"""Letter of a free dimension -> smallest and largest value it must accept."""


def export(model: Model, inputs: Inputs, dynamic: Ranges | None = None) -> ExportedProgram:
    """The program of `model(*inputs)`, whose tensors have the model's dtype and device already. Dimensions in `dynamic` stay open within their range, all others are fixed to the inputs' values.

    Outputs are plain dicts and tuples of tensors (transformers' output classes become dicts), so that the file loads where the model's code is not installed.
    An exported model gives its own program. Raises UsageError for a letter no input has, Unsupported with torch's reason where the model cannot be exported.
    """
    if model.form == "exported":
        return model.exported  # type: ignore[no-any-return]
    if model.form != "module":
        raise Unsupported(
            f"a model of form {model.form!r} cannot be exported: torch.export needs an nn.Module", fix="export the source model"
        )
    ranges = {letter: bounds for letter, bounds in (dynamic or {}).items() if bounds[0] < bounds[1]}
    _refuse_unknown(inputs, ranges)
    sample = _roomy(inputs, ranges)
    shapes = _dynamic_shapes(model.module, sample, ranges)
    handle = model.module.register_forward_hook(_plain_outputs)
    try:
        with torch.no_grad():
            return torch.export.export(model.module, sample.args, dict(sample.kwargs), dynamic_shapes=shapes, strict=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tracing runs the model's own code on symbols: whatever that raises is the reason it cannot be exported
        raise Unsupported(f"{model.name} cannot be exported: {_reason(error)}", fix=_remedy(error, ranges)) from error
    finally:
        handle.remove()


def save(program: ExportedProgram, path: Path) -> Path:
    """Write a .pt2 file, whole or not at all. Raises ResourceError for a full disk (where torch 2.13 may abort the process instead: call from a child)."""
    with publish(path) as temporary:
        torch.export.save(program, temporary)
    return path


def recast(program: ExportedProgram, to: Precision) -> ExportedProgram:
    """The same program in another floating dtype: its weights cast, its graph traced again. Raises Unsupported where a dtype is written into the graph."""
    from gpuopt.converters import precision

    target = getattr(torch, to.dtype)
    for node in program.graph.nodes:
        written = [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, torch.dtype) and v.is_floating_point and v != target]
        if node.op == "call_function" and written:
            raise Unsupported(
                f"the exported program has {str(written[0]).removeprefix('torch.')} written into its graph ({node.target} at {node.name}): a cast would not reach it",
                fix=f"cast the source model to {to}, then export it",
            )
    module = precision.copied(program.module(check_guards=False))  # the program's own weights are behind it
    precision.cast(module, to, ())
    assert program.example_inputs is not None
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
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes or None, strict=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as in `export`
        raise Unsupported(
            f"the exported program cannot be traced in {to}: {_reason(error)}", fix=f"cast the source model to {to}, then export it"
        ) from error


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


def _plain_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    return plain(output)


def plain(value: Any) -> Any:
    """Mappings -> dict without its Nones; named tuples and lists -> tuple; everything else as it is."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def _refuse_unknown(inputs: Inputs, ranges: Ranges) -> None:
    letters = {letter for spec in inputs.specs for letter in spec.free_dims}
    for letter in ranges:
        if letter not in letters:
            raise UsageError(
                f"no input has the dimension {letter}", fix=f"the inputs have {', '.join(sorted(letters)) or 'no free dimension'}"
            )


def _roomy(inputs: Inputs, ranges: Ranges) -> Inputs:
    """The same inputs, an open dimension of 1 (or under its range) repeated: torch.export fixes what it sees as 0 or 1."""
    times = {
        letter: -(-max(2, bounds[0]) // inputs.dims[letter])
        for letter, bounds in ranges.items()
        if inputs.dims.get(letter, 2) < max(2, bounds[0])
    }
    if not times:
        return inputs
    specs = iter(inputs.specs)

    def grow(value: Any) -> Any:
        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.repeat([times.get(part, 1) if isinstance(part, str) else 1 for part in next(specs).shape])

        return pytree.tree_map_only(torch.Tensor, leaf, value)

    args = tuple(grow(value) for value in inputs.args)
    kwargs = {name: grow(value) for name, value in inputs.kwargs.items()}
    dims = {letter: value * times.get(letter, 1) for letter, value in inputs.dims.items()}
    return Inputs(args=args, kwargs=kwargs, specs=inputs.specs, dims=dims, source=inputs.source)


def _dynamic_shapes(module: nn.Module, inputs: Inputs, ranges: Ranges) -> dict[str, Any] | None:
    """Parameter of `forward` -> axis -> Dim; one Dim a letter, so that inputs that share a letter must agree."""
    if not ranges:
        return None
    dims = {letter: Dim(letter, min=low, max=high) for letter, (low, high) in ranges.items()}
    specs = iter(inputs.specs)

    def shape_of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        return {axis: dims[part] for axis, part in enumerate(next(specs).shape) if part in dims}

    args = [pytree.tree_map(shape_of, value) for value in inputs.args]
    kwargs = {name: pytree.tree_map(shape_of, value) for name, value in inputs.kwargs.items()}
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _reason(error: Exception) -> str:
    """The line that says it, out of torch's page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("- ") or "Not all values of" in line or "Could not guard" in line]
    return f"{type(error).__name__}: {(telling or lines or ['no reason given'])[0][:300]}"


def _remedy(error: Exception, ranges: Ranges) -> str:
    if "onstraint" in str(error) and ranges:
        return "the model fixes that dimension: build for single values, as in --dim " + " --dim ".join(
            f"{letter}={bounds[0]}" for letter, bounds in ranges.items()
        )
    return "use a backend that runs the module itself: eager or inductor"
