"""What the child of `gpuopt stream` answers, step by step. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from gpuopt.core.result import Device, Environment
from gpuopt.core.streamed import StreamCheck, StreamSpan
from gpuopt.core.streaming import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """After `load`."""

    environment: Environment
    device: Device | None
    """None for a device on paper."""
    device_text: str
    name: str
    dtype: str | None
    num_parameters: int | None
    weight_bytes: int
    """As the anatomy counts: each storage once."""
    inputs: tuple[str, ...]
    signature: tuple[str, ...]
    input_source: str
    dims: dict[str, int]
    workload: str
    load_s: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """After `plan`."""

    plan: Plan
    spans: tuple[StreamSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """After `bind`, `resident` or `rival`: calls may be timed."""

    setup_s: float
    plan: Plan | None = None
    """As it came out: a unit whose memory could not be locked is pageable."""
    pinned_bytes: int = 0
    clock: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plained:
    """After `plain`: blocks may be of plain eager too."""

    apart: bool
    """Its weights lie in memory of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A block of calls. With generation, of its forwards after the prompt's."""

    samples_ns: tuple[int, ...]
    prompt_ns: tuple[int, ...] = ()
    stall_ns: tuple[int, ...] = ()
    """Of each sample, where the device says so."""
    demand_fetches: int = 0
    """So far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meters:
    """Memory, after the timed calls, and what they had to be said of."""

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    host_rss_bytes: int | None = None
    notes: tuple[str, ...] = ()
    """Of what is bound, those known at binding among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a call gave."""

    digest: str
    """sha256 over all tensors of the outputs: names, dtypes, shapes and bytes."""
    tokens: tuple[int, ...] = ()
    """Of the first sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """After `verify`."""

    checks: tuple[StreamCheck, ...]
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFolder:
    """After `pack`."""

    folder: str
    num_units: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
