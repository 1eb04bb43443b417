"""nn.Module + inputs -> ExportedProgram with free dimensions left open, which opens in a process without the model's own classes.

Outputs become plain dicts, lists and tuples: a treespec naming `transformers…ModelOutput` would need that package to open.
Inputs are called as their specs call them; weights and submodules keep their names, which a wrapping module would prefix.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from gpuopt.core.errors import GpuoptError, Unsupported, UsageError
from gpuopt.core.live import Inputs
from gpuopt.programs.plain import plain
from gpuopt.programs.sample import widened

Ranges = Mapping[str, tuple[int, int]]
"""Letter of a free dimension -> smallest and largest value it must accept."""


def export(
    module: torch.nn.Module, inputs: Inputs, dynamic: Mapping[str, Sequence[int]] | None = None, *, name: str = "the model"
) -> ExportedProgram:
    """The program of `module(*inputs)`, whose tensors have the module's dtype and device already. The module is left as it was.

    `dynamic`: letter -> (low, high); inputs that share a letter must agree. Every other dimension is fixed at the inputs' size, as is one whose range is a single value.
    Raises UsageError for a letter no input has; Unsupported with the tracer's reason: data-dependent control flow, an op without a fake kernel, a dimension the model fixes.
    """
    ranges = {letter: (int(bounds[0]), int(bounds[1])) for letter, bounds in (dynamic or {}).items()}
    _refuse_unknown(inputs, ranges)
    sample = widened(inputs, ranges)
    names = _parameter_names(sample)
    with _called_with(module, names, len(sample.args)):
        return trace(
            module, sample.args, sample.kwargs, _dynamic_shapes(sample, names, ranges), name=name, remedy=lambda e: _remedy(e, ranges)
        )


def trace(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    shapes: dict[str, Any] | None,
    *,
    name: str,
    remedy: Callable[[Exception], str],
) -> ExportedProgram:
    """torch.export without gradients, its failure told in a line. `shapes`: parameter of `forward` -> the same nesting with axis -> Dim for each tensor."""
    try:
        with torch.no_grad():
            return torch.export.export(module, tuple(args), dict(kwargs), dynamic_shapes=shapes or None, strict=False)
    except (GpuoptError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # Why so wide: tracing runs the model's own Python on symbols: whatever it raises is the reason it cannot be exported.
        raise Unsupported(f"torch.export cannot take {name}: {_reason(error)}", fix=remedy(error)) from error


@contextmanager
def _called_with(module: torch.nn.Module, names: Sequence[str], positional: int) -> Iterator[None]:
    """Until the block ends `forward` has exactly these parameters, and what the module returns is plain."""
    own = module.forward
    before = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    kinds = inspect.Parameter
    parameters = [kinds(n, kinds.POSITIONAL_OR_KEYWORD if i < positional else kinds.KEYWORD_ONLY) for i, n in enumerate(names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    # A hook, not a line in `forward`: hooks of the model's own run before it and still see its own output class.
    handle = module.register_forward_hook(lambda _module, _args, output: plain(output))
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        handle.remove()
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _parameter_names(inputs: Inputs) -> list[str]:
    """A positional tensor's own name; `input_0`, … for one that has none fit for a signature, and for a nested one. Keywords are the model's own."""
    specs = iter(inputs.specs)
    found: list[str] = []
    for index, value in enumerate(inputs.args):
        own = [next(specs, None) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        name = (own[0].name or "") if isinstance(value, torch.Tensor) and own[0] is not None else ""
        fits = _is_parameter(name) and name not in found and name not in inputs.kwargs
        found.append(name if fits else f"input_{index}")
    for name in inputs.kwargs:
        if not _is_parameter(name) or name in found:
            raise Unsupported(f"the keyword input {name!r} is no Python name, or is given twice", fix="rename the parameter of forward()")
        found.append(name)
    return found


def _is_parameter(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and name != "self"


def _dynamic_shapes(inputs: Inputs, names: Sequence[str], ranges: Ranges) -> dict[str, Any] | None:
    """Parameter -> its nesting with axis -> Dim for each tensor; one Dim a letter, so that inputs that share a letter must agree."""
    dims = {letter: Dim(letter, min=low, max=high) for letter, (low, high) in ranges.items() if low < high}
    if not dims:
        return None
    specs = iter(inputs.specs)

    def shape_of(value: Any) -> Any:
        spec = next(specs, None) if isinstance(value, torch.Tensor) else None
        return {axis: dims[part] for axis, part in enumerate(spec.shape) if part in dims} if spec is not None else None

    values = (*inputs.args, *inputs.kwargs.values())
    return {name: pytree.tree_map(shape_of, value) for name, value in zip(names, values, strict=True)}


def _refuse_unknown(inputs: Inputs, ranges: Ranges) -> None:
    letters = {letter for spec in inputs.specs for letter in spec.free_dims}
    for letter in ranges:
        if letter not in letters:
            raise UsageError(
                f"no input has the dimension {letter}", fix=f"the inputs have {', '.join(sorted(letters)) or 'no free dimension'}"
            )


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
    return "use a backend that needs no whole graph (eager, inductor), or remove what it names from forward()"
