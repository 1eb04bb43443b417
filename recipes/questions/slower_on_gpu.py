"""Question 2: "My model is slower on the GPU than on the CPU." A recurrent step written out in Python: hundreds of tiny kernels, one sample, a value read back in every step.

    gpuopt profile -- python recipes/questions/slower_on_gpu.py --device cuda

On a GPU it says that the device waits for the host (GPU404 launch-bound, GPU403 many small kernels, GPU713 for the `.item()`); `gpuopt bench --device cpu,cuda` shows from which batch on the GPU wins.
Without --device both are timed, where there are both. `--batch 4096` is work enough for a GPU.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn


class Step(nn.Module):
    """One step: twelve small ops on vectors of 64."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, 4 * width)
        self.out = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        hidden = cell = torch.zeros_like(x)
        total = 0.0
        for _ in range(steps):
            i, f, g, o = self.mix(torch.cat((x, hidden), dim=-1)).chunk(4, dim=-1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            if x.shape[0] == 1:
                total += self.out(hidden).item()  # a number for the log: the host waits for the GPU
        return hidden + total


def seconds_a_call(device: str, batch: int, calls: int) -> float:
    model = Step().eval().to(device)
    x = torch.randn(batch, 64, device=device)
    with torch.inference_mode():
        for _ in range(2):
            model(x, 16)
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            model(x, 16)
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=30)
    options = parser.parse_args()
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    times = {device: seconds_a_call(device, options.batch, options.calls) for device in devices}
    for device, seconds in times.items():
        print(f"{device}: {seconds * 1e3:.3f} ms a call at batch {options.batch}")
    if len(times) == 2:
        print(f"the GPU takes {times['cuda'] / times['cpu']:.2f} times as long as the CPU")


if __name__ == "__main__":
    main()
