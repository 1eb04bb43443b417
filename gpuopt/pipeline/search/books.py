"""Answers so far -> what a search knows: its trials and what became of each, the best one, what was spent, and what is left to spend. Pure.

No clock is read: all that is known of time are the seconds that the answers say they took.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median

from gpuopt.core.search import SearchSpec, Trial
from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.predict import Predictor

GOOD = frozenset({"screened", "finalist", "chosen"})
"""Outcomes of a candidate that passed the gates and keeps to the budgets."""
LATE = 1.15
"""A candidate this much slower than the best verified one is not verified: screening is worth a few percent, and nothing further behind becomes a finalist."""


@dataclass(slots=True)
class Books:
    """What is known so far."""

    base: Candidate
    spec: SearchSpec
    predictor: Predictor | None = None
    """There is one from when the input was explained."""
    trials: dict[str, Trial] = field(default_factory=dict)
    known: dict[str, Candidate] = field(default_factory=dict)
    """Key -> whose trial it is."""
    spent_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    """Why the search came to an end."""
    peaks: dict[tuple[str, int], int] = field(default_factory=dict)
    """(key of the settings at batch 1, batch) -> peak bytes."""
    unfitting: int = 0
    """Planned ones that may be faster, and take longer than what is left of the time budget."""
    finals_failed: bool = False
    """A finalist failed: those called slower on its account are in the race again."""

    # -- candidates -----------------------------------------------------------------------------------------------------------

    def plan(self, candidate: Candidate, origin: str) -> str:
        """Take a candidate into the books; those known stay as they are. Returns its key."""
        key = tune.key(candidate)
        if key not in self.trials:
            self.known[key] = candidate
            self.trials[key] = Trial(key=key, label=tune.words(candidate, self.base), origin=origin, batch=candidate.dims.get("N"))
        return key

    def close(self, key: str, outcome: str, reason: str) -> None:
        """Say how a trial ended."""
        self.trials[key] = replace(self.trials[key], outcome=outcome, reason=reason)

    def predict(self, key: str) -> None:
        """Write into a trial what is expected of it now."""
        self.trials[key] = self.predicted(self.trials[key])

    def predicted(self, trial: Trial) -> Trial:
        """The trial with what is expected of it now."""
        assert self.predictor is not None
        candidate = self.known[trial.key]
        expected = self.predictor.expect(candidate)
        return replace(
            trial,
            predicted_ms=expected.ms,
            predicted_low_ms=expected.low_ms,
            predicted_high_ms=expected.high_ms,
            bound_ms=tune.bound_ms(candidate, self.facts),
        )

    @property
    def facts(self) -> tune.Facts:
        """Of the input."""
        assert self.predictor is not None
        return self.predictor.facts

    # -- what is made small ---------------------------------------------------------------------------------------------------

    def share(self, candidate: Candidate) -> int:
        """Samples among which the time of a call is divided: 1 where its latency is what counts."""
        return tune.share(candidate, self.spec.goal)

    def cost(self, candidate: Candidate, ms: float) -> float:
        """What is made small: the call, or its time a sample."""
        return ms / self.share(candidate)

    def best(self) -> Candidate | None:
        """The cheapest that was verified and keeps to the budgets; the input while nothing is better."""
        good = [(self.cost(self.known[k], t.screened_ms), k) for k, t in self.trials.items() if t.outcome in GOOD and t.screened_ms]
        return self.known[min(good)[1]] if good else None

    def best_cost(self) -> float:
        """Its cost."""
        found = self.best()
        assert found is not None
        ms = self.trials[tune.key(found)].screened_ms
        assert ms is not None
        return self.cost(found, ms)

    # -- what is spent --------------------------------------------------------------------------------------------------------

    def pay(self, phase: str, seconds: float) -> None:
        """Time that an answer took."""
        self.spent_s += seconds
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def seconds(self, candidate: Candidate) -> float:
        """What trying it is expected to take: as long as its backend took here so far, else as the table says, stretched like the others were."""
        took = [(self.known[k], t.seconds) for k, t in self.trials.items() if t.seconds is not None and t.screened_ms is not None]
        same = [seconds for one, seconds in took if str(one.backend) == str(candidate.backend)]
        stretch = [seconds / tune.way_of(one).build_s for one, seconds in took]
        return median(same) if same else tune.way_of(candidate).build_s * (median(stretch) if stretch else 1.0)

    def over_time(self) -> bool:
        """The time budget is spent."""
        return self.spec.time_budget_s is not None and self.spent_s >= self.spec.time_budget_s

    def tried(self) -> int:
        """How many candidates were built."""
        return sum(t.seconds is not None for t in self.trials.values())

    def spent(self) -> bool:
        """No budget is left to try another."""
        return self.over_time() or self.tried() >= self.spec.max_trials


def at(candidate: Candidate, batch: int) -> Candidate:
    """The same at another batch."""
    return replace(candidate, dims={**candidate.dims, "N": batch})
