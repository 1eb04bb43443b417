"""A function that builds a module -> a factory: seeded, in eval mode, with its input specs attached."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import nn

from gpuopt.models.drawing import BankedDraws

SEED = 0


class Factory(Protocol):
    """What `gpuopt.models:NAME` names."""

    input_specs: tuple[str, ...]
    """TensorSpec texts in the order of `forward`; letters are free dimensions, N the batch."""

    def __call__(self) -> nn.Module:
        """A new module in eval mode; every call gives the same weights and leaves the caller's random state alone."""


def factory(*input_specs: str) -> Callable[[Callable[[], nn.Module]], Factory]:
    """Decorator. The wrapped function draws its weights from a generator seeded with SEED."""

    def wrap(build: Callable[[], nn.Module]) -> Factory:
        @functools.wraps(build)
        def make() -> nn.Module:
            # devices=[]: the weights are drawn on the CPU, and asking for the GPUs' states would start CUDA.
            with torch.random.fork_rng(devices=[]), BankedDraws():
                torch.default_generator.manual_seed(SEED)
                return build().eval().requires_grad_(False)

        made = cast(Factory, make)
        made.input_specs = input_specs
        return made

    return wrap
