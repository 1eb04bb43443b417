"""A function of buffers -> the same, compiled and recorded as a way wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gpuopt.core.errors import Unsupported
from gpuopt.generation import Way

if TYPE_CHECKING:
    from gpuopt.programs.one_row import OneRow

Launch = Callable[[], None]

_WARMUP = 3
"""Runs before recording: libraries pick algorithms and allocate workspaces in the first ones, which a recording cannot hold."""
_BUCKETS = 64
"""Graphs of one function that Dynamo may keep: one a bucket, and no bucket takes another's away."""


class Launcher:
    """Makes launches of one way on one device. `graphs`: CUDA graphs recorded so far."""

    def __init__(self, way: Way, device: str) -> None:
        self.way, self.device, self.graphs = way, device, 0
        self.is_recording = way.records and device.startswith("cuda")
        self._pool: Any = None
        self._recorded: list[Any] = []
        self.notes: list[str] = []
        if way.records and not way.compiles and not self.is_recording:
            raise Unsupported(f"CUDA graphs run on an NVIDIA GPU, not on {device}", fix="--backend eager:static or inductor")
        if way.own_rows and not device.startswith("cuda"):
            raise Unsupported(f"the matrix-vector kernel runs on an NVIDIA GPU, not on {device}", fix="--backend inductor")

    def ready(self, run: Launch, *, before: Launch, tuned: bool) -> Launch:
        """`before` puts the buffers into a state that `run` may start from, and is no part of it. `tuned`: with the way's own settings of Inductor.

        Raises whatever the compiler raises; Unsupported where a step cannot be recorded.
        """
        launch = self._compiled(run, tuned=tuned) if self.way.compiles else run
        if not self.is_recording:
            return launch
        return self._record(launch, before)

    def close(self) -> None:
        """Free the graphs and their memory."""
        for graph in self._recorded:
            graph.reset()
        self._recorded.clear()

    def _compiled(self, run: Launch, *, tuned: bool) -> Launch:
        rows = None
        if tuned and self.way.own_rows:
            # With Inductor's settings and its code generator, which take seconds.
            from gpuopt.programs.dependent import wait_first
            from gpuopt.programs.one_row import OneRow

            wait_first()
            rows = OneRow()
        if self.way.mode:
            made = torch.compile(run, fullgraph=True, dynamic=False, mode=self.way.mode)
        else:
            options = {**(self.way.options if tuned else {}), **(rows.settings if rows else {})}
            made = torch.compile(run, fullgraph=True, dynamic=False, options=options)
        is_traced = False

        def launch() -> None:
            nonlocal is_traced
            if is_traced:
                made()
                return
            with torch._dynamo.config.patch(recompile_limit=_BUCKETS, accumulated_recompile_limit=4 * _BUCKETS):
                made()
            is_traced = True
            if rows is not None:
                self._tell(rows)

        return launch

    def _tell(self, rows: OneRow) -> None:
        """Raises Unsupported where there was nothing for the kernel: what runs is another way then, which has a name of its own."""
        if not rows.num_changed:
            raise Unsupported(
                "no product of a step has one row of fp16 or bf16 and no bias, which is what the matrix-vector kernel takes",
                fix="--backend inductor:tuned",
            )
        self.notes.append(f"{rows.num_changed} products a step run in {rows.num_launches} launches of gpuopt's matrix-vector kernel")

    def _record(self, launch: Launch, before: Launch) -> Launch:
        device = torch.device(self.device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device), torch.no_grad():
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    before()
                    launch()
                before()
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            try:
                # One pool for all: they run one after the other, and what outlives a run lies in buffers of the loop.
                with torch.cuda.graph(graph, stream=stream, pool=self._pool):
                    launch()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if "captur" not in str(error):
                    raise
                reason = next((line.strip() for line in str(error).splitlines() if "captur" in line), "the capture failed")
                raise Unsupported(
                    f"a step cannot be recorded: {reason[:200]}", fix="--backend inductor:reduce-overhead, or eager:static"
                ) from error
        self._recorded.append(graph)
        self.graphs += 1
        replay: Launch = graph.replay
        return replay
