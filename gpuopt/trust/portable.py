"""nn.Module + inputs -> a .pt2 that opens in a process without the model's own classes, and back.

Outputs become plain dicts, lists and tuples: a treespec naming `transformers…ModelOutput` would need that package to open. Input names are kept.
Example inputs are dropped before saving: they are the user's data, and loading them is one of the paths by which a .pt2 runs code.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuopt.core import codec
from gpuopt.core.accepts import Accepts, input_names
from gpuopt.core.errors import BadInput, GpuoptError, Unsupported
from gpuopt.core.live import Inputs
from gpuopt.trust import gate

PROGRAM = "model.pt2"
ACCEPTS = "accepts.json"


def export(module: torch.nn.Module, inputs: Inputs, dynamic: Mapping[str, Sequence[int]] | None = None) -> torch.export.ExportedProgram:
    """Trace the module for these inputs. `dynamic`: free dimension -> (low, high); every other dimension is fixed at its size.

    Raises Unsupported with the tracer's reason: data-dependent control flow, an op without a fake kernel, a dimension the model fixes.
    """
    ranges = {name: (int(pair[0]), int(pair[1])) for name, pair in (dynamic or {}).items()}
    sample = widened(inputs, ranges)
    names = _identifiers(inputs)
    wrapped = _wrap(module, names, len(inputs.args))
    try:
        with torch.no_grad():
            return torch.export.export(
                wrapped, tuple(sample.args), dict(sample.kwargs), dynamic_shapes=_dynamic_shapes(inputs, names, ranges), strict=False
            )
    except (GpuoptError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # Why so wide: tracing runs the model's own Python: whatever it raises is the reason it cannot be exported.
        raise Unsupported(
            f"torch.export cannot take the model: {_reason(error)}",
            fix="use a backend that needs no whole graph (eager, inductor), or remove what it names from forward()",
        ) from error


def save(module: torch.nn.Module, inputs: Inputs, dynamic: Mapping[str, Sequence[int]] | None, folder: Path) -> dict[str, str]:
    """Export and write `model.pt2` and `accepts.json`; role -> file name. Raises Unsupported where the module cannot be exported."""
    program = export(module, inputs, dynamic)
    program._example_inputs = None  # the public setter refuses None
    torch.export.save(program, folder / PROGRAM)
    write_accepts(Accepts.of(inputs, dynamic), folder)
    return {"exported": PROGRAM, "accepts": ACCEPTS}


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any]) -> tuple[torch.nn.Module, Accepts]:
    """The callable of a saved program and what it accepts. `options`: `trust` and `signed_by_us` as the gate takes them."""
    program = gate.load_exported(folder / files["exported"], **consent(options))
    return program.module(), read_accepts(folder, files)


def write_accepts(accepts: Accepts, folder: Path) -> None:
    """Beside an artifact: what it was built for."""
    (folder / ACCEPTS).write_text(codec.to_json(accepts, indent=2), encoding="utf-8")


def read_accepts(folder: Path, files: Mapping[str, str]) -> Accepts:
    """Raises BadInput when the file is missing or is not ours."""
    if "accepts" not in files:
        raise BadInput("the bundle does not say which inputs its artifact takes", fix="build it again with this version of gpuopt")
    return codec.read_json(Accepts, folder / files["accepts"])


def consent(options: Mapping[str, Any]) -> dict[str, Any]:
    """The gate's arguments out of a backend's options."""
    return {"trust": tuple(options.get("trust", ())), "signed_by_us": bool(options.get("signed_by_us", False))}


def zeros(accepts: Accepts) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Inputs an artifact accepts, all zero, dynamic dimensions at their highest: for a first call when the real inputs are not there yet."""
    tensors = []
    for index, want in enumerate(accepts.inputs):
        shape = accepts.shape(index)
        tensor = torch.empty_strided(shape, accepts.strides(index, shape), dtype=getattr(torch, want.dtype), device=want.device)
        tensors.append(tensor.zero_())
    keywords = accepts.inputs[accepts.positional :]
    return tuple(tensors[: accepts.positional]), {w.name: t for w, t in zip(keywords, tensors[accepts.positional :], strict=True)}


