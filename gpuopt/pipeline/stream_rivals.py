"""A module -> the same run otherwise: everything resident, or moved by accelerate with as many bytes of weights on the device. Each a context that undoes itself. Imports torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpuopt.core import units
from gpuopt.core.errors import ResourceError, Unavailable
from gpuopt.core.streaming import Anatomy

ROOM = 0.95
"""Of the free memory: what weights may take and leave room for a call."""


@contextmanager
def whole(module: Any, device: str, weight_bytes: int) -> Iterator[None]:
    """On the device within, on the CPU after. Raises ResourceError where the weights do not fit."""
    free, _ = torch.cuda.mem_get_info(device)
    if weight_bytes > ROOM * free:
        raise ResourceError(
            f"{units.format_bytes(weight_bytes)} of weights do not fit the {units.format_bytes(free)} that are free on {device}",
            fix="stream them: that is what this command is for",
        )
    module.to(device)
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        module.to("cpu")
        torch.cuda.empty_cache()


def require_accelerate() -> None:
    """Raises Unavailable where it is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise Unavailable("accelerate is not installed", fix="pip install accelerate")


@contextmanager
def accelerated(module: Any, device: str, weight_bytes: int, anatomy: Anatomy) -> Iterator[None]:
    """`dispatch_model` as it is shipped: blocks in order until the bytes are used up, the others on the host, moved before each forward. Raises Unavailable without accelerate."""
    require_accelerate()
    accelerate: Any = importlib.import_module("accelerate")
    hooks: Any = importlib.import_module("accelerate.hooks")
    index = torch.device(device).index or 0
    # Whole blocks, as a transformers class itself says for its own device_map.
    classes = sorted({type(module.get_submodule(unit.name)).__name__ for unit in anatomy.units})
    device_map = accelerate.infer_auto_device_map(module, max_memory={index: weight_bytes, "cpu": 1 << 50}, no_split_module_classes=classes)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    dispatched = accelerate.dispatch_model(module, device_map=device_map, main_device=index)
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        hooks.remove_hook_from_module(dispatched, recurse=True)
        module.to("cpu")
        torch.cuda.empty_cache()
