"""Arguments or results of a forward -> their tensors, how each lies in memory, and a key of all the rest; and back again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gpuopt.core.streaming import ALIGNMENT

_TENSOR = "tensor"
_HOST_ALIGNMENT = 64
"""Of every tensor that PyTorch allocates on the CPU."""
_CONSTANTS = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))


class Refused(Exception):
    """Why there can be no graph."""


class Layout(NamedTuple):
    """How a tensor lies in memory: as far as kernels are chosen by it, so that a copy is computed with by the same ones."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Elements from an aligned address."""

    @staticmethod
    def of(tensor: torch.Tensor, device: torch.device) -> Layout:
        """Raises Refused for a tensor that is elsewhere, or that a copy could not be like."""
        if tensor.device != device:
            raise Refused(f"a tensor on {tensor.device}")
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            raise Refused("a tensor that is not a plain one")
        size = tensor.element_size()
        shift = tensor.data_ptr() % (ALIGNMENT if device.type == "cuda" else _HOST_ALIGNMENT)
        if shift % size:
            raise Refused("a tensor between two elements' addresses")
        return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, shift // size)

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((count - 1) * step for count, step in zip(self.shape, self.stride, strict=True))

    @property
    def overlaps(self) -> bool:
        """Whether elements share memory in another way than by a dimension that was expanded."""
        reach = 0
        for step, count in sorted((step, count) for count, step in zip(self.shape, self.stride, strict=True) if count > 1 and step):
            if step <= reach:
                return True
            reach += (count - 1) * step
        return False

    def empty(self, device: torch.device | str) -> torch.Tensor:
        """A tensor that lies like this, its elements unwritten. Raises Refused."""
        if self.overlaps:
            raise Refused("a tensor whose elements overlap in memory")
        if not self.offset:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        whole = torch.empty(self.offset + self.span, dtype=self.dtype, device=device)
        return whole.as_strided(self.shape, self.stride, self.offset)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor of this layout, which lies like it."""
        made = self.empty(tensor.device)
        copy_into(made, tensor)
        return made


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """All elements, each once where a dimension was expanded."""
    for dim, step in enumerate(target.stride()):
        if not step and target.shape[dim] > 1:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source, non_blocking=True)


def flat(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value with its tensors taken out and appended: hashable, and equal for values that differ in nothing but tensors. Raises Refused for anything that is not plain."""
    kind = type(value)
    if kind is torch.Tensor or kind is nn.Parameter:
        tensors.append(value)
        return _TENSOR
    if kind in _CONSTANTS:
        # 1, 1.0 and True are equal, -0.0 and 0.0 too; not to a forward.
        return (kind, repr(value), value)
    if kind is tuple or kind is list:
        return (kind, tuple(flat(one, tensors) for one in value))
    if kind is dict:
        for name in value:
            if type(name) not in (str, int):
                raise Refused(f"a dict by {type(name).__name__}")
        return (kind, tuple((name, flat(one, tensors)) for name, one in value.items()))
    raise Refused(f"a {kind.__name__}, which is neither a tensor nor a plain value")


def filled(spec: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The value that `flat` took apart, with other tensors."""
    return _filled(spec, iter(tensors))


def _filled(spec: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if spec is _TENSOR:
        return next(tensors)
    kind, *rest = spec
    if kind in _CONSTANTS:
        return rest[1]
    if kind is dict:
        return {name: _filled(one, tensors) for name, one in rest[0]}
    return kind(_filled(one, tensors) for one in rest[0])
