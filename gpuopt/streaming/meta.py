"""A module's class and its safetensors files -> the module with its parameters on the meta device, and how each is filled. No weight is read until it is asked for.

Only parameters go to the meta device. Buffers (rotary tables, masks, running statistics) and whatever else a constructor computes are built for real, as on a CPU:
what is not in a file cannot be read from one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gpuopt.core.errors import BadInput, GpuoptError, Unsupported
from gpuopt.core.streaming import Place, Unit
from gpuopt.streaming.shards import Shards
from gpuopt.trust.policy import printable

_SHOWN = 5
_SAMPLE = 64
"""Elements at the start, the middle and the end of each tensor that a fingerprint looks at."""
_PREFIXES = ("module.", "_orig_mod.")
"""DataParallel's and torch.compile's."""


class Weights(Protocol):
    """A module, and where its weights come from."""

    module: nn.Module
    notes: list[str]

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Write a parameter's true values into a CPU tensor of its dtype and shape."""

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        """Write a unit's slab into uint8 CPU memory of `unit.num_bytes`: its tensors, and zeros between them."""

    def fingerprint(self) -> str:
        """Differs when the weights do, as far as a sample of each tells."""

    def close(self) -> None:
        """Let go of files."""


class Empty:
    """A module on the meta device, and the files its parameters are in."""

    def __init__(self, module: nn.Module, shards: Shards, stored: Mapping[str, str], notes: Sequence[str]) -> None:
        self.module = module
        self.shards = shards
        self.stored = dict(stored)
        """Parameter, under each of its names -> the tensor in the files."""
        self.notes = [*notes, *shards.notes]
        self.check: Callable[[str, torch.Tensor], None] | None = None
        """Looks at each tensor when it has been read, as it is in its file, and raises where it is not to be used."""
        self._parameters = dict(module.named_parameters(remove_duplicate=False))

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Read one parameter into a CPU tensor of its dtype and shape. Raises BadInput and ResourceError, naming file and offset."""
        parameter, entry = self._parameters[name], self.shards.entries[self.stored[name]]
        if target.shape != parameter.shape or target.dtype != parameter.dtype:
            raise ValueError(f"{name} is {parameter.dtype} {list(parameter.shape)}, its target {target.dtype} {list(target.shape)}")
        dtype = getattr(torch, entry.dtype)
        direct = target.dtype == dtype and target.is_contiguous()
        read = target if direct else torch.empty(entry.shape, dtype=dtype)
        self.shards.read_into(self.stored[name], bytes_of(read))
        if self.check is not None:
            self.check(name, read)
        if not direct:
            target.copy_(read)

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        """Read a unit's slab: all its tensors at once, straight to their places."""
        clear_gaps(unit, target)
        entries = self.shards.entries
        at_once, direct, one_by_one = [], [], []
        for place in unit.places:
            entry = entries[self.stored[place.name]]
            memory = target[place.offset : place.offset + place.num_bytes]
            if entry.dtype == place.dtype.removeprefix("torch.") and entry.shape == place.shape and is_row_major(place.shape, place.stride):
                at_once.append((entry.name, memory))
                direct.append((place, memory))
            else:
                one_by_one.append((place, memory))
        self.shards.read_all(at_once)
        if self.check is not None:
            for place, memory in direct:
                self.check(place.name, typed(memory, place))
        for place, memory in one_by_one:
            self.fill(place.name, typed(memory, place))

    def materialize(self, names: Iterable[str] | None = None) -> None:
        """Give parameters real values on the CPU, under all their names at once; all that are still on the meta device where none are named."""
        wanted = set(self._parameters if names is None else names)
        for group in grouped(self.module):
            name, parameter = group[0], self._parameters[group[0]]
            if parameter.is_meta and not wanted.isdisjoint(group):
                value = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu")
                self.fill(name, value)
                put(self.module, group, nn.Parameter(value, requires_grad=parameter.requires_grad))
        self._parameters = dict(self.module.named_parameters(remove_duplicate=False))

    def fingerprint(self) -> str:
        """sha256 over name, dtype, shape and a sample of each parameter's values."""
        entries = self.shards.entries

        def sample(name: str, start: int, count: int) -> torch.Tensor:
            entry = entries[self.stored[name]]
            dtype = getattr(torch, entry.dtype)
            raw = bytearray(self.shards.sample(entry.name, start * dtype.itemsize, count * dtype.itemsize))
            return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)

        return fingerprint(self.module, sample)

    def close(self) -> None:
        """Close the files."""
        self.shards.close()


