"""Question 1: "90% of the time goes into copies of the weights." A service that gives its model the weights again for every request, layer by layer.

    gpuopt profile -- python recipes/questions/reload.py

Says GPU711 (reload-per-call) with the line below, and on a GPU GPU101/GPU108 with what the copies take. `--fixed` leaves the weights where they are: a request takes what the model takes.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn


def build(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--fixed", action="store_true", help="keep the weights it has")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, depth = (4096, 24) if device == "cuda" else (512, 8)

    model = build(width, depth).to(device)
    stored = [{name: tensor.cpu().clone() for name, tensor in layer.state_dict().items()} for layer in model]

    def load() -> None:
        for layer, weights in zip(model, stored):
            layer.load_state_dict(weights)

    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(options.requests):
            if not options.fixed:
                load()
            answer = model(torch.randn(1, width, device=device))
    mean = float(answer.float().mean())
    print(f"{(time.perf_counter() - began) / options.requests * 1e3:.2f} ms a request on {device} ({mean:.3f})")


if __name__ == "__main__":
    main()
