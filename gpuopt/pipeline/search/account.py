"""The books of a search that has ended -> its `Search` for a report: every trial with an outcome and a reason, the front, what was spent. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

from gpuopt.core.search import Choice, Search, Trial
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.books import GOOD, Books
from gpuopt.pipeline.search.frontier import beats, knee, pareto


def account(books: Books, choice: Choice | None) -> Search:
    """`choice`: None where the search could not begin."""
    told = [_told(books, trial, choice) for trial in books.trials.values()]
    taken = [t for t in told if t.seconds is not None]
    rest = sorted((t for t in told if t.seconds is None), key=lambda t: t.predicted_ms or math.inf)
    errors = [
        abs(t.predicted_ms - t.screened_ms) / t.screened_ms for t in taken if t.predicted_ms and t.screened_ms and t.origin != "input"
    ]
    # What screening alone put ahead of the chosen one in both is within its noise: the pairs have said which is the faster.
    chosen = next((t for t in taken if t.outcome == "chosen"), None)
    front = pareto(t for t in taken if t.outcome in GOOD and not (chosen is not None and t is not chosen and beats(t, chosen)))
    return Search(
        goal=books.spec.goal,
        trials=(*taken, *rest),
        choice=choice,
        pareto=tuple(t.key for t in front),
        knee=knee(front),
        stopped=books.stopped,
        seconds=books.spent_s,
        by_phase_s=dict(books.phases),
        prediction_error=median(errors) if errors else None,
    )


def _told(books: Books, trial: Trial, choice: Choice | None) -> Trial:
    """A plan stays a plan; where there was a search, what is still planned was not worth trying."""
    if trial.outcome == "planned" and choice is not None and not books.spec.dry_run and books.spec.time_budget_s != 0:
        trial = replace(books.predicted(trial), outcome="pruned", reason=_not_tried(books, trial))
    if trial.samples_per_s is None and trial.time_ms:
        trial = replace(trial, samples_per_s=tune.batch_of(books.known[trial.key]) / trial.time_ms * 1e3)
    return trial


def _not_tried(books: Books, trial: Trial) -> str:
    if books.stopped.startswith(("the time budget", f"{books.spec.max_trials} candidates")):
        return f"not tried: {books.stopped}"
    assert books.predictor is not None
    candidate = books.known[trial.key]
    seconds, budget = books.seconds(candidate), books.spec.time_budget_s
    if budget is not None and books.spent_s + seconds > budget:
        return f"not tried: it takes about {seconds:.0f} s, and the time budget of {budget:g} s had {max(0.0, budget - books.spent_s):.0f} left"
    expected, share = books.predictor.expect(candidate), books.share(candidate)
    best = books.best_cost() if books.best() is not None else math.nan
    return f"expected {expected.low_ms / share:.4g} to {expected.high_ms / share:.4g} ms, the best takes {best:.4g} ms"
