"""A module -> the same moved by accelerate's `dispatch_model`: as it is shipped, and as well as it can be set by hand. Imports torch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gpuopt.core.streaming import Anatomy
from gpuopt.pipeline.streamed.rivals.putback import moved, put_back, settle


@contextmanager
def shipped(module: nn.Module, device: str, weight_bytes: int, anatomy: Anatomy) -> Iterator[str]:
    """As `device_map="auto"` with `max_memory`: blocks in order until the bytes are used up, the others from pageable memory, a tensor at a time, before each forward."""
    accelerate: Any = importlib.import_module("accelerate")
    index = torch.device(device).index or 0
    # Whole blocks, as a transformers class itself says for its own device_map.
    classes = sorted({type(module.get_submodule(unit.name)).__name__ for unit in anatomy.units})
    found = accelerate.infer_auto_device_map(module, max_memory={index: weight_bytes, "cpu": 1 << 50}, no_split_module_classes=classes)
    device_map = {name: "cpu" if where == "cpu" else torch.device(device) for name, where in found.items()}
    streamed = sum(_moves(unit.name, device_map) for unit in anatomy.units)
    with _dispatched(module, device, device_map, None):
        yield f"{len(anatomy.units) - streamed} of {len(anatomy.units)} blocks stay, chosen by infer_auto_device_map"


@contextmanager
def pinned(module: nn.Module, device: str, weight_bytes: int, anatomy: Anatomy) -> Iterator[str]:
    """The best that is in `dispatch_model`: a device map that uses up the bytes, everything outside blocks resident, and the others' weights locked beforehand, given as `state_dict`."""
    stay = fitting(module, weight_bytes, anatomy)
    device_map = placed(module, {unit.name: unit.name in stay for unit in anatomy.units}, device)
    with put_back(module), ExitStack() as stack:
        stack.callback(settle, device)
        own = dict(module.named_parameters(remove_duplicate=False))
        for name, where in device_map.items():
            if name in own and where != "cpu":  # dispatch_model places modules, and this belongs to none of those in the map
                moved(own[name], device)
        locked: dict[int, torch.Tensor] = {}
        states: dict[str, torch.Tensor] = {}
        for unit in anatomy.units:
            if unit.name in stay:
                continue
            for name, tensor in module.get_submodule(unit.name).named_parameters(remove_duplicate=False):
                value = tensor.data
                if id(tensor) not in locked:
                    locked[id(tensor)] = value.pin_memory() if torch.device(device).type == "cuda" else value
                states[f"{unit.name}.{name}"] = locked[id(tensor)]
        stack.enter_context(_dispatched(module, device, device_map, states))
        yield f"{len(stay)} of {len(anatomy.units)} blocks stay, chosen to use up the budget; the others from locked memory"


@contextmanager
def _dispatched(module: nn.Module, device: str, device_map: Mapping[str, Any], states: dict[str, torch.Tensor] | None) -> Iterator[None]:
    accelerate: Any = importlib.import_module("accelerate")
    with ExitStack() as stack:
        stack.callback(settle, device)
        stack.enter_context(put_back(module))
        tie = getattr(module, "tie_weights", None)
        if callable(tie):
            tie()
        if states is None and device_map.get("") == "cpu":  # of which dispatch_model would look for weights named ".…"
            states = dict(module.state_dict())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following device_map keys do not match", category=UserWarning)
            # force_hooks: a map that names one place only would move nothing, even where that place is the host.
            accelerate.dispatch_model(
                module, device_map=dict(device_map), main_device=torch.device(device), state_dict=states, force_hooks=True
            )
        yield


def _moves(unit: str, device_map: Mapping[str, Any]) -> bool:
    """Whether a key of the map that holds the unit, or a part of it, is on the host."""
    return any(
        where == "cpu" and (not name or f"{unit}.".startswith(f"{name}.") or name.startswith(f"{unit}."))
        for name, where in device_map.items()
    )


def fitting(module: nn.Module, weight_bytes: int, anatomy: Anatomy) -> frozenset[str]:
    """Units that can stay: from the first on, beside everything outside units and the largest layer that is moved, since accelerate moves layers one by one."""
    layers = [
        sum(p.nbytes for p in layer.parameters(recurse=False))
        for unit in anatomy.units
        for layer in module.get_submodule(unit.name).modules()
    ]
    left = weight_bytes - sum(anatomy.fixed.values()) - max(layers, default=0)
    stay = []
    for unit in anatomy.units:
        size = sum(place.num_bytes for place in unit.places)
        if size > left:
            break
        left -= size
        stay.append(unit.name)
    return frozenset(stay)


def placed(module: nn.Module, stays: Mapping[str, bool], device: str) -> dict[str, Any]:
    """Module -> `cpu` for units that move, the device for all that is outside them: the fewest names that cover everything.

    stays: unit -> whether it stays on the device.
    """
    found: dict[str, Any] = {}

    def walk(name: str, part: nn.Module) -> None:
        if name in stays:
            found[name] = torch.device(device) if stays[name] else "cpu"
        elif name and not any(unit.startswith(f"{name}.") for unit in stays):
            found[name] = torch.device(device)
        else:
            for child, inner in part.named_children():
                walk(f"{name}.{child}" if name else child, inner)
            for own, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                found[f"{name}.{own}" if name else own] = torch.device(device)

    walk("", module)
    return found
