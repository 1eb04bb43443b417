"""Model outputs -> dicts, lists and tuples of tensors, which any process can open and any caller can keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuopt.core.errors import Unsupported


def plain(value: Any) -> Any:
    """Model outputs -> dicts, lists and tuples of tensors; what is None in a mapping or dataclass is left out.

    Raises Unsupported for an object that holds no tensor torch knows how to find.
    """
    if value is None or isinstance(value, (torch.Tensor, int, float, bool, str)):
        return value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if v is not None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: plain(v) for k, v in found.items() if v is not None}
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    leaves = pytree.tree_leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
        raise Unsupported(
            f"an output is a {type(value).__module__}.{type(value).__qualname__}, which is no tensor, list, tuple or dict",
            fix="return tensors, or turn the output off in the model's configuration (use_cache=False)",
        )
    return tuple(plain(v) for v in leaves)


def copied(value: Any) -> Any:
    """Plain containers with every tensor cloned: what a CUDA graph returned is overwritten by its next replay."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value
