"""What a search is asked for and what it found: `SearchSpec` of a job; `Trial`, `Choice`, `Economics` and `Search` of a report."""

from __future__ import annotations

from dataclasses import dataclass, field

GOALS = ("latency", "throughput")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """What `gpuopt optimize` looks for, and how far it may go."""

    goal: str = "latency"
    """`latency`: the least time of a call at the batch given. `throughput`: most samples a second, over batches."""
    latency_budget_ms: float | None = None
    """No call slower than this (its median); with `throughput`, the largest batch that stays under it."""
    max_memory_bytes: int | None = None
    """Peak device memory of a candidate."""
    time_budget_s: float | None = None
    """For the whole search; the finalists are timed all the same. 0 plans and builds nothing."""
    backends: tuple[str, ...] = ()
    """Only these, as typed (`inductor:freezing`); empty for all that can run here."""
    precisions: tuple[str, ...] = ()
    """Only these; empty for all that the device has units for."""
    rewrites: tuple[str, ...] | None = None
    """Only these; None for all that apply, () for none."""
    batches: tuple[int, ...] = ()
    """Only these; empty searches, where the goal is throughput."""
    max_trials: int = 64
    finalists: int = 4
    """Timed against each other and against the input, in interleaved pairs."""
    min_gain: float = 0.02
    """A remaining candidate that cannot be expected to beat the best by this share is not built, and a winner must beat the input by at least it."""
    dry_run: bool = False
    """Print the plan with predicted times and stop."""
    resume: bool = False
    """Go on with the journal beside the output."""

    def over(self, ms: float | None, peak_bytes: int | None) -> str:
        """Which budget a candidate is over, in words; "" where it keeps to all. A figure that is not known keeps to none."""
        if self.latency_budget_ms is not None and (ms is None or ms > self.latency_budget_ms):
            return f"{'an unknown time' if ms is None else f'{ms:.4g} ms'} is over the latency budget of {self.latency_budget_ms:g} ms"
        if self.max_memory_bytes is not None and (peak_bytes is None or peak_bytes > self.max_memory_bytes):
            told = "an unknown peak of memory" if peak_bytes is None else f"{peak_bytes / 2**30:.2f} GiB"
            return f"{told} is over the {self.max_memory_bytes / 2**30:.2f} GiB allowed"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate of a search, and what became of it."""

    key: str
    """Stable: a hash of its settings, and nothing that was measured."""
    label: str
    """Its settings in words: `fp16 inductor:reduce-overhead no_mask, N=8`."""
    origin: str
    """Where it came from: `input`, `space`, `batch`, or the rule of the doctor that asked for it."""
    note: str = ""
    """What a reader has to know of it besides: that it could not be traced, and what the search did without."""
    outcome: str = "planned"
    """`planned`, `pruned`, `screened`, `finalist`, `chosen`, or the status that ended it (`accuracy_fail`, `oom_device`, …)."""
    reason: str = ""
    predicted_ms: float | None = None
    """Before it was built: the middle of the prediction."""
    predicted_low_ms: float | None = None
    predicted_high_ms: float | None = None
    """Where it lies with 90% confidence, by the model's own account."""
    bound_ms: float | None = None
    """No program of this precision is faster, by the ceilings of this machine; None where they are not known."""
    screened_ms: float | None = None
    """Median of the short blocks it was screened with."""
    measured_ms: float | None = None
    """Median of the interleaved pairs, for finalists."""
    samples_per_s: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    """What trying it took: build, verification and blocks."""
    batch: int | None = None
    reproduce: str = ""
    """A line that runs it alone."""

    @property
    def time_ms(self) -> float | None:
        """The best that is known of it."""
        return self.measured_ms if self.measured_ms is not None else self.screened_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Economics:
    """What the change costs, and when it has paid for itself."""

    build_s: float | None = None
    """Compile time of the winner alone."""
    search_s: float | None = None
    """The whole search."""
    build_peak_host_bytes: int | None = None
    """Most host memory of the winner's process and its compilers, up to its first call."""
    cold_start_s: float | None = None
    """From a fresh process to the first answer, compiling included."""
    artifact_bytes: int | None = None
    energy_j_per_sample: float | None = None
    energy_before_j_per_sample: float | None = None
    calls_to_repay_build: int | None = None
    """Calls after which the time saved exceeds `build_s`."""
    calls_to_repay_search: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer of a search."""

    key: str
    """Of the trial that was chosen; the input's own where nothing beats it."""
    keeps_input: bool
    """Whether the answer is "keep what you have"."""
    because: str
    """In one sentence, with the figures."""
    speedup: float | None = None
    """Times faster than the input, from interleaved pairs; a sample for a sample where batches differ."""
    speedup_low: float | None = None
    speedup_high: float | None = None
    change: str = ""
    """What to change, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A report's account of a search."""

    goal: str
    trials: tuple[Trial, ...] = ()
    """In the order in which they were taken up; those never taken up come last."""
    choice: Choice | None = None
    """None for a plan."""
    pareto: tuple[str, ...] = ()
    """Keys of verified trials that no other beats in both latency and samples a second, by latency."""
    knee: str | None = None
    """Of these, the one after which more throughput costs more than its share of latency."""
    stopped: str = ""
    """Why it ended."""
    seconds: float = 0.0
    by_phase_s: dict[str, float] = field(default_factory=dict)
    economics: Economics | None = None
    resumed: int = 0
    """Answers that came from the journal instead of being measured again."""
    prediction_error: float | None = None
    """Median of |predicted - screened| / screened over the trials that were screened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """What trying one candidate showed: built, timed in a few short blocks, verified where it could still win."""

    status: str
    """A `Status`; `ok` for one that may be chosen."""
    reason: str = ""
    ms: float | None = None
    peak_bytes: int | None = None
    verified: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One finalist after the interleaved pairs."""

    status: str
    reason: str = ""
    ms: float | None = None
    ratio: float | None = None
    """Time of the input over its own, a sample for a sample: above 1 is faster."""
    low: float | None = None
    high: float | None = None
    """95% interval of `ratio`."""
    verdict: str = ""
    """`faster`, `slower`, `same` or `inconclusive` against the input."""
    peak_bytes: int | None = None
