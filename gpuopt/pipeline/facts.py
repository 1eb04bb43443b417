"""What a session answers, step by step, as values that cross a process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gpuopt.core.result import (
    Accuracy,
    Bounds,
    Count,
    Device,
    Environment,
    Finding,
    ModuleRow,
    PrecisionAudit,
    RooflinePoint,
    Samples,
    Useful,
    Waterfall,
)

ProgressCall = Callable[[float | None, str], None]
"""Told by a step while it works: (share done or None, what it does)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """After `load`."""

    name: str
    form: str
    sha256: str | None
    dtype: str | None
    num_parameters: int | None
    inputs: tuple[str, ...]
    """Bound specs as text."""
    signature: tuple[str, ...]
    """The same with their free dimensions."""
    input_source: str
    dims: dict[str, int]
    precision: str
    """The precision asked for, or the model's own."""
    load_s: float
    device: str = ""
    """Its id: `cuda` is `cuda:0` by now."""
    notes: tuple[str, ...] = ()
    bundle_backend: str | None = None
    """A bundle brings its own backend."""
    bundle_preset: str | None = None
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """After `build`."""

    compile_s: float
    cold_start_s: float
    audit: PrecisionAudit | None
    count: Count | None
    executable: bool = True
    """False for an engine that was built for another machine."""
    host_peak_bytes: int | None = None
    """Most host memory up to the first call: the process and those it started. None where it holds a caller's own work too."""
    transforms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """After `verify`."""

    accuracy: Accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """After `measure` or `block`."""

    samples: Samples
    peak_bytes: int | None = None
    energy_j_per_sample: float | None = None
    mean_power_w: float | None = None
    throttled_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchored:
    """After `anchor`: one block of products."""

    samples: Samples
    flops: float
    """A call."""
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """After `profile`."""

    waterfall: Waterfall
    roofline: tuple[RooflinePoint, ...]
    modules: tuple[ModuleRow, ...]
    coverage: float | None
    """Share of device time in kernels with a known count."""
    attributed: float | None
    """Share of device time that could be given to a module."""
    bounds: Bounds | None = None
    useful: Useful | None = None
    unfilled: float | None = None
    """Share of the multiprocessors' time without a block to run."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosed:
    """After `diagnose`."""

    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """After `save`: role -> file name, and what the manifest needs."""

    files: dict[str, str]
    loaded: Loaded
    positional: int
    dim_ranges: dict[str, tuple[int, int]]
    fingerprint: dict[str, str]
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixCell:
    """One backend for one model on one device."""

    backend: str
    summary: str
    route: str
    """`direct`, `via ONNX`, or "" when it cannot be."""
    reason: str
    """Empty when it can run; else why not."""
    presets: tuple[str, ...]
    precisions: dict[str, str]
    """precision -> "" or the reason why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """After `matrix`."""

    environment: Environment
    device: Device
    cells: tuple[MatrixCell, ...]
    form: str | None = None
    """The model's form; None when no model was named."""
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """After `survey`: the device with its ceilings."""

    environment: Environment
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """After `export`: file names in the order they are to be published, the one asked for last."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception that crossed the process."""

    type: str
    message: str
    fix: str = ""
    status: str = "bug"
    traceback: str = ""
