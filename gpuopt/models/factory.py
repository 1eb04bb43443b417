"""A function that builds a module -> a factory: seeded, in eval mode, with its input specs attached, and able to build on a GPU what the GPU will hold."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import nn

from gpuopt.models.drawing import BankedDraws

SEED = 0
ROOM = 6
"""Times its weights that a device must have free before a model is built there: the model, the candidate, and a reference of eight bytes a number beside them."""

_log = logging.getLogger(__name__)


class Factory(Protocol):
    """What `gpuopt.models:NAME` names."""

    input_specs: tuple[str, ...]
    """TensorSpec texts in the order of `forward`; letters are free dimensions, N the batch."""

    def __call__(self) -> nn.Module:
        """A new module in eval mode, on the CPU; every call gives the same weights and leaves the caller's random state alone."""

    def on_device(self, device: str) -> nn.Module:
        """The same module with all its tensors on this device, its large ones never in the host's memory; on the CPU where the device has no room for it.

        `meta`: the large ones have no values and no memory, the small ones lie on the CPU: for questions about its structure.
        """


def factory(*input_specs: str) -> Callable[[Callable[[], nn.Module]], Factory]:
    """Decorator. The wrapped function draws its weights from a generator seeded with SEED."""

    def wrap(build: Callable[[], nn.Module]) -> Factory:
        def drawn(device: str | None) -> nn.Module:
            # devices=[]: the weights are drawn on the CPU, and asking for the GPUs' states would start CUDA.
            with torch.random.fork_rng(devices=[]), BankedDraws(device, limit_bytes=None if device is None else room_bytes(device)):
                torch.default_generator.manual_seed(SEED)
                module = build().eval().requires_grad_(False)
            return module if device in (None, "meta") else module.to(device)

        @functools.wraps(build)
        def make() -> nn.Module:
            return drawn(None)

        def on_device(device: str) -> nn.Module:
            try:
                return drawn(device)
            except (RuntimeError, NotImplementedError) as error:
                # Too large, or its constructor computes with weights, some of which were there and some here. What is wrong with the model itself comes up again below.
                _log.debug("%s is built on the host: %s", build.__name__, error)
            return drawn(None)

        return offered(make, input_specs, on_device)

    return wrap


def offered(make: Callable[[], nn.Module], input_specs: tuple[str, ...], on_device: Callable[[str], nn.Module]) -> Factory:
    """The function with what a Factory has besides."""
    made = cast(Factory, make)
    made.input_specs = input_specs
    made.on_device = on_device  # type: ignore[method-assign,assignment]
    return made


def room_bytes(device: str) -> int | None:
    """Weights that may be made on this device; None for one that does not say what is free."""
    if not device.startswith("cuda"):
        return None
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes // ROOM
