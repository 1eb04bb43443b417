"""A model's own outputs -> how they nest, as data in a bundle -> another backend's tensors in that nest, without the model.

An artifact gives tensors by name or in order: lists, dicts and tuples at best. What the model itself returns may be a namedtuple or a class of its library with `None`s in it,
and whoever replaces `model(x)` by `gpuopt.load(...)(x)` reads it by those names.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuopt.accuracy import compare
from gpuopt.converters.rewrites import dry
from gpuopt.core import codec
from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs

FILE = "outputs.json"
HOMES = frozenset({"transformers", "diffusers", "torch"})
"""Packages that classes of outputs are looked for in. Those of other modules are taken where the caller has imported them: a bundle imports nobody's code."""
_CONSTANTS = (bool, int, float, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One place of a nest; its `count` parts follow it."""

    kind: str
    """`tensor`, `constant`, `list`, `tuple`, `dict`, `namedtuple`, `mapping` (a class that is one), `dataclass`."""
    key: str = ""
    """Its name in what it is a part of; "" in lists and tuples."""
    count: int = 0
    type: str = ""
    """`module:qualified.name` of a class."""
    place: int = 0
    """Of a tensor: which of the outputs."""
    value: bool | int | float | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nest:
    """Depth first."""

    nodes: tuple[Node, ...]
    names: tuple[str, ...]
    """Of the tensors, as `compare.flatten` gives them."""


class _Unknown(Exception):
    """Something that no other process could make again."""


# -- a model's outputs -> Nest ------------------------------------------------------------------------------------------------------


def of_call(module: nn.Module, inputs: Inputs) -> Nest | None:
    """Of what `module(*inputs)` returns, found on fake tensors; None where they do not go through, or it returns what only its own code can make (a cache)."""
    try:
        outputs = dry.faked(module, inputs)
    except Exception:  # noqa: BLE001  a call may raise anything on fake tensors, and a nest is no reason to make a real one of a large model
        return None
    return of(outputs)


def of(outputs: Any) -> Nest | None:
    """None where something in it is no tensor, constant or container of these."""
    named = compare.flatten(outputs)
    places: dict[int, int] = {}
    for place, (_, tensor) in enumerate(named):
        places.setdefault(id(tensor), place)
    try:
        nodes = tuple(_nodes(outputs, "", places))
    except _Unknown:
        return None
    return Nest(nodes=nodes, names=tuple(name for name, _ in named))


def _nodes(value: Any, key: str, places: Mapping[int, int]) -> Iterator[Node]:
    if isinstance(value, torch.Tensor):
        if id(value) not in places:
            raise _Unknown
        yield Node(kind="tensor", key=key, place=places[id(value)])
        return
    if value is None or type(value) in _CONSTANTS:
        yield Node(kind="constant", key=key, value=value)
        return
    kind, parts = _parts(value)
    named = kind in ("dict", "namedtuple", "mapping", "dataclass")
    if named and not all(isinstance(name, str) for name in parts):
        raise _Unknown
    is_class = kind in ("namedtuple", "mapping", "dataclass")
    where = f"{type(value).__module__}:{type(value).__qualname__}" if is_class else ""
    yield Node(kind=kind, key=key, count=len(parts), type=where)
    for name, part in parts.items():
        yield from _nodes(part, name if named else "", places)


def _parts(value: Any) -> tuple[str, dict[Any, Any]]:
    if type(value) in (list, tuple):
        return type(value).__name__, dict(enumerate(value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple", dict(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        return "dict" if type(value) in (dict, collections.OrderedDict) else "mapping", dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "dataclass", {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise _Unknown


# -- in a bundle --------------------------------------------------------------------------------------------------------------------


def write(nest: Nest, folder: Path) -> str:
    """The name of the file."""
    (folder / FILE).write_text(codec.to_json(nest, indent=2), encoding="utf-8")
    return FILE


def read(path: Path) -> Nest:
    """Raises BadInput for a file that is not ours."""
    nest = codec.read_json(Nest, path)
    counts = [node.count for node in nest.nodes]
    is_whole = nest.nodes and min(counts) >= 0 and sum(counts) == len(nest.nodes) - 1
    if not is_whole or not all(0 <= node.place < max(1, len(nest.names)) for node in nest.nodes):
        raise BadInput(f"{path.name} in the bundle does not say how outputs nest", fix="build the bundle again")
    return nest


# -- Nest + tensors -> the model's own outputs --------------------------------------------------------------------------------------


class Around:
    """Called with what an artifact returned; gives it in the model's own nest, or as it came where the tensors do not fit it."""

    def __init__(self, nest: Nest, *, may_construct: bool) -> None:
        """`may_construct`: whether dataclasses may be made, whose code runs; a bundle of mere data has nobody's consent to that."""
        self._nest, self._may_construct = nest, may_construct
        self._like = [(name, torch.empty(0)) for name in nest.names]
        self._classes: dict[str, Any] = {}
        """Found at the first call: importing a library takes seconds, and a bundle loads without."""

    def __call__(self, outputs: Any) -> Any:
        if isinstance(outputs, dict) and tuple(outputs) == self._nest.names:
            tensors: Sequence[Any] | None = list(outputs.values())
        else:
            tensors = compare.aligned(self._like, compare.flatten(outputs))
        return outputs if tensors is None else self._made(iter(self._nest.nodes), tensors)[1]

    def _made(self, nodes: Iterator[Node], tensors: Sequence[Any]) -> tuple[str, Any]:
        """Its key, and the value."""
        node = next(nodes)
        if node.kind == "tensor":
            return node.key, tensors[node.place]
        if node.kind == "constant":
            return node.key, node.value
        parts = [self._made(nodes, tensors) for _ in range(node.count)]
        values = [value for _, value in parts]
        if node.kind in ("list", "tuple"):
            return node.key, values if node.kind == "list" else tuple(values)
        if node.kind == "dict":
            return node.key, dict(parts)
        if node.type not in self._classes:
            self._classes[node.type] = self._class(node, [name for name, _ in parts])
        made = self._classes[node.type]
        return node.key, made(*values) if node.kind == "namedtuple" else made(**dict(parts))

    def _class(self, node: Node, names: list[str]) -> Any:
        """The class itself where it is here and is of the kind it was; else the nearest plain one: a namedtuple of the same names, a dict."""
        found: Any = _found(node.type)
        if node.kind == "namedtuple":
            fits = isinstance(found, type) and issubclass(found, tuple) and list(getattr(found, "_fields", ())) == names
            own = node.type.rpartition(":")[2].rpartition(".")[2]
            return (
                found
                if fits
                else collections.namedtuple(own if own.isidentifier() and not iskeyword(own) else "Outputs", names, rename=True)
            )
        if node.kind == "mapping":
            return found if isinstance(found, type) and issubclass(found, dict) else dict
        fits = self._may_construct and isinstance(found, type) and dataclasses.is_dataclass(found)
        return found if fits and {f.name for f in dataclasses.fields(found) if f.init} == set(names) else dict


def _found(where: str) -> Any:
    module_name, _, qualified = where.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name.partition(".")[0] in HOMES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # another version of it, or none
            return None
    target: Any = module
    for part in qualified.split("."):
        target = getattr(target, part, None)
    return target
