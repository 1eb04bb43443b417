"""Inputs, or what an artifact accepts -> tensors fit for a first call: large enough to trace, or all zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs


def widened(inputs: Inputs, ranges: Mapping[str, tuple[int, int]]) -> Inputs:
    """The same inputs, dynamic dimensions below their range or of size 1 repeated up to it, memory order kept: tracers fix sizes 0 and 1 for good.

    `ranges`: letter -> (low, high), both included; where they are equal the dimension is brought to that size and stays fixed. Raises Unsupported for a range below 2.
    """
    specs = iter(inputs.specs)
    dims = dict(inputs.dims)

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        spec = next(specs, None)
        shape = list(tensor.shape)
        for axis, letter in enumerate(spec.shape if spec else ()):
            if not isinstance(letter, str) or letter not in ranges:
                continue
            low, high = ranges[letter]
            least = low if low == high else max(2, low)
            if shape[axis] < least:
                if high < 2 or not shape[axis]:
                    raise Unsupported(
                        f"dimension {letter} cannot be dynamic from {low} to {high}", fix=f"give it a range: --dim {letter}=1:2:8"
                    )
                shape[axis] = dims[letter] = least
        return tensor if shape == list(tensor.shape) else _tiled(tensor, shape)

    args, kwargs = pytree.tree_map_only(torch.Tensor, leaf, (tuple(inputs.args), dict(inputs.kwargs)))
    return replace(inputs, args=args, kwargs=kwargs, dims=dims)


def zeros(accepts: Accepts) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Inputs an artifact accepts, all zero, dynamic dimensions at their highest: for a first call when the real inputs are not there yet."""
    tensors = []
    for index, want in enumerate(accepts.inputs):
        shape = accepts.shape(index)
        tensor = torch.empty_strided(shape, accepts.strides(index, shape), dtype=getattr(torch, want.dtype), device=want.device)
        tensors.append(tensor.zero_())
    keywords = accepts.inputs[accepts.positional :]
    return tuple(tensors[: accepts.positional]), {w.name: t for w, t in zip(keywords, tensors[accepts.positional :], strict=True)}


def _tiled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Its values over and over, up to this shape."""
    times = [1 if want == have else -(-want // have) for want, have in zip(shape, tensor.shape, strict=True)]
    values = tensor.repeat(times)[tuple(slice(size) for size in shape)]
    accepts = Accepts.of(Inputs(args=(tensor,)))
    if accepts.inputs[0].order is None:  # an expanded or sliced tensor: its strides do not fit another shape
        return values.contiguous()
    wide = torch.empty_strided(shape, accepts.strides(0, shape), dtype=tensor.dtype, device=tensor.device)
    return wide.copy_(values)
