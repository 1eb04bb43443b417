"""The best candidate -> the same at other batches, where samples a second are what is wanted: larger ones, or smaller ones where this one is over a budget. Pure."""

from __future__ import annotations

from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.books import GOOD, Books, at
from gpuopt.pipeline.search.questions import Asking
from gpuopt.pipeline.search.screening import screen

GROWTH = 1.02
"""A doubled batch that gains less than this in samples a second, twice, ends the climb."""
BISECTIONS = 2
"""Batches tried between the largest that keeps to the budgets and the smallest that does not."""
LOST = "over budget"
"""Outcome of a candidate that passed the gates and is over a budget."""
MEMORY_SHARE = 0.9
"""Of the device's memory a batch may be predicted to need."""


def grow(books: Books) -> Asking[None]:
    """Powers of two from the batch given, while samples a second grow and memory, by the peaks seen so far, allows it; then the steps between."""
    leader = books.best()
    if leader is None or "N" not in leader.dims:
        return
    if _over(books, leader):
        yield from _shrink(books)
        return
    start = leader.dims["N"]
    rates: dict[int, float] = {start: 1 / books.best_cost()}
    flat, batch = 0, start
    while flat < 2 and not books.spent():
        batch *= 2
        rate = yield from _rate(books, leader, batch)
        if rate is None:
            break
        flat = flat + 1 if rate < max(rates.values()) * GROWTH else 0
        rates[batch] = rate
    top = max(rates, key=lambda b: rates[b])
    for between in (top * 3 // 4, top * 3 // 2):
        if between not in rates and between > 0 and not books.spent():
            rate = yield from _rate(books, leader, between)
            if rate is not None:
                rates[between] = rate


def _over(books: Books, candidate: Candidate) -> bool:
    """Whether it keeps to no budget: the best so far is the input itself then, which stays in the race whatever it takes."""
    trial = books.trials[tune.key(candidate)]
    return bool(books.spec.over(trial.screened_ms, trial.peak_bytes))


def _shrink(books: Books) -> Asking[None]:
    """Nothing at the batch given keeps to the budgets: halve it, with the settings that are fastest there, until one does; then look between that and the last that did not."""
    start = books.base.dims["N"]
    seen = [
        (books.cost(books.known[key], trial.screened_ms), key)
        for key, trial in books.trials.items()
        if trial.screened_ms and books.known[key].dims.get("N") == start and trial.outcome in (*GOOD, LOST)
    ]
    key = min(seen)[1]
    leader, ms = books.known[key], books.trials[key].screened_ms
    assert ms is not None
    high, batch = start, start // 2
    if books.spec.latency_budget_ms is not None:
        while batch > 1 and ms * batch / start > books.spec.latency_budget_ms:  # a call does not shrink faster than its batch
            high, batch = batch, batch // 2
    while batch >= 1 and not books.spent():
        rate = yield from _rate(books, leader, batch)
        if rate is not None:
            break
        if books.trials[tune.key(at(leader, batch))].outcome not in (LOST, "pruned"):
            return  # it fails there, or is behind the input a sample: a smaller one is no better
        high, batch = batch, batch // 2
    for _ in range(BISECTIONS):
        between = (batch + high) // 2
        if not batch < between < high or books.spent():
            return
        rate = yield from _rate(books, leader, between)
        batch, high = (between, high) if rate is not None else (batch, between)


def _rate(books: Books, leader: Candidate, batch: int) -> Asking[float | None]:
    """Samples a millisecond there; None where it does not fit, does not work or is over the latency budget."""
    candidate = at(leader, batch)
    key = books.plan(candidate, "batch")
    needed = _memory_bytes(books, leader, batch)
    limits = [b for b in (books.spec.max_memory_bytes, int(MEMORY_SHARE * (books.facts.memory_bytes or 0)) or None) if b]
    if needed is not None and limits and needed > min(limits):
        books.close(key, "pruned", f"predicted to need {needed / 2**30:.1f} GiB, and {min(limits) / 2**30:.1f} may be used")
        return None
    yield from screen(books, candidate, "batch")
    trial = books.trials[key]
    return batch / trial.screened_ms if trial.outcome == "screened" and trial.screened_ms else None


def _memory_bytes(books: Books, leader: Candidate, batch: int) -> int | None:
    """Peak bytes at this batch, on the line through the two largest batches seen with these settings; in proportion where one is known."""
    settings = tune.key(at(leader, 1))
    seen = sorted((b, peak) for (name, b), peak in books.peaks.items() if name == settings)
    if not seen:
        return None
    if len(seen) == 1:
        return round(seen[0][1] * batch / seen[0][0])
    (b0, p0), (b1, p1) = seen[-2:]
    slope = max(0.0, (p1 - p0) / (b1 - b0))
    return round(p1 + slope * (batch - b1))
