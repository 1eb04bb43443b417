"""Call arguments + input names -> name -> tensor, for runners whose artifact knows its inputs by name. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`model(*args, **kwargs)` -> one tensor an input name.

    A keyword goes to the input of its name; what is positional or nested fills the remaining inputs in order, and so does a keyword where none is named
    as an input is (an exporter renamed them all). Where some are, one that is not is somebody's mistake and no input's value.
    Values that are no tensors (None, True, 3) were baked in by the exporter and are passed over.
    Raises UsageError naming what is missing or too much.
    """
    bound = {name: value for name, value in kwargs.items() if name in names and _is_tensor(value)}
    strangers = [name for name, value in kwargs.items() if name not in names and _is_tensor(value)]
    if bound and strangers:
        raise UsageError(
            f"the model has no input {strangers[0]!r}",
            fix=f"it has {', '.join(names)}; an input it should have is named when it is compiled: -i",
        )
    unnamed = [*_leaves(args), *_leaves([value for name, value in kwargs.items() if name not in bound])]
    free = [name for name in names if name not in bound]
    if len(unnamed) > len(free):
        raise UsageError(
            f"the model has {len(names)} inputs ({', '.join(names)}), it was given {len(unnamed) + len(bound)}",
            fix="drop the inputs it has not",
        )
    if len(unnamed) < len(free):
        missing = free[len(unnamed) :]
        raise UsageError(f"the model's input {missing[0]!r} was not given", fix=f"it has the inputs {', '.join(names)}")
    bound.update(zip(free, unnamed, strict=True))
    return {name: bound[name] for name in names}


def letters(names: Sequence[str], inputs: Inputs) -> dict[str, tuple[int | str, ...]]:
    """Input name -> shape of the spec its tensor was made from, free dimensions as letters; names whose tensor has no spec are absent."""
    bound = bind(names, inputs.args, inputs.kwargs)
    given = [*_leaves(inputs.args), *_leaves(list(inputs.kwargs.values()))]
    shapes = {id(tensor): spec.shape for tensor, spec in zip(given, inputs.specs, strict=False)}
    return {name: shapes[id(tensor)] for name, tensor in bound.items() if id(tensor) in shapes}


def _leaves(values: Any) -> Iterator[Any]:
    if _is_tensor(values):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _leaves(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _leaves(value)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "shape")
