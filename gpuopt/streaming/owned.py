"""A module that holds its weights -> the same weights elsewhere, each let go of as soon as it was moved: a model and a copy of it do not fit."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import nn

from gpuopt.core.errors import Unsupported
from gpuopt.core.streaming import Unit
from gpuopt.streaming import meta

_TRIM_BYTES = 256 * 2**20
"""Freed, before the C library is asked to give it back to the system."""


class Owned:
    """A module on the CPU. With `free`, a parameter that was moved keeps its shape and dtype, and holds NaN in four bytes."""

    def __init__(self, module: nn.Module, *, free: bool = True) -> None:
        """Raises Unsupported for parameters without values."""
        self.module = module
        self.notes: list[str] = []
        self._free = free
        self._freed_bytes = 0
        self._gone: set[str] = set()
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        lost = [name for name, parameter in self._parameters.items() if parameter.is_meta]
        if lost:
            raise Unsupported(f"{lost[0]} is on the meta device: it has no value to stream", fix="load its weights, or name their files")
        self._names: dict[int, set[str]] = {}
        for name, parameter in self._parameters.items():
            self._names.setdefault(id(parameter), set()).add(name)
        self._members: dict[int, dict[int, nn.Parameter]] = {}
        """Storage -> the parameters that are views of it; it is freed when the last was moved."""
        for parameter in self._parameters.values():
            self._members.setdefault(_storage(parameter), {})[id(parameter)] = parameter
        self._left = {storage: set(members) for storage, members in self._members.items()}
        self._storage = {name: _storage(parameter) for name, parameter in self._parameters.items()}
        self._fingerprint: str | None = None

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Copy a parameter into a CPU tensor of its dtype and shape, and free it once every parameter of its storage was moved."""
        self._copy(name, target)
        if self._free:
            self._let_go(name)

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        """Copy a unit's slab, and free what it was made of."""
        meta.clear_gaps(unit, target)
        for place in unit.places:
            self.fill(place.name, meta.typed(target[place.offset : place.offset + place.num_bytes], place))

    def keeping(self) -> Owned:
        """The same weights, of which nothing is freed: for packing a module that is used on."""
        return Owned(self.module, free=False)

    def fingerprint(self) -> str:
        """As of the files it would be saved to. Known from before the first parameter was freed."""
        if self._fingerprint is None:

            def sample(name: str, start: int, count: int) -> torch.Tensor:
                whole = self._parameters[name].detach()
                flat = whole.view(-1) if whole.is_contiguous() else whole.reshape(-1)
                return flat[start : start + count].to("cpu")

            self._require_here(self._gone)
            self._fingerprint = meta.fingerprint(self.module, sample)
        return self._fingerprint

    def close(self) -> None:
        """Give freed memory back to the system."""
        _trim()

    def _copy(self, name: str, target: torch.Tensor) -> None:
        self._require_here({name} & self._gone)
        source = self._parameters[name].detach()
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"{name} is {source.dtype} {list(source.shape)}, its target {target.dtype} {list(target.shape)}")
        target.copy_(source)

    def _require_here(self, gone: set[str]) -> None:
        if gone:
            raise ValueError(f"{min(gone)} was moved and freed already")

    def _let_go(self, name: str) -> None:
        storage = self._storage[name]
        self._left[storage].discard(id(self._parameters[name]))
        if self._left[storage]:
            return
        self.fingerprint()  # while everything is still here
        for parameter in self._members[storage].values():
            self._hollow(parameter)

    def _hollow(self, parameter: nn.Parameter) -> None:
        self._gone |= self._names[id(parameter)]
        self._freed_bytes += parameter.numel() * parameter.element_size()
        one = torch.full((), float("nan") if parameter.is_floating_point() else 0, dtype=parameter.dtype)
        with torch.no_grad():
            parameter.data = one.expand(parameter.shape)
        if self._freed_bytes >= _TRIM_BYTES:
            self._freed_bytes = 0
            _trim()


def _storage(parameter: nn.Parameter) -> int:
    return int(parameter.untyped_storage()._cdata)


def _trim() -> None:
    """glibc keeps what was freed for itself below a threshold that grows to 32 MiB, which is most weights."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
