"""A GPU on paper whose host takes time too: kernels are queued one by one, copies and events as well, and clocks are read as torch.cuda's are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gpuopt.streaming.engines.simulated import SimulatedEngine

KERNELS = 5
"""A unit's."""
RECORD_MS = 0.002
"""Of the host, an event."""
COPY_MS = 0.01
"""Of the host, a copy that is queued."""


class Gpu(SimulatedEngine):
    """Stands in for a CudaEngine, and for torch.cuda where that is asked for the time."""

    simulated = False

    def __init__(self, link_bytes_per_s: float, free_bytes: int = 1 << 40, weight_bytes: int = 0) -> None:
        super().__init__(link_bytes_per_s)
        self.free_bytes, self.held_bytes = free_bytes, weight_bytes
        self.host_ms = 0.0
        self.copies = 0

    # -- the engine -------------------------------------------------------------------------------------------------------------------------------

    def kernel(self, host_ms: float, device_ms: float) -> None:
        """Queued, and computed when all before it is."""
        self.host_ms += host_ms
        self._now[0] = max(self._now[0], self.host_ms) + device_ms

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, home: str = "pinned") -> None:
        self.copies += 1
        self.host_ms += COPY_MS
        self._now[1] = max(self._now[1], self.host_ms)
        super().copy(target, source, home=home)

    def drain(self) -> None:
        super().drain()
        self.host_ms = max(self.host_ms, *self._now)

    def segment(self, unit: str, slot: Any = None) -> Any:
        return _Nothing()

    # -- torch.cuda, and the host's clock ---------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds of the host."""
        return self.host_ms / 1e3

    def Event(self, enable_timing: bool = False) -> Any:
        event = SimpleNamespace(ms=0.0)

        def record(stream: Any) -> None:
            self.host_ms += RECORD_MS
            self._now[0] = max(self._now[0], self.host_ms)
            event.ms = self._now[0]

        event.record, event.elapsed_time = record, lambda other: other.ms - event.ms
        return event

    def _sleep(self, cycles: int) -> None:
        self.kernel(RECORD_MS, cycles / 2e6)

    def current_stream(self, device: Any) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free_bytes, 1 << 41

    def memory_reserved(self, device: Any) -> int:
        return 0

    def memory_allocated(self, device: Any) -> int:
        return 1_000

    def max_memory_reserved(self, device: Any) -> int:
        return self.memory_reserved(device)

    def max_memory_allocated(self, device: Any) -> int:
        return 9_000

    def reset_peak_memory_stats(self, device: Any) -> None:
        return None


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class Block(nn.Module):
    """A product, and the kernels it is said to take."""

    def __init__(self, width: int, host_ms: float, device_ms: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.takes = (host_ms / KERNELS, device_ms / KERNELS)
        self.gpu: Gpu | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gpu is not None:
            for _ in range(KERNELS):
                self.gpu.kernel(*self.takes)
        return x + self.up(x)


class Stack(nn.Module):
    """Blocks one after the other, and something after them."""

    def __init__(self, depth: int, host_ms: float, device_ms: float, outside: tuple[float, float], width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, host_ms, device_ms) for _ in range(depth))
        self.outside = outside
        self.gpu: Gpu | None = None

    def on(self, gpu: Gpu | None) -> None:
        """From now on its kernels are this device's."""
        self.gpu = gpu
        for layer in self.layers:
            layer.gpu = gpu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.gpu is not None:
            self.gpu.kernel(*self.outside)
        return x
