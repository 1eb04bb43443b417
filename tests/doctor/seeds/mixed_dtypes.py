"""A head put on after .half(), and one put on before; norms in fp32 are meant so."""

from __future__ import annotations

import torch
from builders import evidence
from torch import nn

from gpuopt.doctor.evidence import Evidence

CODE = "GPU204"


def body() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 64)).half()
    model[1].float()
    return model


def bad() -> Evidence:
    return evidence(module=nn.Sequential(*body(), nn.Linear(64, 8)).eval())


def clean() -> Evidence:
    return evidence(module=nn.Sequential(*body(), nn.Linear(64, 8).to(torch.float16)).eval())
