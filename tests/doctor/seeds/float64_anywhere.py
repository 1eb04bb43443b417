"""A normalisation constant straight from numpy, which makes everything after it float64; and the same as float32."""

from __future__ import annotations

import numpy
import torch
from builders import MS, evidence
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU201"


class Normed(nn.Module):
    def __init__(self, dtype: type) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(numpy.full(8, 0.5, dtype=dtype)))
        self.register_buffer("temperature", torch.tensor(2.0, dtype=torch.float64))
        """Without dimensions: promotes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.temperature


def made(dtype: type, name: str, num_bytes: float, time_ns: float) -> Evidence:
    row = OpRecord(
        op="aten.sub", module="", dtype=name, time_ns=time_ns, flops=0.0, bytes=num_bytes, kernels=("vectorized_elementwise_kernel",)
    )
    return evidence(
        module=Normed(dtype).eval(),
        inputs=Inputs(args=(torch.ones(4, 8, dtype=torch.float32),)),
        records=(row,),
        wall_ms=time_ns / MS,
    )


def bad() -> Evidence:
    return made(numpy.float64, "float64", 16e9, 4 * MS)


def clean() -> Evidence:
    return made(numpy.float32, "float32", 8e9, 2 * MS)


GAIN_MS = 4 - 2
