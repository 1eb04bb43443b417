"""nn.TransformerEncoder with and without what its fast path asks for."""

from __future__ import annotations

import torch
from builders import evidence
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.doctor.evidence import Evidence

CODE = "GPU307"


def made(*, batch_first: bool) -> Evidence:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).half().eval()
    return evidence(module=model, inputs=Inputs(args=(torch.ones(2, 8, 32, dtype=torch.float16),)))


def bad() -> Evidence:
    return made(batch_first=True)


def clean() -> Evidence:
    return made(batch_first=False)
