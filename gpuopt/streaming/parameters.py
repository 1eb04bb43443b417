"""A module's parameters and buffers -> the same, lying elsewhere: views of a slab, or whole on the device; and back again.

A parameter stays the object it is and its `.data` is set, so ties by identity hold. Where that cannot be (on meta, made in inference mode) it is replaced once, everywhere it is held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from gpuopt.core.errors import BadInput
from gpuopt.core.streaming import Anatomy, Place, Unit
from gpuopt.streaming import guards
from gpuopt.streaming.engines import Fill
from gpuopt.streaming.slabs import Slab, dtype_of, moved


@dataclass(slots=True, eq=False)
class _Held:
    """A tensor and every (module, local name) that holds it."""

    name: str
    """The first."""
    tensor: torch.Tensor
    is_parameter: bool
    by: list[tuple[nn.Module, str]] = field(default_factory=list)

    def become(self, new: torch.Tensor) -> None:
        """The same tensor to all who hold it, with other data."""
        if self.is_parameter and not (self.tensor.is_meta or self.tensor.is_inference()):
            self.tensor.data = new
            return
        self.tensor = _parameter(new) if self.is_parameter else new
        for module, local in self.by:
            if self.is_parameter:
                module._parameters[local] = self.tensor  # type: ignore[assignment]
            else:
                module._buffers[local] = self.tensor


class Tensors:
    """Of one module, as an anatomy sorts them."""

    def __init__(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Raises BadInput, naming what differs, where the anatomy is another model's."""
        self._module = module
        self._anatomy = anatomy
        named = dict(module.named_parameters(remove_duplicate=False))
        _refuse_another(anatomy, named)
        self._all: dict[int, _Held] = {}
        for prefix, each in module.named_modules():
            for is_parameter, table in ((True, each._parameters), (False, each._buffers)):
                for local, tensor in table.items():
                    if tensor is not None:
                        name = f"{prefix}.{local}" if prefix else local
                        self._all.setdefault(id(tensor), _Held(name, tensor, is_parameter)).by.append((each, local))
        self._in_units = {p.name: self._all[id(named[p.name])] for unit in anatomy.units for p in unit.places}
        self._on_host = {name: self._all[id(named[name])] for name in anatomy.host}
        self._unmove: list[Callable[[], None]] = []
        self._undo = ExitStack()

    def parameter(self, name: str) -> torch.Tensor:
        """As it is now."""
        return self._in_units[name].tensor

    def unfilled(self, units: Collection[str]) -> str | None:
        """A tensor that has no values, outside these units; None: all have."""
        spared = {id(self._in_units[p.name]) for unit in self._anatomy.units if unit.name in units for p in unit.places}
        return next((held.name for held in self._all.values() if held.tensor.is_meta and id(held) not in spared), None)

    def point(self, unit: Unit, slab: Slab) -> None:
        """The unit's parameters become views of these bytes."""
        for place in unit.places:
            self._in_units[place.name].become(slab.view(place))

    def empty(self, unit: Unit) -> None:
        """The unit's parameters have no values any more: they are on meta."""
        for place in unit.places:
            held = self._in_units[place.name]
            # A parameter with memory cannot be given data on meta: another one takes its place.
            held.tensor = nn.Parameter(
                torch.empty_strided(place.shape, place.stride, dtype=dtype_of(place), device="meta"), requires_grad=False
            )
            for module, local in held.by:
                module._parameters[local] = held.tensor

    def lies_in(self, unit: Unit, raw: torch.Tensor) -> bool:
        """Whether the unit's parameters are views of these bytes of the host, where `point` put them."""
        start = raw.data_ptr()
        found = ((self._in_units[place.name].tensor, place) for place in unit.places)
        return all(tensor.device.type == "cpu" and tensor.data_ptr() == start + place.offset for tensor, place in found if place.num_bytes)

    def settle(self, device: torch.device, fill: Fill | None, *, keep: bool = False) -> None:
        """Everything outside units goes to the device, and gets values where it has none. What shares memory goes on sharing it. Embeddings kept on the host stay.

        keep: parameters keep their memory on the host meanwhile, and get it back by `unsettle`: nothing is copied from the device, which must not have changed them.
        """
        self._settle_host(device, fill)
        spared = {id(held) for held in (*self._in_units.values(), *self._on_host.values())}
        going = []
        for held in self._all.values():
            if id(held) in spared:
                continue
            if held.tensor.is_meta:
                real = _filled(held, fill)
                held.become(real.to(device))
                self._unmove.append(functools.partial(held.become, real) if keep else functools.partial(_move, held, torch.device("cpu")))
            elif type(held.tensor.data) is not torch.Tensor:  # a subclass knows how to move itself
                self._unmove.append(functools.partial(_move, held, held.tensor.device))
                _move(held, device)
            elif held.tensor.device != device:
                going.append(held)
        for held, there in zip(going, moved((held.tensor for held in going), lambda raw: raw.to(device)), strict=True):
            if keep and held.is_parameter:
                self._unmove.append(functools.partial(held.become, held.tensor.detach()))
            else:
                self._unmove.append(functools.partial(_move, held, held.tensor.device))
            held.become(there)

    def _settle_host(self, device: torch.device, fill: Fill | None) -> None:
        for name, held in self._on_host.items():
            if held.tensor.is_meta:
                held.become(_filled(held, fill))
            if device.type != "cpu":
                embedding = self._module.get_submodule(name.rpartition(".")[0])
                self._undo.callback(guards.put(embedding, "forward", _gathering(embedding.forward, device)))

    def unsettle(self) -> None:
        """What was moved goes back to where it was; what had no values keeps those it got, on the CPU."""
        self._undo.close()
        for back in reversed(self._unmove):
            back()
        self._unmove.clear()


def _filled(held: _Held, fill: Fill | None) -> torch.Tensor:
    assert fill is not None, "asked before: `unfilled`"
    real = torch.empty(held.tensor.shape, dtype=held.tensor.dtype)
    fill(held.name, real)
    return real


def _move(held: _Held, device: torch.device) -> None:
    held.become(held.tensor.detach().to(device))


def _gathering(forward: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """An embedding on the host for indices on the device. The host waits for the indices, and the rows travel: few bytes, for a table that does not."""

    @functools.wraps(forward)
    def gathered(indices: torch.Tensor) -> torch.Tensor:
        return forward(indices.to("cpu")).to(device)

    return gathered


def _parameter(data: torch.Tensor) -> nn.Parameter:
    """Set rather than made from it: its count of writes is its own, not that of the slot it lies in."""
    fresh = nn.Parameter(torch.empty(0, dtype=data.dtype), requires_grad=False)
    fresh.data = data
    return fresh


def _refuse_another(anatomy: Anatomy, named: Mapping[str, torch.Tensor]) -> None:
    places: dict[str, Place] = {place.name: place for unit in anatomy.units for place in unit.places}
    known = {*places, *anatomy.fixed, *anatomy.tied, *anatomy.host}
    wrong = (("it lacks", sorted({*places, *anatomy.host} - set(named))), ("the plan lacks", sorted(set(named) - known)))
    said = [f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for what, names in wrong if names]
    if said:
        raise BadInput(f"the plan was made for another model ({'; '.join(said)})", fix="plan again from this model")
    for name, place in places.items():
        tensor = named[name]
        if tuple(tensor.shape) != place.shape or tensor.dtype is not dtype_of(place):
            raise BadInput(
                f"{name} is {tensor.dtype}{list(tensor.shape)}, and {place.dtype}{list(place.shape)} in the plan",
                fix="plan again from this model",
            )
