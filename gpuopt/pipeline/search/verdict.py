"""Screened trials -> who is timed against the input in the finals, and what is chosen, in a sentence with its figures. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from gpuopt.core import stats
from gpuopt.core.result import Status
from gpuopt.core.search import Choice, Timed
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.books import GOOD, LATE, Books
from gpuopt.pipeline.search.climb import climb
from gpuopt.pipeline.search.questions import Asking, Finalists, Finals

MAX_FINALS = 3
"""How often finals are held where all that was faster fails them."""


def decide(books: Books) -> Asking[Choice]:
    """Hold the finals; where a finalist fails them, the search goes on without it, and those that were left behind on its account come back."""
    choice = keep(books, "no candidate that passed the gates was faster in screening")
    for _ in range(MAX_FINALS):
        chosen = _finalists(books)
        if not chosen:
            break
        answer = yield Finals(candidates=(books.base, *(books.known[k] for k in chosen)))
        assert isinstance(answer, Finalists)
        books.pay("finals", answer.seconds)
        for key, timed in answer.timed.items():
            _record(books, key, timed)
        choice = _chosen(books, answer.timed)
        failed = [k for k in chosen if k in answer.timed and answer.timed[k].status != Status.OK]
        if not choice.keeps_input or not failed:
            break
        books.finals_failed = True
        if not books.over_time():
            yield from climb(books)
    books.close(choice.key, "chosen", "" if choice.key == tune.key(books.base) else books.trials[choice.key].reason)
    return choice


def keep(books: Books, because: str) -> Choice:
    """The input."""
    key, spec = tune.key(books.base), books.spec
    ms = books.trials[key].time_ms
    if spec.latency_budget_ms is not None and ms is not None and ms > spec.latency_budget_ms:
        because += f"; the input itself takes {ms:.4g} ms, over the latency budget of {spec.latency_budget_ms:g} ms: a smaller --batch, or a larger budget"
    return Choice(key=key, keeps_input=True, because=f"keep what you have: {because}")


def _finalists(books: Books) -> list[str]:
    """Keys of the best by screening, close enough to the best of all; none where none is faster than the input."""
    base_key = tune.key(books.base)
    outcomes = GOOD | {"slower"} if books.finals_failed else GOOD

    def cost(key: str) -> float:
        return books.cost(books.known[key], books.trials[key].screened_ms or math.inf)

    ranked = sorted((k for k, t in books.trials.items() if t.outcome in outcomes and t.screened_ms and k != base_key), key=cost)
    faster = [k for k in ranked if cost(k) < cost(base_key) * (1 - books.spec.min_gain / 2)]
    return [k for k in faster if cost(k) <= cost(faster[0]) * LATE][: max(1, books.spec.finalists - 1)]


def _record(books: Books, key: str, timed: Timed) -> None:
    """What the pairs said of one."""
    trial = books.trials.get(key)
    if trial is None:
        return
    if timed.status == Status.OK:
        rate = tune.batch_of(books.known[key]) / timed.ms * 1e3 if timed.ms else None
        trial = replace(trial, outcome="finalist", measured_ms=timed.ms, samples_per_s=rate, reason="")
    elif key != tune.key(books.base):
        trial = replace(trial, outcome=timed.status, reason=timed.reason)
    books.trials[key] = replace(trial, peak_bytes=timed.peak_bytes or trial.peak_bytes)


def _chosen(books: Books, timed: Mapping[str, Timed]) -> Choice:
    """The fastest that beats the input by more than the noise, within the budgets."""
    base_key = tune.key(books.base)
    base, others = timed.get(base_key), {k: t for k, t in timed.items() if k != base_key}
    passed = [(t.ratio, k) for k, t in others.items() if t.status == Status.OK and t.ratio]
    winners = [(r, k) for r, k in passed if others[k].verdict == "faster" and others[k].ms and not _over(books, others[k])]
    if winners:
        return _winner(books, base, others, winners)
    if not passed:
        return keep(books, "no finalist passed verification: " + "; ".join(t.reason for t in others.values())[:300])
    ratio, key = max(passed)
    over = ", and is over a budget" if _over(books, others[key]) else ""
    # Slower in the pairs than in the short blocks of screening, or faster by less than can be told from noise: two different answers.
    told = "which is not more than the noise" if ratio > 1 else "which is no faster"
    if others[key].verdict == "inconclusive" and (others[key].low or 0.0) > 1 + stats.PRACTICAL:
        told = f"which its pairs are too few to be sure of: --pairs {stats.MIN_PAIRS} or more"
    return keep(
        books,
        f"the nearest, {books.trials[key].label}, is {ratio:.3f}× as fast ({_interval(others[key])}), {told}{over}"
        + (f"; the input takes {base.ms:.4g} ms" if base and base.ms else ""),
    )


def _winner(books: Books, base: Timed | None, others: Mapping[str, Timed], winners: list[tuple[float, str]]) -> Choice:
    """`winners`: (ratio, key)."""
    ratio, key = max(winners)
    found = others[key]
    near = [k for _, k in winners if k != key and (others[k].high or 0) >= (found.low or 0)]
    alike = f"; {len(near)} other finalist{'s are' if len(near) > 1 else ' is'} within the noise of it" if near else ""
    sample = " a sample" if books.spec.goal == "throughput" else ""
    before = books.cost(books.base, base.ms) if base and base.ms else None
    over = _over(books, base) if base and base.status == Status.OK else ""
    bar = f"; it keeps to the budgets with {found.ms:.4g} ms a call, where the input does not: {over}" if over and found.ms else ""
    return Choice(
        key=key,
        keeps_input=False,
        because=f"{ratio:.2f}× as fast as the input ({_interval(found)}, interleaved pairs): "
        f"{books.cost(books.known[key], found.ms or 0):.4g} ms{sample}" + (f" against {before:.4g} ms" if before else "") + alike + bar,
        speedup=ratio,
        speedup_low=found.low,
        speedup_high=found.high,
        change=books.trials[key].label,
    )


def _over(books: Books, timed: Timed) -> str:
    """Which budget it is over, in words."""
    return books.spec.over(timed.ms, timed.peak_bytes)


def _interval(timed: Timed) -> str:
    return f"95%: {timed.low:.3f} to {timed.high:.3f}" if timed.low is not None and timed.high is not None else "no interval"
