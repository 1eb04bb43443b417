"""What a whole run returned, in any nest of tensors, arrays, images and text -> the same in tensors, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gpuopt.accuracy import compare
from gpuopt.core.result import OutputError

MAX_NEST = 6
"""Levels of containers and objects in which a run's outputs are looked for."""


def compared(before: Any, after: Any) -> tuple[OutputError, ...]:
    """One row an output; both as `kept` gave them."""
    return compare.compare(compare.flatten(before), compare.flatten(after))


def kept(value: Any, depth: int = 0) -> Any:
    """Arrays and images as tensors, in their nest; copies, because what a run returned may be overwritten by the next."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if depth > MAX_NEST:
        return None
    if isinstance(value, Mapping):
        return {key: kept(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [kept(item, depth + 1) for item in value]
    if hasattr(value, "__array_interface__"):  # numpy's arrays, PIL's images
        import numpy

        array = numpy.array(value)
        return torch.from_numpy(array) if array.dtype.kind in "biufc" else None
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        return {key: kept(item, depth + 1) for key, item in vars(value).items() if not callable(item)}
    return value


def texts(value: Any) -> list[str]:
    """All text in it, in order."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in texts(item)]
    return [text for item in value for text in texts(item)] if isinstance(value, list | tuple) else []


def worst(rows: Sequence[OutputError]) -> float | None:
    """The worst: relative RMSE, or the share of integers that differ."""
    found = [row.relative_rmse for row in rows if row.relative_rmse is not None]
    for row in rows:
        if row.exact_mismatches is not None:
            size = 1
            for dim in row.shape:
                size *= dim
            found.append(row.exact_mismatches / max(1, size))
    return max(found, default=None)
