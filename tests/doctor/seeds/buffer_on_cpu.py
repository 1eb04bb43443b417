"""A position table kept as a bare tensor, and the same registered; both shapes of reading that do no harm are in the twin."""

from __future__ import annotations

import torch
from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU103"


class Left(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.positions = torch.arange(32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._placed(self.embed(ids))

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions[: x.shape[1], None]


class Registered(Left):
    def __init__(self) -> None:
        super().__init__()
        table = self.positions
        del self.positions
        self.register_buffer("positions", table, persistent=False)
        self.scale = torch.tensor(0.5)
        """No dimensions: kernels take it as a number wherever it lies."""
        self.moved = torch.ones(16)
        self.unused = torch.ones(16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._placed(self.embed(ids)) * self.scale + self.moved.to(ids.device) * self.positions.numel()


def bad() -> Evidence:
    return evidence(module=Left().eval())


def clean() -> Evidence:
    return evidence(module=Registered().eval())
