"""What is planned -> trials: the candidate with the most expected gain a second next, until nothing left is likely to be better or a budget is spent. Pure."""

from __future__ import annotations

from statistics import fmean

from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.books import Books, at
from gpuopt.pipeline.search.questions import Asking
from gpuopt.pipeline.search.screening import screen

MIN_CHANCE = 0.05
"""A candidate less likely than this to work and to beat the best by `min_gain` is not built."""
AHEAD = 8
"""Candidates named as likely to be next."""
WORTH = 0.003
"""Nor one that is not expected to gain this much (misses count as nothing) if it takes as long as a candidate takes on average; in proportion if it takes more or less."""


def plan(books: Books) -> None:
    """Take the whole space into the books, with what is expected of each."""
    spec, base = books.spec, books.base
    for candidate in tune.space(base, books.facts, backends=spec.backends, precisions=spec.precisions, rewrites=spec.rewrites):
        for batch in spec.batches or (None,):
            books.plan(candidate if batch is None else at(candidate, batch), "space")
    for key, trial in books.trials.items():
        if trial.outcome == "planned":
            books.predict(key)


def climb(books: Books) -> Asking[None]:
    """Try what is planned; says in `stopped` why it ends."""
    while True:
        if books.over_time():
            books.stopped = f"the time budget of {books.spec.time_budget_s:g} s is spent"
            return
        if books.tried() >= books.spec.max_trials:
            books.stopped = f"{books.spec.max_trials} candidates were tried"
            return
        wanted = _ranked(books)
        if not wanted and books.unfitting:
            books.stopped = f"the time budget of {books.spec.time_budget_s:g} s has no room for the {books.unfitting} left that may be faster: --resume with a larger --time-budget"
            return
        if not wanted:
            books.stopped = books.stopped or f"nothing left is likely to beat the best by {books.spec.min_gain:.0%}"
            return
        key, *later = wanted
        yield from screen(books, books.known[key], books.trials[key].origin, [books.known[k] for k in later[:AHEAD]])


def _ranked(books: Books) -> list[str]:
    """Those worth trying, by their expected gain a second. Closes what cannot win any more."""
    assert books.predictor is not None
    best = books.best_cost()
    wanted = best * (1 - books.spec.min_gain)
    found: list[tuple[float, str]] = []
    books.unfitting = 0
    usual_s = fmean(books.seconds(candidate) for candidate in books.known.values())
    for key, trial in books.trials.items():
        if trial.outcome != "planned":
            continue
        candidate = books.known[key]
        share = books.share(candidate)
        bound = tune.bound_ms(candidate, books.facts)
        if bound is not None and bound / share > best:
            books.close(key, "pruned", f"its floor of {bound / share:.4g} ms is above the best, {best:.4g} ms")
            continue
        expected, works = books.predictor.expect(candidate), books.predictor.chance_ok(candidate)
        gain = works * expected.expected_gain(wanted * share)
        seconds = books.seconds(candidate)
        if works * expected.chance_below(wanted * share) < MIN_CHANCE or gain < WORTH * seconds / usual_s:
            continue  # not closed: a later measurement may raise its chances
        if books.spec.time_budget_s is not None and books.spent_s + seconds > books.spec.time_budget_s:
            books.unfitting += 1  # something quicker may still fit
            continue
        found.append((gain / seconds, key))
    return [key for _, key in sorted(found, key=lambda pair: -pair[0])]  # stable: of equals the first that was planned
