"""torch's own functions <-> the same functions with an eye on them. Put in by the first recording, taken out by the last; whatever somebody else put over them meanwhile stays."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gpuopt.script import lines, recorder

_MISSING = object()
_FAST_CALLS = 300
"""Calls of a module that does nothing, to learn what passing one on takes."""


class _Local(threading.local):
    """One thread's place: inside a root call, inside a load, inside the recorder itself."""

    depth = 0
    loading = 0
    is_quiet = False


_local = _Local()
_lock = threading.RLock()
_active: tuple[recorder.Recording, ...] = ()
_put: list[tuple[Any, str, Any, Any]] = []
"""(owner, name, what was there in its own dict or _MISSING, what we put)."""
_finder: _Finder | None = None


def start(recording: recorder.Recording) -> None:
    """Begin to tell this recording. The first one puts the eyes in."""
    global _active, _finder
    with _lock:
        if not _active:
            _finder = _Finder()
            sys.meta_path.insert(0, _finder)
            for owner, name, make in _targets():
                _patch(owner, name, make)
            for module_name in _LATE:
                if module_name in sys.modules:
                    _finder.found(sys.modules[module_name])
        _active = (*_active, recording)
        recording.nested_s = _fast_path_s()


def stop(recording: recorder.Recording) -> None:
    """Tell it nothing more. The last one takes the eyes out."""
    global _active, _finder
    with _lock:
        _active = tuple(other for other in _active if other is not recording)
        if _active:
            return
        if _finder is not None and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        _finder = None
        while _put:
            owner, name, before, ours = _put.pop()
            if owner.__dict__.get(name) is not ours:
                continue  # somebody wrapped it since: ours passes everything on
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        utils = sys.modules.get("torch._dynamo.utils")
        if utils is not None and getattr(getattr(utils, "unpatched_nn_module_call", None), "__gpuopt__", False):
            utils.unpatched_nn_module_call = nn.Module.__call__  # type: ignore[attr-defined]  # it was imported while ours was in its place


def is_call(code: Any) -> bool:
    """Whether a frame's code is that of an observed root call: an exception that passed one came out of a model."""
    return bool(getattr(code, "co_name", "") == "observed_call" and code.co_filename == __file__)


def _patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    there = getattr(owner, name, None)
    if there is None:
        return
    before = owner.__dict__.get(name, _MISSING)
    ours = make(before if before is not _MISSING else there)
    setattr(owner, name, ours)
    _put.append((owner, name, before, ours))


def _targets() -> Iterable[tuple[Any, str, Callable[[Any], Any]]]:
    yield nn.Module, "__call__", _module_call
    yield nn.Module, "load_state_dict", functools.partial(_load, what="load_state_dict", size=_state_bytes)
    for name in ("to", "cuda", "cpu"):
        yield nn.Module, name, _move
    yield torch, "load", functools.partial(_load, what="torch.load", size=_file_bytes)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        yield (
            torch.Tensor,
            name,
            functools.partial(_read, what={"item": ".item()", "tolist": ".tolist()"}.get(name, f"{name.strip('_')}(tensor)")),
        )
    for name in ("cpu", "cuda", "to", "numpy"):
        yield torch.Tensor, name, functools.partial(_transfer, what=f".{name}()")
    yield torch.cuda, "synchronize", functools.partial(_wait, what="torch.cuda.synchronize()")


def _pretrained(module: ModuleType) -> None:
    _patch(
        module.PreTrainedModel,
        "from_pretrained",
        lambda before: classmethod(_load(before.__func__, what="from_pretrained", size=_model_bytes)),
    )


_LATE: dict[str, Callable[[ModuleType], None]] = {
    "safetensors.torch": lambda module: _patch(module, "load_file", functools.partial(_load, what="load_file", size=_file_bytes)),
    "transformers.modeling_utils": _pretrained,
}
"""What is imported by the program itself, if at all: patched when it is."""


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the modules of _LATE being imported, and lets the usual finders do it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in _LATE:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.found(module)

        loader.exec_module = exec_module  # of this one loader: each spec has its own

    def found(self, module: ModuleType) -> None:
        with _lock:
            if _finder is self:
                _LATE[module.__name__](module)


# -- what the eyes do -------------------------------------------------------------------------------------------------------------


def _module_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def observed_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Traced code (torch.compile, export) must hold nothing of ours: for the compiler this is a constant.
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        here = _local
        if here.depth:
            for recording in _active:
                recording.num_nested += 1
            return original(self, *args, **kwargs)
        if here.is_quiet or not _active or "_is_replica" in self.__dict__:  # a replica is DataParallel's, whose own call is seen
            return original(self, *args, **kwargs)
        recordings = _active
        asked, tracing = time.perf_counter(), [recording.tracing_s for recording in recordings]
        here.is_quiet = True
        try:
            keys = [recording.entered(self, args, kwargs, lines.here()) for recording in recordings]
        finally:
            here.is_quiet = False
        here.depth = 1
        failure: BaseException | None = None
        began = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        except BaseException as error:
            failure = error
            raise
        finally:
            ended = time.perf_counter()
            here.depth = 0
            here.is_quiet = True
            try:
                for recording, key, before in zip(recordings, keys, tracing):
                    recording.left(key, began, ended - began, failure)
                    recording.overhead_s += began - asked + time.perf_counter() - ended - (recording.tracing_s - before)
            finally:
                here.is_quiet = False
                del failure  # or this frame and the exception would hold each other

    observed_call.__gpuopt__ = True  # type: ignore[attr-defined]
    return observed_call