def of_shards(
    build: Callable[[], nn.Module],
    shards: Shards,
    *,
    where: str,
    cast: bool = False,
    prefixes: Sequence[str] = (),
    allow_extra: bool = False,
    wanted_dtypes: Callable[[nn.Module], Mapping[str, torch.dtype]] | None = None,
) -> Empty:
    """Call `build` with its parameters on the meta device, and find each in the files. Persistent buffers are read at once.

    Nothing is dropped, cast or left as the constructor made it without a word: raises BadInput naming the first tensors that are missing, extra or of
    another shape or dtype (`cast` converts dtypes; `allow_extra` makes a note). prefixes: that may stand before all names on one side and not on the other.
    wanted_dtypes: parameters that the class itself keeps in another dtype.
    """
    module = built(build)
    kept = wanted_dtypes(module) if wanted_dtypes is not None else {}
    recast(module, kept)
    notes: list[str] = []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    persistent = persistent_buffers(module)
    stored = _stored(module, [*parameters, *persistent], shards, (*prefixes, *_PREFIXES))
    _require_whole(parameters, persistent, stored, shards, where, allow_extra, notes)
    casts = {**parameters, **persistent} if cast else kept
    _require_fit({**parameters, **persistent}, stored, shards, where, casts, notes)
    empty = Empty(module, shards, {name: stored[name] for name in parameters}, notes)
    with torch.no_grad():
        for name, buffer in persistent.items():
            entry = shards.entries[stored[name]]
            value = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            shards.read_into(entry.name, bytes_of(value))
            if buffer.is_meta:
                owner, _, attribute = name.rpartition(".")
                module.get_submodule(owner)._buffers[attribute] = value.to(buffer.dtype)
            else:
                buffer.copy_(value)
    _require_values(module)
    return empty


# --- building ----------------------------------------------------------------------------------------------------------------------------------

_patch = threading.Lock()


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Call a constructor so that each parameter is on the meta device from the moment it is registered, and tied ones stay one. Raises Unsupported when it needs their values."""
    try:
        with parameters_on_meta() as hollow:
            module = build()
            for owner in module.modules():  # what was put there without registering it
                for name, parameter in owner._parameters.items():
                    owner._parameters[name] = hollow(parameter)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise Unsupported(
            f"the constructor needs the values of parameters, which are not there yet: {printable(str(error), limit=200)}",
            fix="build it on the CPU with its weights, and stream the module: gpuopt.stream(module, budget=…)",
        ) from error
    return module


Hollow = Callable[[nn.Parameter | None], nn.Parameter | None]


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[Hollow]:
    """While entered, what this thread registers as a parameter becomes one without memory. Other threads build as ever. Yields what does it."""
    owner = threading.get_ident()
    twins: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}
    original = nn.Module.register_parameter

    def hollow(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or type(parameter) is not nn.Parameter:
            return parameter
        known = twins.get(id(parameter))
        if known is None or known[0]() is not parameter:  # ids are used again
            twin = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            twin.__dict__.update(parameter.__dict__)
            known = twins[id(parameter)] = (weakref.ref(parameter), twin)
        return known[1]

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, hollow(param) if threading.get_ident() == owner else param)

    with _patch:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield hollow
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def recast(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters on the meta device other dtypes, under all their names."""
    every = dict(module.named_parameters(remove_duplicate=False))
    for group in grouped(module) if dtypes else ():
        parameter = every[group[0]]
        dtype = next((dtypes[other] for other in group if other in dtypes), parameter.dtype)
        if parameter.is_meta and dtype != parameter.dtype:
            put(module, group, nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad))


