"""Module -> how many weights each element of its tensors stands for: one, but where a layer packs several into a word.

Such a layer says so itself: its class attribute `WEIGHTS_PER_ELEMENT` maps names of its parameters and buffers to weights an element, 0 for what is none (scales of groups).
"""

from __future__ import annotations

from typing import Any


def weights_per_element(module: Any) -> dict[int, int]:
    """id of a tensor -> weights an element, of the tensors that differ from one."""
    found: dict[int, int] = {}
    for part in module.modules():
        for name, number in getattr(type(part), "WEIGHTS_PER_ELEMENT", {}).items():
            tensor = getattr(part, name, None)
            if tensor is not None:
                found[id(tensor)] = number
    return found


def num_weights(module: Any) -> int:
    """Parameters of a module as its author counts them, shared ones once."""
    per_element = weights_per_element(module)
    return sum({id(p): p.numel() * per_element.get(id(p), 1) for p in module.parameters()}.values())
