"""Question 3: "Several GPUs do not help." nn.DataParallel around a model: in every call it copies all weights to every GPU and gathers on the first, from one Python process.

    gpuopt profile -- python recipes/questions/several_gpus.py

Says GPU712 (data-parallel-in-script) with the line. `--alone` calls the model without it, on one GPU: with several GPUs compare the two. Without one DataParallel only passes calls on.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn


def build(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--alone", action="store_true", help="one GPU, no DataParallel")
    options = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    device = "cuda" if num_gpus else "cpu"
    width, depth, batch = (4096, 16, 64) if num_gpus else (256, 4, 8)
    model = build(width, depth).to(device)
    if not options.alone:
        model = nn.DataParallel(model)
    x = torch.randn(batch, width, device=device)
    with torch.inference_mode():
        model(x)
        began = time.perf_counter()
        for _ in range(options.calls):
            model(x)
        if num_gpus:
            torch.cuda.synchronize()
    how = "one device, no DataParallel" if options.alone else f"DataParallel over {num_gpus} GPUs"
    print(f"{(time.perf_counter() - began) / options.calls * 1e3:.2f} ms a call, {how}")


if __name__ == "__main__":
    main()
