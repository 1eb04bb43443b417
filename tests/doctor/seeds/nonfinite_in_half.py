"""fp16 logits with NaN, and logits masked with minus infinity on purpose."""

from __future__ import annotations

import torch
from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU206"


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def bad() -> Evidence:
    logits = torch.ones(2, 8, dtype=torch.float16)
    logits[0, 3:5] = float("nan")
    return evidence(module=Tagger().half().eval(), outputs={"logits": logits}, first_nonfinite="mlp", precision="fp16")


def clean() -> Evidence:
    logits = torch.ones(2, 8, dtype=torch.float16)
    logits[0, 3:5] = float("-inf")
    return evidence(module=Tagger().half().eval(), outputs={"logits": logits}, precision="fp16")
