"""A model called without its second input, and with it."""

from __future__ import annotations

import torch
from broken import failing, working
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU706"


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * mask


def bad() -> Evidence:
    return failing(Masked(), torch.ones(2, 4))


def clean() -> Evidence:
    return working(Masked(), torch.ones(2, 4), torch.ones(2, 1))
