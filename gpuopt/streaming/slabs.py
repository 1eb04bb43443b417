"""A unit's tensors <-> one buffer of bytes: typed views into it, filled from a module, checked, and handed to copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import BadInput, ResourceError
from gpuopt.core.streaming import Place, Unit
from gpuopt.streaming.engines import Engine, Fill, HostBuffer

STAGED = 2
"""Locked buffers behind pageable slabs: one is filled by the host while the other is copied."""


class Slab:
    """The bytes of one unit, on the host or the device, and where its tensors lie in them."""

    def __init__(self, unit: Unit, buffer: torch.Tensor) -> None:
        """`buffer`: uint8, at least the unit's bytes; longer ones (a slot of a larger unit) are cut."""
        assert buffer.dtype is torch.uint8 and buffer.dim() == 1 and buffer.numel() >= unit.num_bytes, "a slab is bytes, enough of them"
        self.unit = unit
        self.bytes = buffer[: unit.num_bytes]

    def view(self, place: Place) -> torch.Tensor:
        """The tensor that lies there, of its dtype, shape and strides. Shares the slab's memory; ordinary even in inference mode."""
        with torch.inference_mode(False):
            return viewed(self.bytes[place.offset : place.offset + place.num_bytes], place)


def viewed(raw: torch.Tensor, place: Place) -> torch.Tensor:
    """uint8 bytes of one tensor -> the tensor, with no copy."""
    typed = raw.view(dtype_of(place))
    if typed.numel() != math.prod(place.shape):
        raise BadInput(
            f"{place.name} is {place.num_bytes} bytes, which is not {place.dtype}{list(place.shape)}", fix="plan again from this model"
        )
    return typed.as_strided(place.shape, place.stride)


