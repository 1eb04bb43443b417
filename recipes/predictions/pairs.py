"""What a pair is: two sides, and the rule that is to tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from gpuopt.core.spec import BackendSpec, Precision, Transforms

HALF, FP32 = torch.float16, torch.float32
NHWC = Transforms(channels_last=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two: a module with its inputs on the CPU, and how gpuopt is to run it."""

    module: nn.Module
    inputs: Mapping[str, torch.Tensor]
    precision: Precision | None = None
    backend: str = "eager"
    transforms: Transforms = field(default_factory=Transforms)

    @property
    def spec(self) -> BackendSpec:
        """The backend as a candidate names it."""
        return BackendSpec.parse(self.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A pair. `bad` and `fixed` take `small`."""

    name: str
    code: str
    what: str
    change: str
    bad: Callable[[bool], Side]
    fixed: Callable[[bool], Side]
    on_cpu: bool = False
    """Whether its rule can tell on a CPU, where there are no kernels, no copies and no TF32."""
    same_within: float = 2e-2
    """Relative RMSE between the outputs of both sides."""


def tf32(small: bool) -> Precision | None:
    """The rehearsal runs on a CPU, which has no TF32."""
    return None if small and not torch.cuda.is_available() else Precision.TF32
