"""A builder of traces shaped like Kineto's, so that a GPU's timeline can be written down on a machine without one."""

from __future__ import annotations

from typing import Any

import pytest

from gpuopt.core.result import Ceiling, Ceilings
from gpuopt.core.trace import Trace
from gpuopt.profiling.events import MODULE, STEP, from_chrome


class Timeline:
    """Events in microseconds; `trace()` sends them through the same parser as a real trace."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.correlation = 100
        self.external = 1

    def _add(self, cat: str, name: str, start: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
        event = {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": start + 1_000_000.0, "dur": dur, "args": args}
        self.events.append(event)
        return event

    def step(self, start: float, dur: float) -> None:
        self._add("user_annotation", STEP, start, dur)

    def module(self, name: str, cls: str, start: float, dur: float) -> None:
        self._add("user_annotation", f"{MODULE}{name}|{cls}", start, dur)

    def op(
        self,
        name: str,
        start: float,
        dur: float,
        shapes: list[Any] | None = None,
        dtype: str = "c10::Half",
        dtypes: list[str] | None = None,
    ) -> int:
        self.external += 1
        shapes = shapes or []
        types = dtypes or [dtype] * len(shapes)
        self._add("cpu_op", name, start, dur, **{"External id": self.external, "Input Dims": shapes, "Input type": types})
        return self.external

    def kernel(
        self,
        name: str,
        launch: float,
        start: float,
        dur: float,
        *,
        stream: int = 7,
        graph: int = 0,
        external: int | None = None,
        lost_launch: bool = False,
        **launch_args: Any,
    ) -> None:
        self.correlation += 1
        call = "cudaGraphLaunch" if graph else "cudaLaunchKernel"
        if not lost_launch:
            self._add("cuda_runtime", call, launch, 2.0, correlation=self.correlation, **({"External id": external} if external else {}))
        extra = {"graph id": graph, "graph node id": 3} if graph else {}
        self._add(
            "kernel",
            name,
            start,
            dur,
            tid=stream,
            correlation=self.correlation,
            stream=stream,
            device=0,
            **({"External id": external} if external else {}),
            **extra,
            **launch_args,
        )

    def sync(self, name: str, start: float, dur: float) -> None:
        self._add("cuda_runtime", name, start, dur)

    def copy(self, kind: str, memory: str, launch: float, call: float, start: float, dur: float, size: int, *, stream: int = 7) -> None:
        self.correlation += 1
        self._add("cuda_runtime", "cudaMemcpyAsync", launch, call, correlation=self.correlation)
        name = {
            "h2d": f"Memcpy HtoD ({memory} -> Device)",
            "d2h": f"Memcpy DtoH (Device -> {memory})",
            "d2d": "Memcpy DtoD (Device -> Device)",
        }[kind]
        self._add("gpu_memcpy", name, start, dur, tid=stream, correlation=self.correlation, stream=stream, bytes=size)

    def trace(self, device: str = "cuda:0") -> Trace:
        return from_chrome({"schemaVersion": 1, "traceEvents": [*self.events, {"ph": "M", "name": "process_name"}]}, device=device)


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


@pytest.fixture(scope="session")
def new_timeline() -> type[Timeline]:
    """For tests that need more than one."""
    return Timeline


@pytest.fixture(scope="session")
def h200() -> Ceilings:
    """The data sheet's and our own measured ceilings of one H200."""
    rows = []
    for quantity, spec, measured in (
        ("fp16", 989e12, 764e12),
        ("bf16", 989e12, 792e12),
        ("fp32", 67e12, 51e12),
        ("int8", 1979e12, None),
        ("fp8", 1979e12, 1502e12),
    ):
        rows.append(Ceiling(quantity=quantity, value=spec, unit="FLOP/s", kind="spec", source="data sheet"))
        if measured:
            rows.append(Ceiling(quantity=quantity, value=measured, unit="FLOP/s", kind="measured", source="GEMM"))
    rows.append(Ceiling(quantity="memory", value=4800e9, unit="byte/s", kind="spec", source="data sheet"))
    rows.append(Ceiling(quantity="memory", value=4261e9, unit="byte/s", kind="measured", source="copy"))
    rows.append(Ceiling(quantity="h2d", value=55.5e9, unit="byte/s", kind="measured", source="pinned copy"))
    return Ceilings(rows=tuple(rows))
