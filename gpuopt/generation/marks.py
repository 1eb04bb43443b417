"""Moments of a call -> the times between them, without waiting for the device while it runs."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Called at each moment; `times_ns` afterwards."""

    def __call__(self) -> None:
        """Now, in the order of the device's work."""

    def times_ns(self) -> list[int]:
        """Between each two calls in a row."""


def for_device(device: str) -> Marks:
    """CUDA events on a GPU, the host's clock on a CPU."""
    return CudaMarks(device) if device.startswith("cuda") else HostMarks()


class HostMarks:
    """For work that has ended when its call returns."""

    def __init__(self) -> None:
        self._at: list[int] = []

    def __call__(self) -> None:
        self._at.append(time.perf_counter_ns())

    def times_ns(self) -> list[int]:
        return [b - a for a, b in zip(self._at, self._at[1:], strict=False)]


class CudaMarks:
    """An event each, all read at the end."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._events: list[Any] = []

    def __call__(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def times_ns(self) -> list[int]:
        torch.cuda.synchronize(self._device)
        return [round(a.elapsed_time(b) * 1e6) for a, b in zip(self._events, self._events[1:], strict=False)]
