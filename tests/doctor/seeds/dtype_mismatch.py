"""A transformer with frequencies from numpy, float64, and the same in float32."""

from __future__ import annotations

import numpy
import torch
from broken import Encoder, failing, working

from gpuopt.doctor.evidence import Evidence

CODE = "GPU702"
IDS = torch.tensor([[1, 2, 3]])


def bad() -> Evidence:
    return failing(Encoder(frequencies=torch.from_numpy(numpy.linspace(0, 1, 8))), IDS)


def clean() -> Evidence:
    return working(Encoder(frequencies=torch.from_numpy(numpy.linspace(0, 1, 8)).float()), IDS)
