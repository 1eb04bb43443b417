"""The best candidate -> the same at other batches, where samples a second are what is wanted. Pure."""

from __future__ import annotations

from gpuopt.core.spec import Candidate
from gpuopt.pipeline import tune
from gpuopt.pipeline.books import Books, at
from gpuopt.pipeline.questions import Asking
from gpuopt.pipeline.screening import screen

GROWTH = 1.02
"""A doubled batch that gains less than this in samples a second, twice, ends the climb."""
MEMORY_SHARE = 0.9
"""Of the device's memory a batch may be predicted to need."""


def grow(books: Books) -> Asking[None]:
    """Powers of two from the batch given, while samples a second grow and memory, by the peaks seen so far, allows it; then the steps between."""
    leader = books.best()
    if leader is None or "N" not in leader.dims:
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