def _load(original: Callable[..., Any], *, what: str, size: Callable[..., float]) -> Callable[..., Any]:
    """Reading weights: the outermost of such calls counts, for each is made of others."""

    @functools.wraps(original)
    def observed_load(*args: Any, **kwargs: Any) -> Any:
        if _is_blind() or _local.loading:
            return original(*args, **kwargs)
        result, seconds = _timed(original, args, kwargs)
        _tell("load", what, seconds, lambda: size(result, *args, **kwargs))
        return result

    return observed_load


def _move(original: Callable[..., Any]) -> Callable[..., Any]:
    """Module.to, .cuda, .cpu: counts where something moved or changed its dtype; a model that is there already is no news."""

    @functools.wraps(original)
    def observed_move(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _is_blind() or _local.loading:
            return original(self, *args, **kwargs)
        before = [(t.device, t.dtype) for t in _tensors(self)]
        result, seconds = _timed(original, (self, *args), kwargs)
        pairs = list(zip(before, _tensors(self)))
        moved = [t for (device, _), t in pairs if device != t.device]
        cast = [t for (_, dtype), t in pairs if dtype != t.dtype]
        if moved or cast:
            _tell("load", ".to(device)" if moved else ".to(dtype)", seconds, lambda: _bytes(moved or cast))
        return result

    return observed_move


def _read(original: Callable[..., Any], *, what: str) -> Callable[..., Any]:
    """A value of a tensor asked for by the host: on a device that works by itself, a wait."""

    @functools.wraps(original)
    def observed_read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_blind() or _local.loading or not recorder.is_remote(self):
            return original(self, *args, **kwargs)
        result, seconds = _timed(original, (self, *args), kwargs)
        _tell("sync", what, seconds, lambda: _bytes([self]), nearest=True)
        return result

    return observed_read


def _transfer(original: Callable[..., Any], *, what: str) -> Callable[..., Any]:
    """Tensor.to and its kin: counts where the tensor changed its device."""

    @functools.wraps(original)
    def observed_transfer(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_blind() or _local.loading:
            return original(self, *args, **kwargs)
        result, seconds = _timed(original, (self, *args), kwargs)
        where = result.device if isinstance(result, torch.Tensor) else torch.device("cpu")
        if where != self.device and self.device.type != "meta":
            arrow = f"{what} {self.device.type} to {where.type}"
            _tell("copy", arrow, seconds, lambda: _bytes([self]), nearest=True)
        return result

    return observed_transfer


def _wait(original: Callable[..., Any], *, what: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def observed_wait(*args: Any, **kwargs: Any) -> Any:
        if _is_blind():
            return original(*args, **kwargs)
        result, seconds = _timed(original, args, kwargs)
        _tell("sync", what, seconds, lambda: 0.0, nearest=True)
        return result

    return observed_wait


def _is_blind() -> bool:
    """Nobody listens, the compiler traces, or it is the recorder itself that asks."""
    return bool(torch.compiler.is_compiling() or _local.is_quiet or not _active)


def _timed(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
    _local.loading += 1
    began = time.perf_counter()
    try:
        return original(*args, **kwargs), time.perf_counter() - began
    finally:
        _local.loading -= 1


def _tell(kind: str, what: str, seconds: float, size: Callable[[], float], *, nearest: bool = False) -> None:
    began = time.perf_counter()
    _local.is_quiet = True
    try:
        where, _ = lines.caller(lines.here(2), nearest=nearest)
        num_bytes, in_call = size(), _local.depth > 0
        for recording in _active:
            getattr(recording, kind)(what, where, seconds, num_bytes, in_call)
            recording.overhead_s += time.perf_counter() - began
    finally:
        _local.is_quiet = False


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[torch.Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _state_bytes(result: Any, module: Any, state: Any = None, *args: Any, **kwargs: Any) -> float:
    state = kwargs.get("state_dict", state)
    return _bytes(t for t in state.values() if isinstance(t, torch.Tensor)) if hasattr(state, "values") else 0.0


def _file_bytes(result: Any, file: Any = None, *args: Any, **kwargs: Any) -> float:
    """Of a path, its size; of a buffer nothing: it is in memory already."""
    file = kwargs.get("f", kwargs.get("filename", file))
    try:
        return float(os.path.getsize(file)) if isinstance(file, str | os.PathLike) else 0.0
    except OSError:
        return 0.0


def _model_bytes(result: Any, *args: Any, **kwargs: Any) -> float:
    model = result[0] if isinstance(result, tuple) else result
    return _bytes(_tensors(model)) if isinstance(model, nn.Module) else 0.0


def _fast_path_s() -> float:
    """What passing one submodule's call on takes: this module's `__call__` against torch's, on a module that does nothing."""
    empty = nn.Identity()
    observed = nn.Module.__call__
    plain = getattr(observed, "__wrapped__", observed)
    times = []
    _local.depth += 1
    kept = [recording.num_nested for recording in _active]
    try:
        for call in (plain, observed):
            began = time.perf_counter()
            for _ in range(_FAST_CALLS):
                call(empty, None)
            times.append((time.perf_counter() - began) / _FAST_CALLS)
    finally:
        _local.depth -= 1
        for recording, number in zip(_active, kept):
            recording.num_nested = number
    return max(0.0, times[1] - times[0])
