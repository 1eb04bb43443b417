"""A live model, inputs, settings -> one digest: tensors by their bytes, objects by their class, its source file and what they hold.

Two processes get the same digest for the same content only. What cannot be read completely (an object of C with a state of its own, a cycle too deep) raises
Unreadable instead of being left out: a digest that overlooks a difference is worse than none.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import os
import pathlib
import re
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy
import torch

from gpuopt.devices import cpu

CHUNK_BYTES = 32 << 20
"""Hashed at a time by one thread: SHA-256 runs at about 1 GiB/s a core, and weights come in gigabytes."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, pathlib.PurePath)

_OF_THE_PROCESS = frozenset({"_original_object_hash"})
"""Attributes that differ from process to process and change nothing: transformers keeps Python's hash of a generation configuration, to see later edits."""

STAGED_BYTES = 4 << 20
"""Copied from a device at a time."""


class Unreadable(Exception):
    """Why no digest can be given."""


def digest(*values: Any, limit_bytes: int) -> str:
    """Hexadecimal SHA-256 of the values and all they hold. Raises Unreadable, also for more than `limit_bytes` of tensors."""
    with ThreadPoolExecutor(min(cpu.num_cores(), 16)) as pool:
        walk = _Walk(pool, limit_bytes)
        try:
            for value in values:
                walk.value(value)
        except RecursionError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise Unreadable(f"{type(error).__name__}: {error}"[:200]) from error
        except Unreadable:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return walk.digest()


