"""Values of `gpuopt stream`: what a command asks for beyond a plan, and what it found: rows of a frontier, rivals at the same budget, checks, a packed folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpuopt.core.streaming import Plan, Streamed, StreamSpec

ACTIONS = ("plan", "run", "bench", "verify", "pack")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another library that runs a model larger than the device, as it is held against ours."""

    title: str
    """As tables call it."""
    packages: Mapping[str, str]
    """What it imports -> what pip calls that."""
    takes_budget: bool = True
    """Whether it can be told how many bytes of weights may stay on the device."""
    library: bool = True
    """False: nobody else's way, but plain eager once more, in a process that has nothing to do with streaming."""


RIVALS: Mapping[str, Rival] = {
    "accelerate": Rival(title="accelerate device_map", packages={"accelerate": "accelerate"}),
    "accelerate-pinned": Rival(title="accelerate, weights pinned by hand", packages={"accelerate": "accelerate"}),
    "diffusers": Rival(
        title="diffusers group offload", packages={"diffusers": "diffusers", "accelerate": "accelerate"}, takes_budget=False
    ),
    "mmgp": Rival(title="mmgp", packages={"mmgp": "mmgp", "optimum.quanto": "optimum-quanto", "accelerate": "accelerate"}),
    "resident": Rival(title="everything resident, again", packages={}, takes_budget=False, library=False),
}
"""By the name that `--rival` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """What is to be done with a model and its budgets."""

    action: str = "plan"
    """One of ACTIONS."""
    specs: tuple[StreamSpec, ...] = ()
    """One a budget; `bench` and `plan` take several, which is a frontier."""
    generate: int | None = None
    """A call is the greedy generation of so many tokens; its forwards are timed, the prompt's apart. None: a call is a forward."""
    calls: int = 20
    """Timed, a row."""
    forwards: int = 20
    """Of each race that `verify` hunts."""
    rivals: tuple[str, ...] = ("accelerate",)
    """`bench`: other libraries it is timed in turns with, by the names of RIVALS; `resident` goes along where a budget streams nothing."""
    alone: bool = False
    """`bench`: without everything resident and without rivals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpan:
    """What a queue of a device is busy with, in a forward of the steady state."""

    queue: str
    """`compute`, `copy` or `disk`."""
    unit: str
    """Empty: what is computed outside units."""
    start_ms: float
    """From the start of the forward; what began before it is below 0."""
    end_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One time over another, from pairs of blocks that were timed in turns."""

    ratio: float
    """Median of the pairs'."""
    low: float | None = None
    """Of at least 95% confidence; None where there are too few pairs for that."""
    high: float | None = None
    num_pairs: int = 0

    @property
    def percent(self) -> float:
        """Above 1."""
        return 100 * (self.ratio - 1)

    @property
    def percents(self) -> tuple[float, float] | None:
        """The interval, above 1."""
        return None if self.low is None or self.high is None else (100 * (self.low - 1), 100 * (self.high - 1))

    def under(self, percent: float) -> str:
        """Whether it lies less than so many percent above 1: `met` or `missed` where the whole interval says so, else `inconclusive`."""
        known = self.percents
        if known is None or known[0] < percent <= known[1]:
            return "inconclusive"
        return "met" if known[1] < percent else "missed"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherEager:
    """Plain eager in another process, in turns with plain eager in the one that streams: how far two processes that do the same differ."""

    name: str
    """As the arm or rival is called."""
    median_ms: float
    over: Ratio
    """There over here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverEager:
    """A plan that streams nothing against plain eager, in turns within one process, on one module object that is bound and not bound by turns.

    Two processes also differ by whatever else differs between them, which `others` shows: where the host's launches are what takes the time, as in decoding, it may be more than what is asked for.
    """

    over: Ratio | None = None
    """Streamed over plain eager; None where it was not measured."""
    streamed_ms: float | None = None
    eager_ms: float | None = None
    block_forwards: int = 0
    """Timed in each block of each side."""
    apart: bool = False
    """Plain eager has weights of its own, a tensor each, as `module.to()` lays them out; else it reads those of the plan."""
    others: tuple[OtherEager, ...] = ()
    reason: str = ""
    """Why there is no figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRow:
    """One budget: its plan, a picture of it, and what came of it."""

    plan: Plan | None = None
    """None where `measured` carries it."""
    spans: tuple[StreamSpan, ...] = ()
    measured: Streamed | None = None
    over_eager: OverEager | None = None
    """`bench`, of a plan that streams nothing, on a device that is there."""
    reason: str = ""
    """Why there is no plan, or nothing was measured."""
    fix: str = ""

    @property
    def planned(self) -> Plan | None:
        """The plan, wherever it is."""
        return self.measured.plan if self.measured is not None else self.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamArm:
    """Another way to run the same model, timed in turns with the streamed one of the same row."""

    name: str
    """`everything resident`, or the title of a rival."""
    rival: str | None = None
    """Its name in RIVALS; None: everything resident."""
    row: int | None = None
    """Index of the row it was timed beside; None: all of them."""
    budgeted: bool = True
    """Whether it had that row's bytes of weights; else it cannot be told any, and ran once."""
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    num_calls: int = 0
    streamed_ms: float | None = None
    """Median of the streamed row in the same turns: what a speed-up is counted from."""
    exact: bool | None = None
    """Equal to everything resident, bit for bit; None: not compared."""
    peak_device_bytes: int | None = None
    setup_s: float | None = None
    setting: str = ""
    """How it was set up, in a sentence."""
    simulated: bool = False
    reason: str = ""
    """Why it was not run."""

    @property
    def speedup(self) -> float | None:
        """Of the streamed row over this arm, from the same turns."""
        return self.median_ms / self.streamed_ms if self.median_ms and self.streamed_ms else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCheck:
    """One thing that `verify` looked at."""

    name: str
    passed: bool | None
    """None: it could not be looked at; `detail` says why."""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReport:
    """All that `gpuopt stream` found."""

    action: str
    device: str
    """As typed, with what it stands for: `cuda:0`, `simulated:link=5.5e+10,…`."""
    model: str = ""
    load_s: float | None = None
    rows: tuple[StreamRow, ...] = ()
    arms: tuple[StreamArm, ...] = ()
    checks: tuple[StreamCheck, ...] = ()
    packed: str | None = None
    """Folder that was written."""
    packed_bytes: int | None = None
    tokens: tuple[int, ...] = ()
    """Of `run --generate`: what the first sequence got."""
    notes: tuple[str, ...] = ()
