"""One model on several devices over batch: its curves, where they cross and why, and the batch that memory allows, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One batch of a curve."""

    batch: int
    latency_ms: float
    """Median of a call."""
    low_ms: float | None
    high_ms: float | None
    """95% interval of the median; None under six samples."""
    samples_per_s: float
    pct_of_measured: float | None = None
    """Of its own device's measured ceiling."""
    peak_bytes: int | None = None
    waits: float | None = None
    """Share of the wall time, 0..1, in which the device has nothing to do: launches, synchronisation, Python. From a trace of its own; None without one."""
    launches: float | None = None
    """The part of `waits` between one launch and the next."""
    copies: float | None = None
    """Share of the wall time in copies between host and device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak memory over batch, fitted as weights plus so much a sample; and the batch at which a device is full by that."""

    fixed_bytes: float
    bytes_per_sample: float
    batches: tuple[int, ...]
    """Those it was fitted to."""
    misfit: float
    """Largest miss of a fitted batch, relative to what was measured there."""
    limit_bytes: int | None
    """What of the device's memory a model may take; None where the device does not say."""
    largest_batch: int | None
    """By the fit; None where memory does not grow with the batch, or no limit is known."""
    probed_batch: int | None = None
    """A batch near it that was tried."""
    probed_bytes: int | None = None
    """What it took; None where it was tried and did not run."""
    note: str = ""
    """Why it was not checked, or what the check found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One candidate over batch on one device."""

    device: str
    """Id, as in Report.devices."""
    what: str
    """The candidate in words, as a Crossover names it: `eager fp32`."""
    model: str
    backend: str
    preset: str | None = None
    precision: str | None = None
    transforms: tuple[str, ...] = ()
    input_mode: str = "device"
    dims: dict[str, int] = field(default_factory=dict)
    """Every free dimension but N."""
    points: tuple[Point, ...] = ()
    """Smallest batch first; those that were timed."""
    stopped: str = ""
    """Why there is no larger batch; empty where the batches were named and all were measured."""
    memory: Memory | None = None
    """None with fewer than two batches whose peak memory is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versus:
    """Two devices at one batch, from interleaved pairs of blocks."""

    batch: int
    ratio: float
    """Time on the first device over time on the second: above 1 the second is faster."""
    low: float
    high: float
    """95% interval of `ratio`."""
    verdict: str
    """Of the second device: `faster`, `slower`, `same` or `inconclusive`."""
    first_ms: float = 0.0
    second_ms: float = 0.0
    """Medians of a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What makes the losing device lose: only where taking it away would make it win."""

    device: str
    batch: int
    kind: str
    """`launches`, `waits` (the host in general) or `copies`."""
    share: float
    """Of its wall time, 0..1."""
    without_ms: float
    """A call without it."""
    other_ms: float
    """A call on the other device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """Where the second of two devices begins to win, or never does."""

    first: str
    second: str
    """Device ids."""
    what: str
    """What is compared on both: `eager fp32`, or `fastest of each`."""
    verdict: str
    """`crosses` (once), `first` or `second` (wins at every batch measured), `several` crossings, `same`, or `undecided`."""
    points: tuple[Versus, ...]
    winner: str | None = None
    """The device that wins from `from_batch` on, or everywhere."""
    from_batch: int | None = None
    between: tuple[int, int] | None = None
    """The last batch measured that the one wins, and the first that the other does."""
    interpolated: bool = False
    """`from_batch` lies between the two and was not itself measured."""
    cause: Cause | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All curves of a report about several devices."""

    curves: tuple[Curve, ...]
    crossovers: tuple[Crossover, ...]
    notes: tuple[str, ...] = ()