def grouped(module: nn.Module) -> list[list[str]]:
    """Names of parameters, those of one parameter together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def put(module: nn.Module, names: Iterable[str], parameter: nn.Parameter) -> None:
    """Put one parameter in under several names. `.data =` cannot leave the meta device."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner)._parameters[attribute] = parameter


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a state dict has, under each of their names."""
    found: dict[str, torch.Tensor] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _require_values(module: nn.Module) -> None:
    """Buffers and other tensors must have values: a constructor that computes one from parameters cannot be run without them."""
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    for prefix, owner in module.named_modules():
        lost += [f"{prefix}.{key}".lstrip(".") for key, value in vars(owner).items() if isinstance(value, torch.Tensor) and value.is_meta]
    if lost:
        raise Unsupported(
            f"{_list(lost)} would have no value: the constructor computes it from parameters, or on the meta device",
            fix="build it on the CPU with its weights, and stream the module: gpuopt.stream(module, budget=…)",
        )


# --- names, shapes, dtypes ---------------------------------------------------------------------------------------------------------------------


def _stored(module: nn.Module, names: Sequence[str], shards: Shards, prefixes: Sequence[str]) -> dict[str, str]:
    """Name in the module -> name in the files, by itself, by a prefix more or less, or by a name it is tied to."""
    there = shards.entries

    def find(name: str) -> str | None:
        spellings = [name, *(prefix + name for prefix in prefixes), *(name.removeprefix(prefix) for prefix in prefixes)]
        return next((spelling for spelling in spellings if spelling in there), None)

    stored = {name: found for name in names if (found := find(name)) is not None}
    for group in grouped(module):
        sources = sorted({stored[name] for name in group if name in stored})
        for other in sources[1:]:
            if not _same(shards, sources[0], other):
                raise BadInput(
                    f"{_list([sources[0], other])} differ, but the model ties them",
                    fix="tie_word_embeddings (or what ties them) must be as it was when the weights were saved",
                )
        if sources:
            stored.update(dict.fromkeys(group, stored.get(group[0], sources[0])))
    return stored


def _same(shards: Shards, one: str, other: str) -> bool:
    """Bytes of two tensors, in pieces."""
    a, b = shards.entries[one], shards.entries[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = 32 * 2**20
    return all(shards.sample(one, start, step) == shards.sample(other, start, step) for start in range(0, a.num_bytes, step))


def missing_and_extra(module: nn.Module, shards: Shards, prefixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the module has and the files lack, and the other way round."""
    names = [*dict(module.named_parameters(remove_duplicate=False)), *persistent_buffers(module)]
    stored = _stored(module, names, shards, (*prefixes, *_PREFIXES))
    return _missing_and_extra(names, stored, shards)


def _missing_and_extra(names: Iterable[str], stored: Mapping[str, str], shards: Shards) -> tuple[list[str], list[str]]:
    used = set(stored.values())
    return [name for name in names if name not in stored], [name for name in shards.entries if name not in used]


def _require_whole(
    parameters: Mapping[str, torch.Tensor],
    persistent: Mapping[str, torch.Tensor],
    stored: Mapping[str, str],
    shards: Shards,
    where: str,
    allow_extra: bool,
    notes: list[str],
) -> None:
    missing, extra = _missing_and_extra([*parameters, *persistent], stored, shards)
    # The other name of a tied tensor is used by nobody, and no surplus either: _stored compared it.
    known = {prefix + name for name in parameters for prefix in ("", *_PREFIXES)}
    extra = [name for name in extra if name not in known]
    if missing or (extra and not allow_extra):
        parts = [f"lacks {_list(missing)}"] * bool(missing) + [f"has {_list(extra)}, which the model has not"] * bool(extra)
        raise BadInput(f"{where} does not fit the model: it {' and '.join(parts)}", fix="give the class that these weights were saved from")
    if extra:
        notes.append(f"{len(extra)} tensors of the files belong to no part of the model: {_list(extra)}")


