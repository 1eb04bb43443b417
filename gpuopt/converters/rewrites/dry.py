"""A module and a call of it -> the same call on fake tensors, which costs no memory and hardly time, or on the real ones where fake ones will not do.

On the CPU, wherever the module lies: what it calls is the same, and kernels for fp32 exist there, in which a module still is while it is changed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from gpuopt.converters import precision
from gpuopt.core.live import Inputs


def run(module: nn.Module, inputs: Inputs, watched: Callable[[nn.Module], Any] | None = None) -> Any:
    """One call of a copy with faked weights, `watched(copy)` before it (hooks, say); its result where there is no `watched`, else what that returned.

    Raises whatever the forward raises on real tensors, after fake ones failed too.
    """
    try:
        return faked(module, inputs, watched)
    except Exception:  # noqa: BLE001  anything may fail on fake tensors: the real run is the judge, and raises what is real
        twin = precision.copied(module, "cpu")
        found = watched(twin) if watched is not None else None
        given = inputs.map(lambda value: pytree.tree_map_only(torch.Tensor, lambda t: t.to("cpu"), value))
        with torch.no_grad():
            outputs = twin(*given.args, **given.kwargs)
        return found if watched is not None else outputs


def faked(module: nn.Module, inputs: Inputs, watched: Callable[[nn.Module], Any] | None = None) -> Any:
    """The same on fake tensors alone. Raises whatever a forward raises on them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type in ("cpu", "meta"):
            return mode.from_tensor(tensor, static_shapes=True)
        with mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    elsewhere = {id(t): fake(t) for t in (*module.parameters(), *module.buffers()) if t.device.type not in ("cpu", "meta")}
    with FakeCopyMode(mode), torch.no_grad():
        twin = copy.deepcopy(module, elsewhere)
    found = watched(twin) if watched is not None else None
    given = inputs.map(lambda value: pytree.tree_map_only(torch.Tensor, fake, value))
    with _quiet(), torch.inference_mode(False), torch.no_grad(), mode:
        outputs = twin(*given.args, **given.kwargs)
    return found if watched is not None else outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs a traceback for each op that fails on fake tensors; here that is an expected turn."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was