def plain(value: Any) -> Any:
    """Model outputs -> dicts, lists and tuples of tensors; what is None in a mapping or dataclass is left out.

    Raises Unsupported for an object that holds no tensor torch knows how to find.
    """
    if value is None or isinstance(value, (torch.Tensor, int, float, bool, str)):
        return value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if v is not None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: plain(v) for k, v in found.items() if v is not None}
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        raise Unsupported(
            f"an output is a {type(value).__module__}.{type(value).__qualname__}, which is no tensor, list, tuple or dict",
            fix="return tensors, or turn the output off in the model's configuration (use_cache=False)",
        )
    return tuple(plain(v) for v in leaves)


def copied(value: Any) -> Any:
    """Plain containers with every tensor cloned: what a CUDA graph returned is overwritten by its next replay."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


def _wrap(module: torch.nn.Module, names: Sequence[str], positional: int) -> torch.nn.Module:
    """The module with plain outputs and exactly the inputs it is called with, under their own names."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self.model(*args, **kwargs))

    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    for index, name in enumerate(names):
        parameters.append(kinds(name, kinds.POSITIONAL_OR_KEYWORD if index < positional else kinds.KEYWORD_ONLY))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped: torch.nn.Module = type("Portable", (torch.nn.Module,), {"forward": forward})()
    wrapped.model = module
    wrapped.training = module.training  # not eval(): the module of an ExportedProgram refuses to be asked
    return wrapped


def _identifiers(inputs: Inputs) -> list[str]:
    """Names fit for a signature: an unnamed or repeated positional input is `input_0`, …; keywords are the model's own."""
    found: list[str] = []
    for index, name in enumerate(input_names(inputs)):
        fits = name.isidentifier() and not keyword.iskeyword(name) and name != "self" and name not in found
        if not fits and index >= len(inputs.args):
            raise Unsupported(f"the keyword input {name!r} is no Python name, or is given twice", fix="rename the parameter of forward()")
        found.append(name if fits else f"input_{index}")
    return found


def _dynamic_shapes(inputs: Inputs, names: Sequence[str], ranges: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    if not ranges:
        return None
    dims = {letter: torch.export.Dim(letter, min=low, max=high) for letter, (low, high) in ranges.items()}
    shapes: dict[str, Any] = {}
    for index, name in enumerate(names):
        spec = inputs.specs[index] if index < len(inputs.specs) else None
        letters = {axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str) and d in dims} if spec else {}
        shapes[name] = letters or None
    return shapes


def widened(inputs: Inputs, ranges: Mapping[str, tuple[int, int]]) -> Inputs:
    """The same inputs with dynamic dimensions of size 1 repeated to 2, memory order kept: the tracer fixes sizes 0 and 1 for good."""
    bound = [*inputs.args, *inputs.kwargs.values()]
    for index, spec in enumerate(inputs.specs[: len(bound)]):
        shape = list(bound[index].shape)
        for axis, letter in enumerate(spec.shape):
            if isinstance(letter, str) and letter in ranges and shape[axis] < 2:
                low, high = ranges[letter]
                if high < 2 or not shape[axis]:
                    raise Unsupported(
                        f"dimension {letter} cannot be dynamic from {low} to {high}", fix=f"give it a range: --dim {letter}=1:2:8"
                    )
                shape[axis] = max(2, low)
        if shape != list(bound[index].shape):
            wide = torch.empty_strided(
                shape, Accepts.of(inputs).strides(index, shape), dtype=bound[index].dtype, device=bound[index].device
            )
            bound[index] = wide.copy_(bound[index].expand(shape))
    count = len(inputs.args)
    return Inputs(
        args=tuple(bound[:count]),
        kwargs=dict(zip(inputs.kwargs, bound[count:], strict=True)),
        specs=inputs.specs,
        dims=inputs.dims,
        source=inputs.source,
    )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
