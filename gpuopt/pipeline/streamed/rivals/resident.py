"""A module -> the same with everything on the device, which is what all others are held against. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from gpuopt.core import units
from gpuopt.core.errors import ResourceError
from gpuopt.pipeline.streamed.rivals.putback import put_back, settle
from gpuopt.streaming import hostpages

ROOM = 0.95
"""Of the free memory: what weights may take and leave room for a call."""
SPARE = 1.1
"""Of the weights: host memory that must be left over for their values to be kept there meanwhile."""


@contextmanager
def whole(module: nn.Module, device: str, weight_bytes: int) -> Iterator[None]:
    """On the device within, on the CPU after. Raises ResourceError where the weights do not fit.

    Values stay in host memory where there is room for them, for copying them back takes longer than anything else here.
    """
    free, _ = torch.cuda.mem_get_info(device)
    if weight_bytes > ROOM * free:
        raise ResourceError(
            f"{units.format_bytes(weight_bytes)} of weights do not fit the {units.format_bytes(free)} that are free on {device}",
            fix="stream them: that is what this command is for",
        )
    with ExitStack() as stack:
        stack.callback(settle, device)
        available = hostpages.available_bytes()
        if available is not None and available >= SPARE * weight_bytes:
            stack.enter_context(put_back(module))
        else:
            stack.callback(module.to, "cpu")
        module.to(device)
        yield
