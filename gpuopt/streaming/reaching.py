"""A forward of a streamed model -> an error where it reads a streamed unit's weights outside that unit's forward.

A slot holds a unit's weights only while that unit's forward runs. A model that calls a part of a block by itself (`block.attention(x)`), or reads a weight of it elsewhere, would
compute with whatever lies there: other outputs, and no error. One forward is watched, function by function: that costs time, and most models do the same in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gpuopt.core.errors import Unsupported

_LOOKS = frozenset(
    {"__get__", "__set__", "__hash__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "data_ptr"}
    | {"is_contiguous", "element_size", "get_device", "is_floating_point", "is_complex", "untyped_storage", "requires_grad_"}
    | {
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
    }
)
"""What asks a tensor about itself, and not for its values. A view is looked at when it is used."""
_LIKE = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as"})
"""What asks the second about itself, and the first for its values."""


class Watch(TorchFunctionMode):
    """Entered around a forward of the whole model. `slots`: of each streamed unit, the buffer of its slot.

    Functions as Python calls them, and not what they dispatch to: with a mode below them some are computed by other kernels, and the bits would not be the model's.
    """

    def __init__(self, slots: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.running: list[str] = []
        """Units whose forward runs now, from the outermost on."""
        self._of: dict[int, list[str]] = {}
        self._ends: dict[int, int] = {}
        for name, buffer in slots.items():
            start = buffer.data_ptr()
            self._of.setdefault(start, []).append(name)
            self._ends[start] = start + buffer.numel() * buffer.element_size()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _LOOKS:
            for leaf in args[:1] if name in _LIKE else tree_leaves((args, kwargs or {})):
                if type(leaf) in (torch.Tensor, torch.nn.Parameter):
                    self._look(func, leaf)
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
            return
        place = tensor.data_ptr()
        start = next((start for start, end in self._ends.items() if start <= place < end), None)
        if start is None or any(name in self._of[start] for name in self.running):
            return
        held = " or ".join(self._of[start][:3])
        where = f"the forward of {self.running[-1]}" if self.running else "the model's own forward"
        raise Unsupported(
            f"{where} reads weights of a streamed block ({held}) outside that block's forward, in {getattr(func, '__name__', func)}: they lie on the device only while it runs",
            fix="call the block itself; or name what is called by itself as the block (--granularity sub); or a budget that holds everything",
        )
