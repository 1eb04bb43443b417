"""`capture.Recorder` without a GPU: what is recorded is a tape of operations at fixed addresses, as a CUDA graph's kernels are. Shared by the tests of whatever records."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: the ops of one call, run again on the same tensors, whose results are written where they were the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.replays = self.resets = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and again.data_ptr() != out.data_ptr():
                out.copy_(again)

    def reset(self) -> None:
        self.resets += 1


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.name)


class FakeRecorder:
    def __init__(self) -> None:
        self.stream, self.runs, self.synchronized = Stream("first"), 0, 0
        self.tapes: list[Tape] = []

    def run(self, call: Callable[[], Any]) -> None:
        self.runs += 1
        call()

    def record(self, call: Callable[[], Any], watch: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, Any]:
        tape = Tape()
        with tape, watch():
            outputs = call()
        self.tapes.append(tape)
        return tape, outputs

    def queue(self) -> Any:
        return self.stream

    def synchronize(self) -> None:
        self.synchronized += 1

    @property
    def replays(self) -> int:
        return sum(tape.replays for tape in self.tapes)
