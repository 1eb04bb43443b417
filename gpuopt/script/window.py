"""The steady state of a program -> a torch.profiler trace of a few calls of its first model, in a file. Marks where calls begin and end; whoever reads the trace makes steps of them."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpuopt.script.recorder import Recording

CALL = "gpuopt::call"
RETURN = "gpuopt::return"
FIRST, LAST = 3, 8
"""Calls that are traced, counted from 1. Before them programs warm up; the first of them pays for setting up CUPTI and is marked by nothing."""


class Window:
    """Listens to a recording's calls. The model that reaches call FIRST before any other is traced, in its thread."""

    def __init__(self, recording: Recording, path: Path) -> None:
        self.path = path
        self.is_written = False
        self._recording = recording
        self._model: int | None = None
        self._thread = 0
        self._profiler: profile | None = None
        recording.on_call = self._on_call

    def _on_call(self, model: int, num_calls: int, is_before: bool) -> None:
        if self._model is None:
            if is_before and num_calls == FIRST - 1:
                self._start(model)
            return
        if model != self._model or self._profiler is None or threading.get_ident() != self._thread:
            return
        if is_before and num_calls >= LAST:
            _mark(CALL)  # where the last traced call's iteration ends
            self.close()
        elif num_calls > FIRST - 1 and not (not is_before and num_calls == FIRST):
            _mark(CALL if is_before else RETURN)

    def _start(self, model: int) -> None:
        self._model, self._thread = model, threading.get_ident()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # a program that will fork must not be the one whose CUDA we started
            activities.append(ProfilerActivity.CUDA)
        began = time.perf_counter()
        profiler = profile(activities=activities, record_shapes=True)
        try:
            profiler.start()
        except RuntimeError as error:  # another profiler is on: the program's own
            self._recording.notes.append(f"no trace: {str(error).splitlines()[0][:200]}")
            return
        self._profiler = profiler
        self._recording.is_profiling = True
        self._recording.tracing_s += time.perf_counter() - began

    def close(self) -> None:
        """Stop and write. Harmless twice, and where nothing was traced."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        began = time.perf_counter()
        profiler.stop()
        self._recording.is_profiling = False
        part = self.path.with_suffix(".part")
        with contextlib.suppress(OSError):
            profiler.export_chrome_trace(str(part))
            part.replace(self.path)
            self.is_written = True
        self._recording.tracing_s += time.perf_counter() - began


def _mark(name: str) -> None:
    with record_function(name):
        pass
