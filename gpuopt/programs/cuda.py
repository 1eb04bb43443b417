"""A device's name -> what torch says of its GPU, or nothing on a CPU."""

from __future__ import annotations

import torch


def synchronize(device: str) -> None:
    """Wait until everything queued on this GPU is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def capability(device: str) -> tuple[int, int] | None:
    """Compute capability, (9, 0) on Hopper; None where there is no GPU to ask."""
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else None
