"""One event of a Chrome trace -> a row: a named tuple of what is read of it, checked. A million of them fit where a million dicts would not.

Times are the file's microseconds. What an event lacks, or gives in a form no profiler writes, is None or empty in its row: nothing is made up.
"""

from __future__ import annotations

import marshal
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Shapes = tuple[tuple[int, ...], ...]
_MAX_ELEMENTS = 2**63
"""No tensor has more, nor a dimension more: what a file says beyond that is no shape."""


class OpRow(NamedTuple):
    """An op on the host."""

    ts: float
    dur: float
    name: str
    thread: str
    external_id: int | None
    shapes: Shapes
    dtypes: tuple[str, ...]


class MarkRow(NamedTuple):
    """A range somebody named: a step, a module, a Python frame, a fetch of the data loader."""

    ts: float
    dur: float
    name: str
    thread: str


class CallRow(NamedTuple):
    """A call of the CUDA runtime or driver."""

    ts: float
    dur: float
    name: str
    thread: str
    correlation: int | None
    external_id: int | None


class WorkRow(NamedTuple):
    """A kernel, memset or copy."""

    ts: float
    dur: float
    name: str
    correlation: int | None
    external_id: int | None
    device: int
    stream: int
    graph_id: int | None
    bytes: int
    grid: tuple[int, int, int] | None
    block: tuple[int, int, int] | None
    registers: int | None
    shared_bytes: int | None
    blocks_per_sm: float | None


@dataclass(slots=True)
class Rows:
    """Everything that is read of a trace, by kind, each in the order of the file."""

    ops: list[OpRow] = field(default_factory=list)
    calls: list[CallRow] = field(default_factory=list)
    kernels: list[WorkRow] = field(default_factory=list)
    memsets: list[WorkRow] = field(default_factory=list)
    copies: list[WorkRow] = field(default_factory=list)
    marks: list[MarkRow] = field(default_factory=list)
    frames: list[MarkRow] = field(default_factory=list)
    """Python frames, named `file.py:12 in function`, of those a reader would want to see."""

    def __len__(self) -> int:
        return sum(len(rows) for rows in (self.ops, self.calls, self.kernels, self.memsets, self.copies, self.marks, self.frames))

    def of(self, category: str) -> list[Any]:
        """The list that events of a category (one of READ) go to."""
        found: list[Any] = getattr(self, READ[category])
        return found


READ = {
    "cpu_op": "ops",
    "cuda_runtime": "calls",
    "cuda_driver": "calls",
    "kernel": "kernels",
    "gpu_memset": "memsets",
    "gpu_memcpy": "copies",
    "user_annotation": "marks",
}
"""Category, as Kineto writes it -> the list of its rows."""
_new = tuple.__new__
"""Twice as fast as a named tuple's own constructor, and a trace has a million rows."""
WORK = frozenset({"kernel", "gpu_memset", "gpu_memcpy"})


class Maker:
    """Makes rows. Equal names, threads, shapes and dtypes become one value: a forward calls the same ones again and again."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._threads: dict[Any, str] = {}
        self._operands: dict[bytes, tuple[Shapes, tuple[str, ...]]] = {}
        self._triples: dict[Any, tuple[int, int, int] | None] = {}

    def op(self, event: Mapping[str, Any], args: Mapping[str, Any], ts: float, dur: float) -> OpRow:
        dims, types = args.get("Input Dims"), args.get("Input type")
        shapes, dtypes = self._operands_of(dims, types) if dims or types else ((), ())
        external = args.get("External id")
        external = external if type(external) is int else integer(external)
        return _new(OpRow, (ts, dur, self.name(event["name"]), self.thread(event), external, shapes, dtypes))

    def call(self, event: Mapping[str, Any], args: Mapping[str, Any], ts: float, dur: float) -> CallRow:
        correlation, external = args.get("correlation"), args.get("External id")
        correlation = correlation if type(correlation) is int else integer(correlation)
        external = external if type(external) is int else integer(external)
        return _new(CallRow, (ts, dur, self.name(event["name"]), self.thread(event), correlation, external))

    def mark(self, event: Mapping[str, Any], ts: float, dur: float) -> MarkRow:
        return MarkRow(ts, dur, self.name(event["name"]), self.thread(event))

    def work(self, event: Mapping[str, Any], args: Mapping[str, Any], ts: float, dur: float) -> WorkRow:
        get = args.get
        row = (
            ts,
            dur,
            self.name(event["name"]),
            integer(get("correlation")),
            integer(get("External id")),
            integer(get("device")) or 0,
            integer(get("stream")) or 0,
            integer(get("graph id")),
            max(0, integer(get("bytes")) or 0),
            self._triple(get("grid")),
            self._triple(get("block")),
            integer(get("registers per thread")),
            integer(get("shared memory")),
            _positive(get("blocks per SM")),
        )
        return _new(WorkRow, row)

    def name(self, name: Any) -> str:
        text = name if type(name) is str else str(name)
        return self._names.setdefault(text, text)

    def thread(self, event: Mapping[str, Any]) -> str:
        """`pid/tid`."""
        key = (event.get("pid", ""), event.get("tid", ""))
        try:
            found = self._threads.get(key)
        except TypeError:  # a list in the place of a number
            return f"{key[0]}/{key[1]}"
        return found if found is not None else self._threads.setdefault(key, f"{key[0]}/{key[1]}")

    def _operands_of(self, dims: Any, types: Any) -> tuple[Shapes, tuple[str, ...]]:
        try:
            key = marshal.dumps((dims, types), 2)  # the fastest way to ask whether nested lists are equal; nothing is ever loaded from it
        except ValueError:  # nested deeper than any shapes
            return (), ()
        found = self._operands.get(key)
        if found is None:
            dtypes = tuple([self.name(t) for t in types if t]) if isinstance(types, list) else ()
            found = self._operands[key] = (_shapes(dims), dtypes)
        return found

    def _triple(self, value: Any) -> tuple[int, int, int] | None:
        """`[132, 1, 1]`; None for anything else."""
        if type(value) is not list or len(value) != 3:
            return None
        x, y, z = value
        if type(x) is not int or type(y) is not int or type(z) is not int:
            return None
        key = (x, y, z)
        return self._triples.setdefault(key, key)


def integer(value: Any) -> int | None:
    """Ids come as numbers, from some exporters as text."""
    if type(value) is int:
        return value
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _shapes(dims: Any) -> Shapes:
    """Kineto's `Input Dims`: one list an argument, a list of lists for a tensor list, [] for what has no dimensions. Empty where anything in it is no shape."""
    found: list[tuple[int, ...]] = []
    for item in dims if isinstance(dims, list) else ():
        if isinstance(item, list) and item:
            found += [tuple(inner) for inner in item if inner] if isinstance(item[0], list) else [tuple(item)]
    return tuple(found) if all(_is_shape(shape) for shape in found) else ()


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < _MAX_ELEMENTS for n in shape) and math.prod(shape) < _MAX_ELEMENTS


def _positive(value: Any) -> float | None:
    """A figure above 0. Kineto writes "inf" or a negative number where it could not ask the device for its SMs."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None
