"""What rules look at: a live model, what its trace and its counts say, the machine. Whatever was not gathered is None, and rules that need it stay silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count, Device, Environment, OpRecord, PrecisionAudit, Waterfall
from gpuopt.core.script import CallSite as CallSite
from gpuopt.core.script import Load as Load
from gpuopt.core.script import ModelCalls as ModelCalls
from gpuopt.core.script import Script as Script
from gpuopt.core.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What torch.compile told while it built: counters and logs, not opinions."""

    graph_breaks: tuple[tuple[str, str, int], ...] = ()
    """(reason, `file.py:12`, how often)."""
    recompiles: tuple[tuple[str, str], ...] = ()
    """(function with its line, guard that failed)."""
    cudagraph_skips: tuple[str, ...] = ()
    """Reasons."""
    num_graphs: int = 0
    preset: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything known about one candidate on one machine. Times in `records` and `trace` are those of a traced call; `wall_ms` is untraced."""

    device: Device | None = None
    """With its ceilings."""
    environment: Environment | None = None
    model: str = ""
    """As named by the user."""
    module: Any | None = None
    """The live nn.Module as it was loaded, before any conversion; on whatever device its user left it."""
    inputs: Inputs | None = None
    """One call's inputs as the user gave them: where they lie and what they are is evidence."""
    backend: str = "eager"
    preset: str | None = None
    precision: str | None = None
    """What the candidate was asked to run in."""
    transforms: tuple[str, ...] = ()
    rewrites: Mapping[str, str] = field(default_factory=dict)
    """gpuopt's rewrite of a module's code -> "" where it would change something in this one, else why not; empty where nobody asked."""
    input_mode: str = "device"
    batch: int = 1
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Global switches at the call: `matmul_tf32`, `cudnn_tf32`, `cudnn_benchmark`, `grad_enabled`, `autocast`."""
    wall_ms: float | None = None
    """A typical call, timed without a profiler."""
    trace: Trace | None = None
    records: tuple[OpRecord, ...] = ()
    """Attributed times, FLOPs and bytes of one call."""
    count: Count | None = None
    waterfall: Waterfall | None = None
    audit: PrecisionAudit | None = None
    compiled: Compiled | None = None
    peak_bytes: int | None = None
    throttled_ms: Mapping[str, float] = field(default_factory=dict)
    measured_ms: float | None = None
    """Over how long `throttled_ms` was counted."""
    memory_stats: Mapping[str, float] = field(default_factory=dict)
    """torch.cuda.memory_stats() after the calls, the keys that matter; empty on a CPU."""
    batch_curve: Mapping[int, float] = field(default_factory=dict)
    """Batch -> milliseconds a call, where several were measured."""
    outputs: Any | None = None
    """Of one call, for what they show (NaN, requires_grad)."""
    first_nonfinite: str | None = None
    """Module whose output first held NaN or Inf in this precision and none in fp32; None where none did or nobody looked."""
    failure: BaseException | None = None
    """What forward raised, with its traceback."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed distributions that matter, name -> version."""
    script: Script | None = None

    def can_rewrite(self, name: str) -> bool:
        """Whether this rewrite applies and has not been made."""
        return self.rewrites.get(name) == "" and name not in {text.partition(":")[0] for text in self.transforms}

    @property
    def on_gpu(self) -> bool:
        """Whether the candidate ran on a CUDA device."""
        return self.device is not None and self.device.kind == "cuda"
