"""The strategy of `optimize`, pure: a generator that asks for one experiment after the other and is sent what came out.

It never looks at a clock, a file or a process. All it knows of time are the seconds that the answers say they took, so the same answers lead to the same
questions: a journal of answers is all that `--resume` needs, and a record of a whole space is all that a test of the strategy needs.

This file is the order of its phases: the input screened and explained, the space climbed (`climb.py`), what is inaccurate mended and what the doctor proposes
tried (`remedies.py`), batches grown where samples a second are wanted (`batches.py`), the finals (`verdict.py`), the account (`account.py`). They share one
`Books`, and speak in the values of `questions.py`.
"""

from __future__ import annotations

from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import batches, climb, remedies, tune, verdict
from gpuopt.pipeline.search.account import account
from gpuopt.pipeline.search.books import Books
from gpuopt.pipeline.search.predict import Predictor
from gpuopt.pipeline.search.questions import Asking, Explained, Steps
from gpuopt.pipeline.search.screening import screen

MAX_ROUNDS = 3
"""How often the best one so far is traced again for what its own trace proposes."""


def search(base: Candidate, spec: SearchSpec) -> Steps:
    """Ask until nothing left is likely to be better, or a budget is spent. `base` is the input as it stands: it is screened first and is always a finalist."""
    books = Books(base, spec)
    explained = yield from _begin(books)
    if explained is None:
        return account(books, None)
    climb.plan(books)
    if spec.dry_run or spec.time_budget_s == 0:
        books.stopped = "a plan: nothing but the input was built" if spec.dry_run else "a time budget of 0 builds nothing but the input"
        return account(books, verdict.keep(books, "no candidate was tried"))
    yield from climb.climb(books)
    yield from remedies.mend(books)
    yield from remedies.fix(books, explained.proposals, base)
    yield from _polish(books)
    if spec.goal == "throughput" and not spec.batches:
        yield from batches.grow(books)
    choice = yield from verdict.decide(books)
    return account(books, choice)


def _begin(books: Books) -> Asking[Explained | None]:
    """Everything is predicted from the input; None where it cannot be timed or traced, with the reason in the books."""
    base = books.base
    yield from screen(books, base, "input")
    if books.best() is None:
        books.stopped = "the input itself could not be timed"
        return None
    explained = yield from remedies.explain(books, base)
    if explained.facts is None:
        books.stopped = f"the input could not be explained: {explained.reason}"
        return None
    books.predictor = Predictor(explained.facts)
    ms = books.trials[tune.key(base)].screened_ms
    assert ms is not None
    books.predictor.tell(base, ms)
    books.predictor.worked(base)
    return explained


def _polish(books: Books) -> Asking[None]:
    """Trace the best one so far and try what its own trace proposes, while that finds a better one."""
    for _ in range(MAX_ROUNDS):
        leader = books.best()
        assert leader is not None
        if leader == books.base or books.spent():
            return
        more = yield from remedies.explain(books, leader)
        better = yield from remedies.fix(books, more.proposals, leader)
        if not better:
            return