class _Walk:
    """One pass over values in their own order."""

    def __init__(self, pool: ThreadPoolExecutor, limit_bytes: int) -> None:
        self._pool = pool
        self._left = limit_bytes
        self._hash = hashlib.sha256()
        self._chunks: list[Future[bytes]] = []
        self._seen: dict[int, tuple[int, Any]] = {}
        """Objects by id: where they came, and themselves, as the id of a dead object is used again."""

    def digest(self) -> str:
        for chunk in self._chunks:
            self._hash.update(chunk.result())
        return self._hash.hexdigest()

    def value(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self._say("enum", type(value).__qualname__, value.name)
        elif type(value) in _PLAIN or isinstance(value, _NAMED):
            self._say(type(value).__name__, repr(value))
        elif isinstance(value, numpy.generic | numpy.dtype):
            self._say("numpy", repr(value))
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType | logging.Logger):
            self._say("named", value.__name__ if isinstance(value, types.ModuleType) else value.name)
        elif isinstance(value, re.Pattern):
            self._say("pattern", repr(value.pattern), str(value.flags))
        elif isinstance(value, weakref.ref):
            self._say("reference to", type(value()).__qualname__)  # what it holds is walked where it is held
        elif id(value) in self._seen:
            self._say("again", str(self._seen[id(value)][0]))
        else:
            self._seen[id(value)] = (len(self._seen), value)
            self._new(value)

    def _new(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, numpy.ndarray):
            self._say("array", str(value.dtype))
            if value.dtype.hasobject:
                raise Unreadable("an array of objects")
            self._tensor(torch.from_numpy(numpy.frombuffer(value.tobytes(), dtype=numpy.uint8).copy()).reshape(-1))
            self._say(repr(value.shape))
        elif isinstance(value, torch.Generator):
            self._tensor(value.get_state())
        elif isinstance(value, torch.fx.GraphModule):
            # Its graph is a linked list of nodes that point at everything; the code made of it says what it computes.
            self._say("graph", value.code)
            for part in (value._parameters, value._buffers, value._modules):
                self.value(dict(part))
        elif isinstance(value, types.FunctionType):
            code = value.__code__
            self._say("function", str(value.__module__), value.__qualname__, code.co_code.hex(), repr(code.co_names))
            self._constants(code)
            self.value(value.__defaults__)
            self.value(value.__kwdefaults__)
            for cell in value.__closure__ or ():
                self.value(cell.cell_contents if cell != types.CellType() else None)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__)
            self.value(value.__self__)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self._say("builtin", str(getattr(value, "__module__", "")), value.__qualname__)
        elif isinstance(value, functools.partial):
            self.value((value.func, value.args, value.keywords))
        else:
            self._holder(value)

    def _holder(self, value: Any) -> None:
        """A container, an object with attributes, or both at once (an OrderedDict of a library's own)."""
        known = False
        self._class(type(value))
        if isinstance(value, Mapping):
            known = True
            self._say("mapping", str(len(value)))
            for key, item in value.items():
                self.value(key)
                self.value(item)
        elif isinstance(value, list | tuple):
            known = True
            self._say("sequence", str(len(value)))
            for item in value:
                self.value(item)
        elif isinstance(value, set | frozenset):
            known = True
            if not all(type(item) in _PLAIN or isinstance(item, _NAMED) for item in value):
                raise Unreadable(f"a set of {type(next(iter(value))).__qualname__}")
            self._say("set", *sorted(repr(item) for item in value))
        for name in (slot for cls in type(value).__mro__ for slot in _slots(cls)):
            known = True
            if hasattr(value, name):
                self._say("slot", name)
                self.value(getattr(value, name))
        if (attributes := getattr(value, "__dict__", None)) is not None:
            known = True
            for name, item in attributes.items():
                if name in _OF_THE_PROCESS:
                    continue
                self._say("attribute", str(name))
                if isinstance(item, dict) and name.endswith("_hooks"):
                    self.value(list(item.values()))  # its keys count the hooks of the whole process
                else:
                    self.value(item)
        if not known:
            raise Unreadable(f"a {type(value).__module__}.{type(value).__qualname__}")

    def _class(self, cls: type) -> None:
        """By name and by the file that its code is in, as it lies on the disk."""
        self._say("class", str(cls.__module__), cls.__qualname__, _source(cls))

    def _constants(self, code: types.CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._say("code", constant.co_code.hex(), repr(constant.co_names))
                self._constants(constant)
            else:
                self.value(constant)

    def _tensor(self, tensor: torch.Tensor) -> None:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout is not torch.strided or tensor.is_meta:
            raise Unreadable(f"a tensor of {type(tensor).__qualname__}, {tensor.layout}, on {tensor.device.type}")
        if tensor.is_quantized:
            raise Unreadable("a quantised tensor")
        self._left -= tensor.nbytes
        if self._left < 0:
            raise Unreadable("too many bytes of tensors")
        self._say("tensor", str(tensor.dtype), repr(tuple(tensor.shape)), repr(tensor.stride()))
        flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
        step = max(1, CHUNK_BYTES // tensor.element_size())
        for start in range(0, flat.numel(), step):
            self._chunks.append(self._pool.submit(_hashed, flat[start : start + step]))

    def _say(self, *words: str) -> None:
        """Words with their lengths: no two lists of words read the same."""
        for word in words:
            data = word.encode(errors="surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)
        self._hash.update(b"\xff" * 8)


_held = threading.local()


def _hashed(part: torch.Tensor) -> bytes:
    flat = part.contiguous().view(torch.uint8)
    if flat.device.type == "cpu":
        return hashlib.sha256(_bytes(flat)).digest()
    # Through memory that the thread keeps: new memory for each chunk takes longer than the copy and the hash.
    if not hasattr(_held, "pieces"):
        _held.pieces = torch.empty(STAGED_BYTES, dtype=torch.uint8)
    found = hashlib.sha256()
    for piece in flat.split(STAGED_BYTES):
        found.update(_bytes(_held.pieces[: piece.numel()].copy_(piece)))
    return found.digest()


def _bytes(tensor: torch.Tensor) -> Any:
    data: Callable[[], Any] = tensor.numpy
    return data()


def _slots(cls: type) -> tuple[str, ...]:
    found = cls.__dict__.get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


@functools.cache
def _source(cls: type) -> str:
    for member in vars(cls).values():
        if isinstance(member, types.FunctionType):
            try:
                found = os.stat(member.__code__.co_filename)
            except OSError:
                return member.__code__.co_filename  # made up: a dataclass' own methods
            return f"{member.__code__.co_filename} {found.st_size} {found.st_mtime_ns}"
    return ""