def dtype_of(place: Place) -> torch.dtype:
    """`bfloat16` or `torch.bfloat16` -> the dtype. Raises BadInput for another word."""
    found = getattr(torch, place.dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise BadInput(
            f"{place.name} has the dtype {place.dtype!r}, which PyTorch does not know", fix="plan again with this version of torch"
        )
    return found


def checksum(raw: torch.Tensor) -> int:
    """The sum of uint8 bytes read as int64, wrapped; up to seven bytes at the end count as they are. Waits for the device the bytes are on.

    Addition in another order gives the same sum, so a device and the host agree to the bit.
    """
    return int(checksum_tensor(raw).item())


def checksum_tensor(raw: torch.Tensor) -> torch.Tensor:
    """`checksum`, left on the device as an int64 of no dimension: nothing waits for it.

    Words as wide as their sum: a sum of narrower ones makes a wider copy of all of them first (twice the slab), which a device whose memory is spoken for does not have.
    """
    whole = raw.numel() // 8 * 8
    total = raw[:whole].view(torch.int64).sum()
    return total + raw[whole:].sum(dtype=torch.int64) if whole < raw.numel() else total


def fill_from_module(unit: Unit, module: nn.Module, buffer: torch.Tensor) -> int:
    """Copy a unit's weights from the module (any device) into host bytes and compare sums. Gives the checksum of the slab. Raises BadInput where the copy differs."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return fill(unit, buffer, lambda name, target: _copied(named[name], target))


def fill(unit: Unit, buffer: torch.Tensor, write: Fill, checks: Mapping[str, int] | None = None) -> int:
    """Have `write` put each tensor of the unit into host bytes. Gives the slab's checksum; gaps count, so they must be zeros, as new pages are."""
    slab = Slab(unit, buffer)
    for place in unit.places:
        write(place.name, slab.view(place))
    return checksum(slab.bytes)


def _copied(source: torch.Tensor, target: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source.detach())
        if bits_of(target) != bits_of(source.detach().to("cpu")):
            raise BadInput("a weight's copy in host memory differs from the weight", fix="check this machine's memory")


def bits_of(tensor: torch.Tensor) -> int:
    """The sum over a tensor's elements, read as bytes where they have no order of addition (NaN, float8)."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    # A view of odd bytes of a storage cannot be read as words where it lies.
    return checksum(flat if flat.storage_offset() % 8 == 0 else flat.clone())


class Held:
    """The source of units whose slabs are locked: the copy reads them directly."""

    def __init__(self, homes: Mapping[str, HostBuffer]) -> None:
        self._homes = dict(homes)

    def bytes_for_copy(self, unit: str) -> torch.Tensor:
        """The slab itself."""
        return self._homes[unit].bytes

    def release(self, unit: str) -> None:
        """Nothing is overwritten."""

    def read(self, unit: str) -> torch.Tensor:
        """The slab itself."""
        return self._homes[unit].bytes

    def abort(self) -> None:
        """Nothing was handed out that could be lost."""

    def close(self) -> None:
        """The slabs are the shelf's."""


class Staged:
    """The source of units whose slabs could not be locked: the host copies each into a locked buffer first, a ring of `STAGED`, and waits where all are in use."""

    def __init__(self, engine: Engine, homes: Mapping[str, HostBuffer]) -> None:
        """Raises ResourceError where not even the ring can be locked."""
        self._engine = engine
        self._homes = dict(homes)
        largest = max(home.bytes.numel() for home in self._homes.values())
        self._ring: list[tuple[HostBuffer, Any]] = []
        self._next = 0
        for _ in range(STAGED):
            buffer = engine.home(largest, pin=True)
            self._ring.append((buffer, engine.event()))
            if not buffer.pinned:
                self._free_ring()
                raise ResourceError(
                    f"the system locks not even {largest:,} bytes of host memory, which copies to the device need",
                    fix="raise the limit on locked memory of this container, or --granularity sub for smaller units",
                )

    def bytes_for_copy(self, unit: str) -> torch.Tensor:
        """A locked copy. The host works here for as long as it takes to copy the slab."""
        buffer, copied = self._ring[self._next]
        self._engine.wait_host(copied)
        source = self._homes[unit].bytes
        target = buffer.bytes[: source.numel()]
        target.copy_(source)
        return target

    def release(self, unit: str) -> None:
        """The buffer is free after the copy that was just queued."""
        self._engine.record_copy(self._ring[self._next][1])
        self._next = (self._next + 1) % len(self._ring)

    @property
    def ring_bytes(self) -> int:
        """Locked, of the ring."""
        return sum(int(buffer.bytes.numel()) for buffer, _ in self._ring)

    def read(self, unit: str) -> torch.Tensor:
        """The slab itself, not the ring's."""
        return self._homes[unit].bytes

    def abort(self) -> None:
        """The ring goes on where it is: each buffer's event says when it is free."""

    def close(self) -> None:
        """Free the ring. The slabs are the shelf's."""
        self._free_ring()

    def _free_ring(self) -> None:
        for buffer, _ in self._ring:
            buffer.close()
        self._ring.clear()


def moved(tensors: Iterable[torch.Tensor], take: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors elsewhere: what shares memory here shares it there, and nothing else of its storage comes along. `take` copies contiguous uint8 bytes.

    `Module.to` copies each tensor on its own, which unties views of one storage.
    """
    given = [tensor.detach() for tensor in tensors]
    found: list[torch.Tensor | None] = [None] * len(given)
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for index, tensor in enumerate(given):
        start = int(tensor.storage_offset()) * tensor.element_size()
        extent = 0 if tensor.numel() == 0 else 1 + sum((int(n) - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride()))
        spans.setdefault(tensor.untyped_storage()._cdata, []).append((start, start + extent * tensor.element_size(), index))
    for group in spans.values():
        for first, last, members in _overlapping(sorted(group)):
            storage = given[members[0][2]].untyped_storage()
            raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, first, (last - first,), (1,))
            there = take(raw)
            for start, _, index in members:
                one = given[index]
                typed = there[(start - first) :]
                size = (last - start) // one.element_size() * one.element_size()
                found[index] = typed[:size].view(one.dtype).as_strided(one.shape, one.stride())
    return [tensor for tensor in found if tensor is not None]


def _overlapping(spans: list[tuple[int, int, int]]) -> Iterable[tuple[int, int, list[tuple[int, int, int]]]]:
    """Spans of bytes, sorted -> (first, last, those within) for each run of spans that touch the same bytes."""
    run: list[tuple[int, int, int]] = []
    last = -1
    for span in spans:
        if run and span[0] >= last:
            yield run[0][0], last, run
            run = []
        run.append(span)
        last = max(last, span[1]) if len(run) > 1 else span[1]
    if run:
        yield run[0][0], last, run
