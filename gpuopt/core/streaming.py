"""Values of weight streaming: what is asked for, the units a model falls into, the plan, what was measured. They may be saved, compared and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALIGNMENT = 512
"""Bytes. Every tensor of a slab starts at a multiple: kernels are chosen by alignment, so other addresses could give other bits."""

EMBEDDING = "an embedding, outside every block"
"""The reason of an embedding that `embed="cpu"` could move to the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What a user asks for."""

    budget_bytes: int | None = None
    """Of the device's memory, everything counted: context, workspaces, caches, activations, slots, residents."""
    budget_share: float | None = None
    """Of the weights' bytes that may be on the device (residents and slots); caches, activations and context come on top. One of the two is set."""
    pin_limit_bytes: int | None = None
    """Of host memory that may be locked; None: 80% of what is available."""
    disk: str | None = None
    """A packed folder that units beyond the host's memory are read from."""
    num_slots: int | None = None
    """2 or 3; 1 is allowed and overlaps nothing; None: the better of 2 and 3."""
    granularity: str = "block"
    """`block`, or `sub`: attention and MLP apart, which halves a slot."""
    embed: str = "device"
    """`cpu` gathers an embedding's rows on the host."""
    graphs: bool = False
    compile: bool = False
    once: bool = False
    """A single forward: the first units are resident, and nothing wraps round."""
    elastic: bool = False
    """After running out of memory: once more with fewer residents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor within a unit's slab."""

    name: str
    """As the model's `named_parameters()` says."""
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is copied at once: the weights of one block of the model."""

    name: str
    """The module's name: `model.layers.3`; with `sub`, `model.layers.3.mlp`."""
    ring: str
    """Units of one ring follow each other in a forward and share slots: `model.layers`; an encoder and a decoder are two rings."""
    order: int
    """Within its ring."""
    num_bytes: int
    """Of its slab: the tensors and what alignment leaves between them."""
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """A model as streaming sees it."""

    units: tuple[Unit, ...]
    """In the order of a forward."""
    fixed: Mapping[str, int]
    """Always resident: parameter or buffer -> bytes. Storage counts once, under its first name."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why a tensor of 1 MiB or more is always resident: `tied to lm_head.weight`, `a buffer`, `outside every block`."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Name -> the first name of the same storage."""
    host: Mapping[str, int] = field(default_factory=dict)
    """With `embed="cpu"`: embeddings whose rows are gathered on the host -> bytes. They are never on the device."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(p.num_bytes for unit in self.units for p in unit.places) + sum(self.fixed.values()) + sum(self.host.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the machine was measured to do with this model."""

    device: str
    link_bytes_per_s: float
    """Host to device, locked memory, one slab a copy, while products run on the device."""
    pageable_bytes_per_s: float
    disk_bytes_per_s: float | None = None
    compute_ms: Mapping[str, float] = field(default_factory=dict)
    """Unit -> its forward on the device, with its weights there and all of it launched already; `""` is everything outside units."""
    host_ms: Mapping[str, float] = field(default_factory=dict)
    """Unit -> what the host takes to launch its forward; `""` is all else that it does in a forward and between two. A forward is never faster than their sum, and
    decoding one sequence is often just that. Empty: the host takes no time."""
    host_waits: bool = False
    """The host waits for each forward's end before it goes on, as generation does to look at the token: what it does between two forwards, nothing hides then."""
    resident_ms: float | None = None
    """A forward with everything resident, as it was measured; C is what the figures above make of it."""
    workload: str = ""
    """What was run: `decode N=1 S=1 past=512`."""
    activation_bytes: int = 0
    cache_bytes: int = 0
    """Keys and values at the largest number of tokens asked for."""
    context_bytes: int = 0
    """Of the device's memory before any tensor, and of workspaces."""
    pin_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    """What products of the model's precision reach on this device; None: unknown, and no batch is named that would balance link and compute."""
    source: str = ""
    """Measured or made up, with what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Where the device's bytes go."""

    fixed: int = 0
    residents: int = 0
    slots: int = 0
    activations: int = 0
    cache: int = 0
    context: int = 0
    reserve: int = 0

    @property
    def total(self) -> int:
        """Bytes."""
        return self.fixed + self.residents + self.slots + self.activations + self.cache + self.context + self.reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which unit is where, and what that should cost."""

    spec: StreamSpec
    anatomy: Anatomy
    calibration: Calibration
    resident: tuple[str, ...]
    """Units that stay on the device."""
    slots: Mapping[str, tuple[int, ...]]
    """Ring -> bytes of each slot."""
    binding: Mapping[str, int]
    """Streamed unit -> its slot, an index into its ring's."""
    homes: Mapping[str, str]
    """Streamed unit -> `pinned`, `pageable` or `disk`."""
    ledger: Ledger
    budget_bytes: int
    """What the ledger is held against, at the level of the device."""
    streamed_bytes: int
    """A forward: S."""
    compute_ms: float
    """C: everything resident, the host's launching included."""
    link_ms: float
    """S over the link's bytes a second (and the disk's, where that is slower)."""
    bound_ms: float
    """max(C, S/B): no schedule is faster."""
    predicted_ms: float
    """A forward in the steady state, of this schedule."""
    stall_ms: float
    """Of it, the device waits for copies."""
    advice: tuple[str, ...] = ()
    """When streaming is the wrong tool, and what would be the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What runs of a plan measured."""

    plan: Plan
    workload: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    num_calls: int
    pct_of_bound: float
    link_bytes_per_s: float
    """Achieved: streamed bytes over the median."""
    stall_ms: float | None = None
    demand_fetches: int = 0
    """Units that were not where the order of a forward said: correct, and slow."""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    host_rss_bytes: int | None = None
    pinned_bytes: int = 0
    setup_s: float = 0.0
    exact: bool | None = None
    """Equal to everything resident, bit for bit; None: not compared."""
    simulated: bool = False
    notes: tuple[str, ...] = ()