def _require_fit(
    wanted: Mapping[str, torch.Tensor], stored: Mapping[str, str], shards: Shards, where: str, casts: Iterable[str], notes: list[str]
) -> None:
    """Shapes, and dtypes but for the names in `casts`."""
    entries = shards.entries
    pairs = [(name, tensor, entries[stored[name]]) for name, tensor in wanted.items()]
    shapes = [f"{n} is {list(e.shape)} in the file, {list(t.shape)} in the model" for n, t, e in pairs if tuple(t.shape) != e.shape]
    if shapes:
        raise BadInput(f"{where} does not fit the model: {_list(shapes)}", fix="the configuration and the weights must belong together")
    dtypes = {n: f"{n} is {e.dtype} in the file, {short(t.dtype)} in the model" for n, t, e in pairs if short(t.dtype) != e.dtype}
    allowed = set(casts)
    silent = [text for name, text in dtypes.items() if name not in allowed]
    if silent:
        raise BadInput(
            f"{where} has other dtypes than the model: {_list(silent)}",
            fix="--cast converts them to the model's; or build the model in the dtype of its weights",
        )
    if dtypes:
        notes.append(f"cast {len(dtypes)} tensors: {printable(next(iter(dtypes.values())))}" + (", …" if len(dtypes) > 1 else ""))


# --- bytes -------------------------------------------------------------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as uint8."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def typed(memory: torch.Tensor, place: Place) -> torch.Tensor:
    """A place's bytes as its tensor."""
    flat: torch.Tensor = memory.view(getattr(torch, place.dtype.removeprefix("torch.")))
    return flat.as_strided(place.shape, place.stride)


def is_row_major(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements lie as a file has them. Extents of 1 may have any stride, and a tensor without elements any strides."""
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and step != expected and math.prod(shape) > 0:
            return False
        expected *= extent
    return True


def clear_gaps(unit: Unit, memory: torch.Tensor) -> None:
    """Zeros between the tensors of a slab, so that the same weights give the same bytes."""
    end = 0
    for place in sorted(unit.places, key=lambda p: p.offset):
        memory[end : place.offset].zero_()
        end = place.offset + place.num_bytes
    memory[end : unit.num_bytes].zero_()


def fingerprint(module: nn.Module, sample: Callable[[str, int, int], torch.Tensor]) -> str:
    """`sample(name, first element, how many)` gives values in row-major order. The same weights give the same text, in files or in memory."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name} {short(parameter.dtype)} {list(parameter.shape)}\n".encode("utf-8", "surrogateescape"))
        count = parameter.numel()
        for start in sorted({0, max(0, count // 2 - _SAMPLE // 2), max(0, count - _SAMPLE)}):
            values = sample(name, start, min(_SAMPLE, count - start)).to(parameter.dtype)
            digest.update(bytes_of(values.contiguous()).numpy().tobytes())
    return digest.hexdigest()


def short(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _list(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(printable(item) for item in items[:_SHOWN]) + more


def empty(source: Any, shards: Shards | None = None, *, cast: bool = False) -> Weights:
    """The module of a transformers folder (a path), of a factory with its files, or one that is in memory already, whose weights are freed as they are moved.

    Raises BadInput, Untrusted, Unavailable; UsageError when a factory comes without files.
    """
    if isinstance(source, nn.Module):
        from gpuopt.streaming.owned import Owned

        return Owned(source)
    if isinstance(source, (str, Path)):
        from gpuopt.streaming.folders import of_folder

        return of_folder(Path(source), cast=cast)
    if shards is None:
        raise GpuoptError("a factory comes without its weights", fix="give the safetensors files: shards.opened(…)")
    return of_shards(source, shards, where=", ".join(path.name for path in shards.paths[:2]), cast=cast)
