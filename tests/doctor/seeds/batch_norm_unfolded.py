"""convolution -> batch norm -> ReLU, and the same folded; a batch norm whose convolution has a second reader stays, rightly."""

from __future__ import annotations

import torch
from builders import MS, evidence
from torch import nn

from gpuopt.core.result import OpRecord
from gpuopt.doctor.evidence import Evidence

CODE = "GPU304"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Shared(Block):
    """The sum needs what the convolution gave, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return torch.relu(self.norm(y) + y)


def made(block: nn.Module) -> Evidence:
    block = block.half().eval().to(memory_format=torch.channels_last)
    conv = OpRecord(op="aten.cudnn_convolution", module="conv", dtype="float16", time_ns=5 * MS, flops=2e12, bytes=1e9)
    norm = OpRecord(
        op="aten.cudnn_batch_norm", module="norm", dtype="float16", time_ns=3 * MS, flops=0.0, bytes=6e9, shapes="8x16x64x64, 16"
    )
    return evidence(module=block, records=(conv, norm), wall_ms=8.2)


def bad() -> Evidence:
    return made(Block())


def clean() -> Evidence:
    return made(Shared())


GAIN_MS = 3 - 1.5 / 0.95
"""Folded and compiled, one pass over the same bytes is left."""
