"""A call -> the most memory it held at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(call: Callable[[], Any], device: str) -> int | None:
    """Peak bytes while `call` runs once.

    On CUDA: the most the caching allocator handed out at once, weights included; what libraries allocate by themselves (a TensorRT engine) is not seen by it.
    On a CPU: the largest resident set of this process during the call, interpreter and libraries included. None where the kernel does not let a process reset its high-water mark.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    gc.collect()
    try:
        _CLEAR.write_text("5")  # resets VmHWM to the present resident set (proc(5))
    except OSError:
        return None
    call()
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
