"""A module -> a context after which it is as it was, whatever a library hung on it meanwhile. Imports torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def put_back(module: nn.Module) -> Iterator[None]:
    """Attributes, hooks, parameters, buffers and where their values lie. The values themselves must not change, which holds for inference.

    Values stay in host memory for as long as it is entered, whatever else the library keeps.
    """
    parts = [(part, _copied(vars(part))) for part in module.modules()]
    tensors = {id(t): t for part, _ in parts for t in (*part._parameters.values(), *part._buffers.values()) if t is not None}
    values = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors.values()]
    try:
        yield
    finally:
        for part, kept in parts:
            _restore(vars(part), kept)
        for tensor, value, requires_grad in values:
            tensor.data = value
            tensor.requires_grad_(requires_grad)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries among them (parameters, buffers, children, hooks) one level deeper."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in attributes.items()}


def _restore(attributes: dict[str, Any], kept: dict[str, Any]) -> None:
    attributes.clear()
    for name, (value, entries) in kept.items():
        if entries is not None:
            value.clear()
            value.update(entries)
        attributes[name] = value


def settle(device: str) -> None:
    """Wait for the device, and let the allocator's unused memory go. Nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def let_go(device: str) -> None:
    """What a library left to be collected, and the locked memory that torch keeps for the next who asks: gigabytes of a host that others want to load on."""
    gc.collect()  # hooks and what they hook hold each other
    settle(device)
    if torch.device(device).type == "cuda":
        # The second is the same in torch before 2.12.
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty is not None:
            empty()


def moved(tensor: torch.Tensor, device: str) -> None:
    """The tensor's values, on the device from now on; its identity stays, so ties do too."""
    if tensor.device != torch.device(device):
        tensor.data = tensor.data.to(device)
