"""A model whose layers travel to the GPU in every call, written as a tape with a copy stream: as it should be done, and with one thing wrong at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from builders import GPU, US, evidence
from playing import GEMM, Played
from torch import nn

from gpuopt.doctor.evidence import Evidence

LAYERS = 16
WIDTH = 2048
TENSORS = 4
TENSOR_BYTES = WIDTH * WIDTH * 2
LAYER_BYTES = TENSORS * TENSOR_BYTES
LINK = 50e9
"""Bytes a second, as the ceilings of `builders.GPU` say."""
PAGEABLE = 9e9
COPY_NS = round(LAYER_BYTES / LINK * 1e9)
KERNEL_NS = 1_000 * US
"""Of a layer: longer than its copy, so that all of them can be hidden."""


def model() -> nn.Module:
    """Its shapes alone: 512 MiB of weights that nobody allocates."""
    with torch.device("meta"):
        layers = (nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float16) for _ in range(TENSORS))) for _ in range(LAYERS))
        return nn.ModuleList(layers).eval().requires_grad_(False)


class Loading(Played):
    """With a stream for copies. `ready`: when what was copied last may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.copies_ns = 0

    def aside(self, num_bytes: int, dur_ns: int, *, module: str, after_ns: int = 0) -> int:
        """A pinned copy on the copy stream, not before `after_ns`; returns when it ends."""
        index = self.op("aten::copy_", dur_ns=5 * US, module=module)
        computed, self.device_ns = self.device_ns, max(self.copies_ns, after_ns, self.host_ns)
        self.copy("h2d", num_bytes, dur_ns, op=index)
        self.copies[-1] = replace(self.copies[-1], stream=13)
        self.copies_ns, self.device_ns = self.device_ns, computed
        return self.copies_ns

    def layer(self, number: int, *, ready_ns: int = 0) -> int:
        """One kernel of a layer, once its weights are there; returns when it ends."""
        self.device_ns = max(self.device_ns, ready_ns)
        self.run("aten::mm", GEMM, KERNEL_NS, module=f"{number}.0")
        return self.device_ns


def overlapped(stay: tuple[int, ...] = (), copy_ns: int = COPY_NS) -> Loading:
    """As it should be: two slots, one copy a layer on a stream of its own, the first two on the way since the call before."""
    tape = Loading()
    moved = [n for n in range(LAYERS) if n not in stay]
    ready = dict.fromkeys(moved[:2], 0)
    for number in range(LAYERS):
        done = tape.layer(number, ready_ns=ready.get(number, 0))
        if number in moved:
            after = moved[(moved.index(number) + 2) % len(moved)]
            ends = tape.aside(LAYER_BYTES, copy_ns, module=f"{after}.0", after_ns=done)
            if after > number:
                ready[after] = ends
    tape.wait("cudaDeviceSynchronize")
    return tape


def serial(
    *, memory: str = "pinned", pieces: int = 1, rate: float = LINK, read_ns: int = 0, is_waiting: bool = False, wakes_ns: int = 0
) -> Loading:
    """A loader that copies a layer, computes it, and copies the next one into the same place."""
    tape = Loading()
    for number in range(LAYERS):
        tape.host_ns += read_ns and max(0, tape.device_ns - tape.host_ns) + read_ns
        for _ in range(pieces):
            index = tape.op("aten::copy_", dur_ns=0, module=f"{number}.0")
            tape.move("h2d", LAYER_BYTES // pieces, round(LAYER_BYTES / pieces / rate * 1e9), memory=memory, op=index)
            if is_waiting:
                tape.wait("cudaStreamSynchronize")
                tape.host_ns += wakes_ns
        tape.layer(number)
    tape.wait("cudaDeviceSynchronize")
    return tape


def too_small(tape: Played, **more: Any) -> Evidence:
    """On a GPU that does not hold these weights."""
    return evidence(tape, module=model(), **{"device": replace(GPU, memory_bytes=400 * 2**20), **more})
