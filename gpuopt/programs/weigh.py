"""PyTorch's dispatched ops -> Tally, with the TF32 switches as they stand on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpuopt.core.tally import Tally, tf32_flags
from gpuopt.programs import cuda


def tally_for(device: str) -> Tally:
    """An empty tally that takes fp32 products for TF32 where this device, as it is switched now, computes them so."""
    return Tally(**tf32_flags(torch.backends, cuda.capability(device)))


class Weigh(TorchDispatchMode):
    """Hands every op dispatched inside the block to `tally`."""

    supports_higher_order_operators = True

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tally.add(str(func), args, kwargs or {}, out)
        return out
