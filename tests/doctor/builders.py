"""Evidence for tests: a small H200 with round ceilings, and traces written by hand as a few lines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpuopt.core.result import Ceiling, Ceilings, Device
from gpuopt.core.trace import Copy, CpuOp, Fetch, Kernel, RuntimeCall, Step, Trace
from gpuopt.doctor.evidence import Evidence

US = 1_000
MS = 1_000_000

_FLOPS = {"fp64": 60e12, "fp32": 50e12, "tf32": 400e12, "fp16": 750e12, "bf16": 790e12, "fp8": 1500e12, "int8": 970e12}
_BYTES = {"memory": 4e12, "copy": 4e12, "h2d": 50e9, "d2h": 50e9, "h2d_pageable": 9e9, "d2h_pageable": 9e9}
GPU = Device(
    id="cuda:0",
    name="NVIDIA H200",
    kind="cuda",
    capability="9.0",
    num_sms=132,
    memory_bytes=140 * 2**30,
    cache_bytes=50 * 2**20,
    power_limit_w=700.0,
    ceilings=Ceilings(
        rows=tuple(
            Ceiling(quantity=q, value=v * scale, unit=unit, kind=kind, source="made up")
            for kind, scale in (("measured", 1.0), ("spec", 1.3))
            for table, unit in ((_FLOPS, "FLOP/s"), (_BYTES, "byte/s"))
            for q, v in table.items()
        )
    ),
)
CPU = Device(id="cpu", name="CPU", kind="cpu", num_cores=2, memory_bytes=24 * 2**30)


class Tape:
    """Writes a trace: one step, one thread, one stream; every launch follows the one before unless told otherwise."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.copies: list[Copy] = []
        self.runtime: list[RuntimeCall] = []
        self.ops: list[CpuOp] = []
        self.fetches: list[Fetch] = []
        self.host_ns = 0
        self.device_ns = 0
        self._correlation = 0

    def op(self, name: str, *, dur_ns: int = 10 * US, module: str | None = None, **more: Any) -> int:
        """An op on the host; what is launched next belongs to it."""
        index = len(self.ops)
        self.ops.append(
            CpuOp(
                index=index, name=name, start_ns=self.host_ns, dur_ns=dur_ns, self_ns=dur_ns, num_children=0, thread="1/1", parent=None,
                **{"module": module, "step": 0, **more},
            )
        )  # fmt: skip
        self.host_ns += dur_ns
        return index

    def kernel(self, name: str, dur_ns: int, *, gap_ns: int = 0, op: int | None = None, **more: Any) -> None:
        """A kernel `gap_ns` after the one before."""
        self._correlation += 1
        self.runtime.append(
            RuntimeCall(
                name="cudaLaunchKernel", kind="launch", start_ns=self.host_ns, dur_ns=5 * US, thread="1/1", correlation=self._correlation,
                op=op, step=0,
            )
        )  # fmt: skip
        self.device_ns += gap_ns
        self.kernels.append(
            Kernel(
                name=name, start_ns=self.device_ns, dur_ns=dur_ns, stream=7, correlation=self._correlation,
                **{"op": op if op is not None else (len(self.ops) - 1 if self.ops else None), "step": 0, **more},
            )
        )  # fmt: skip
        self.device_ns += dur_ns

    def copy(self, kind: str, num_bytes: int, dur_ns: int, *, memory: str = "pinned", op: int | None = None) -> None:
        """A transfer; the host waits for it where it is pageable."""
        self._correlation += 1
        self.runtime.append(
            RuntimeCall(
                name="cudaMemcpyAsync", kind="copy", start_ns=self.host_ns, dur_ns=dur_ns if memory == "pageable" else 5 * US, thread="1/1",
                correlation=self._correlation, op=op, step=0,
            )
        )  # fmt: skip
        self.copies.append(
            Copy(
                kind=kind, memory=memory, bytes=num_bytes, start_ns=self.device_ns, dur_ns=dur_ns, stream=7,
                correlation=self._correlation, op=op, step=0,
            )
        )  # fmt: skip
        self.device_ns += dur_ns
        self.host_ns += dur_ns if memory == "pageable" else 5 * US

    def call(self, name: str, kind: str, dur_ns: int, *, op: int | None = None) -> None:
        """A runtime call without work on the device: `cudaStreamSynchronize`, `cudaMalloc`."""
        self.runtime.append(
            RuntimeCall(name=name, kind=kind, start_ns=self.host_ns, dur_ns=dur_ns, thread="1/1", correlation=None, op=op, step=0)
        )
        self.host_ns += dur_ns

    def fetch(self, iterator: str, dur_ns: int) -> None:
        """A batch asked of a DataLoader."""
        self.fetches.append(Fetch(name=f"enumerate(DataLoader)#{iterator}.__next__", start_ns=self.host_ns, dur_ns=dur_ns, thread="1/1"))
        self.host_ns += dur_ns

    def trace(self, device: str = "cuda:0") -> Trace:
        """What was written, as one step."""
        end = max(self.host_ns, self.device_ns)
        return Trace(
            device=device, steps=(Step(start_ns=0, dur_ns=end),), kernels=tuple(self.kernels), copies=tuple(self.copies),
            runtime=tuple(self.runtime), ops=tuple(self.ops), fetches=tuple(self.fetches),
        )  # fmt: skip


def evidence(tape: Tape | None = None, **more: Any) -> Evidence:
    """On the GPU above; with a tape, its trace and its length as wall time."""
    base = Evidence(
        device=GPU, model="test", flags={"matmul_tf32": True, "cudnn_tf32": True, "cudnn_benchmark": True, "grad_enabled": False}
    )
    if tape is not None:
        trace = tape.trace()
        base = replace(base, trace=trace, wall_ms=trace.steps[0].dur_ns / 1e6)
    return replace(base, **more)
