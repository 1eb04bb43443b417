"""Question 4: "My transformer works on the CPU and fails on the GPU." Two classic causes: a tensor that model.to() does not move, and a float64 constant from numpy.

    gpuopt profile -- python recipes/questions/fails_on_gpu.py            # a table left on the CPU: GPU701
    gpuopt profile -- python recipes/questions/fails_on_gpu.py --dtype    # a float64 scale: GPU702

Instead of a traceback it says which module, which tensor, and the line to write. Without a GPU the `meta` device stands in for one: it has shapes and no data, and refuses to mix devices as well. The float64 scale fails anywhere.
`--fixed` runs through.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Positions(nn.Module):
    """Adds sines of the position."""

    def __init__(self, width: int, length: int, *, is_fixed: bool) -> None:
        super().__init__()
        place = torch.arange(length).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(length, width)
        table[:, 0::2], table[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
        if is_fixed:
            self.register_buffer("table", table, persistent=False)
        else:
            self.table = table  # a plain attribute: model.to() leaves it where it is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table[: x.shape[1]]


class Scale(nn.Module):
    """Gain of the last layer, one number a channel."""

    def __init__(self, width: int, *, is_fixed: bool) -> None:
        super().__init__()
        gain = torch.from_numpy(np.linspace(0.5, 1.5, width))  # numpy's numbers are float64
        self.register_buffer("gain", gain.float() if is_fixed else gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x * self.gain, torch.eye(x.shape[-1], device=x.device))


class Transformer(nn.Module):
    def __init__(self, width: int = 64, *, has_positions_fixed: bool, has_scale_fixed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.positions = Positions(width, 128, is_fixed=has_positions_fixed)
        self.block = nn.TransformerEncoderLayer(width, 4, 128, batch_first=True)
        self.scale = Scale(width, is_fixed=has_scale_fixed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scale(self.block(self.positions(self.embed(ids))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", action="store_true", help="fail for the float64 scale, not for the table")
    parser.add_argument("--fixed", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu" if options.dtype else "meta"
    model = Transformer(has_positions_fixed=options.fixed or options.dtype, has_scale_fixed=options.fixed or not options.dtype)
    model = model.eval().to(device)
    ids = torch.zeros(2, 16, dtype=torch.long, device=device)
    with torch.inference_mode():
        for _ in range(4):
            out = model(ids)
    print(f"output {tuple(out.shape)} on {device}")


if __name__ == "__main__":
    main()
