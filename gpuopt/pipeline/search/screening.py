"""A candidate -> its trial in the books: asked for, held against the budgets, and the predictions and plans that its outcome changes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuopt.core.result import Status
from gpuopt.core.search import Screened
from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.books import GOOD, LATE, Books, at
from gpuopt.pipeline.search.questions import Asking, Screen


def screen(books: Books, candidate: Candidate, origin: str, ahead: Sequence[Candidate] = ()) -> Asking[None]:
    """Try one. `origin`: why, for one that was not planned before. `ahead`: who is likely to be next."""
    key = books.plan(candidate, origin)
    if books.predictor is not None:
        books.predict(key)
    limit = books.best_cost() * LATE * books.share(candidate) if books.best() is not None else None
    answer = yield Screen(candidate=candidate, limit_ms=limit, ahead=tuple(ahead))
    assert isinstance(answer, Screened)
    books.pay("screening", answer.seconds)
    outcome, reason = answer.status, answer.reason
    if answer.status == Status.OK:
        reason = "" if candidate == books.base else books.spec.over(answer.ms, answer.peak_bytes)
        outcome = "over budget" if reason else "screened"
    _learn(books, candidate, answer)
    books.trials[key] = replace(
        books.trials[key],
        outcome="slower" if outcome == Status.SKIPPED else outcome,
        reason=reason,
        screened_ms=answer.ms,
        peak_bytes=answer.peak_bytes,
        seconds=answer.seconds,
    )
    if outcome == Status.UNSUPPORTED:
        yield from _ban(books, candidate, reason)


def _learn(books: Books, candidate: Candidate, answer: Screened) -> None:
    """What its outcome says about others."""
    if books.predictor is not None:
        if answer.ms is not None and answer.status in (Status.OK, Status.SKIPPED):
            books.predictor.tell(candidate, answer.ms)
        if answer.status == Status.OK:
            books.predictor.worked(candidate)
        elif answer.status != Status.SKIPPED:
            books.predictor.failed(candidate)
    if answer.peak_bytes and "N" in candidate.dims:
        books.peaks[tune.key(at(candidate, 1)), candidate.dims["N"]] = answer.peak_bytes


def _ban(books: Books, candidate: Candidate, reason: str) -> Asking[None]:
    """A rewrite that cannot be made is the same through every backend: those planned at this precision that contain it are closed, and planned again without it.

    A reason that begins with the name of a rewrite was raised while that one was made (`converters.apply`): it is the one. Where none is named, the cause is
    looked for in eager alone, which runs whatever the module has become: one new rewrite is it, and of several each is tried alone. That takes seconds, and a
    wrong guess would cost a good one. Other precisions are left alone: a kernel may be missing in one format only.
    """
    worked = {r for k, t in books.trials.items() if t.outcome in GOOD or t.outcome == "slower" for r in books.known[k].transforms.rewrites}
    suspects = [r for r in candidate.transforms.rewrites if r not in worked]
    named = next((r for r in suspects if reason.startswith(f"{r}: ")), None)
    if named is not None:
        _plan_without(books, named, candidate, reason)
    elif candidate.backend.name != "eager":
        return
    elif len(suspects) == 1:
        _plan_without(books, suspects[0], candidate, f"{suspects[0]}: {reason}")
    else:
        for name in suspects:
            alone = replace(candidate, transforms=replace(candidate.transforms, rewrites=(*books.base.transforms.rewrites, name)))
            if not books.spent() and books.trials[books.plan(alone, "rewrite alone")].seconds is None:
                yield from screen(books, alone, "rewrite alone")


def _plan_without(books: Books, banned: str, candidate: Candidate, reason: str) -> None:
    """Close what is planned with this rewrite at the candidate's precision, and plan it without."""
    for key in [k for k, t in books.trials.items() if t.outcome == "planned" and books.known[k].precision == candidate.precision]:
        other = books.known[key]
        if banned not in other.transforms.rewrites:
            continue
        books.close(key, "pruned", reason)
        rest = tuple(name for name in other.transforms.rewrites if name != banned)
        again = books.plan(replace(other, transforms=replace(other.transforms, rewrites=rest)), books.trials[key].origin)
        if books.predictor is not None and books.trials[again].predicted_ms is None:
            books.predict(again)
