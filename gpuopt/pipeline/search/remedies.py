"""What is wrong with a candidate -> trials without it: the changes that the doctor proposes for one, and the modules kept in fp32 for one that is inaccurate. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuopt.core.result import Status
from gpuopt.core.spec import BackendSpec, Candidate
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.books import GOOD, Books
from gpuopt.pipeline.search.questions import Asking, Explain, Explained, Mend, Mended, Proposal
from gpuopt.pipeline.search.screening import screen

MAX_FIXES = 6
"""Changes of the doctor tried on one candidate, the dearest first."""


def explain(books: Books, candidate: Candidate) -> Asking[Explained]:
    """What a trace of it says. Where there is none, its trial says why, and what the search does without."""
    answer = yield Explain(candidate=candidate)
    assert isinstance(answer, Explained)
    books.pay("explaining", answer.seconds)
    if answer.reason:
        without = "the doctor proposes nothing for it"
        if candidate == books.base and answer.facts is not None:
            without = "what to expect of the others comes from its FLOPs, its bytes and the ceilings alone, and " + without
        key = tune.key(candidate)
        books.trials[key] = replace(books.trials[key], note=f"no trace of it ({answer.reason}): {without}")
    return answer


def fix(books: Books, proposals: Sequence[Proposal], on: Candidate) -> Asking[bool]:
    """Try what a trace proposes, on the candidate it is a trace of and on the best one. True where one of them became the best."""
    before = books.best()
    wanted = sorted(proposals, key=lambda p: -(p.gain_low_ms + p.gain_high_ms))[:MAX_FIXES]
    for proposal in wanted:
        best = books.best() or on
        for target in (best,) if best == on else (best, on):
            if books.spent():
                return books.best() != before
            changed = proposal.change.applied(target)
            key = books.plan(changed, proposal.origin)
            if books.trials[key].outcome != "planned":
                continue
            unasked = _unasked(books, changed)
            if unasked:
                books.close(key, "pruned", unasked)
                continue
            yield from screen(books, changed, proposal.origin)
    return books.best() != before


def _unasked(books: Books, candidate: Candidate) -> str:
    """Why it is outside what the user narrowed the search to; "" where it is within."""
    spec, base = books.spec, books.base
    if spec.backends and str(candidate.backend) not in {str(BackendSpec.parse(text)) for text in spec.backends}:
        return "its backend is not among those asked for"
    if spec.precisions and candidate.precision is not None and candidate.precision.value not in spec.precisions:
        return "its precision is not among those asked for"
    unasked = [r for r in candidate.transforms.rewrites if r not in (*(spec.rewrites or ()), *base.transforms.rewrites)]
    if spec.rewrites is not None and unasked:
        return f"its rewrite {unasked[0]} is not among those asked for"
    if spec.batches and candidate.dims.get("N") not in spec.batches:
        return "its batch is not among those asked for"
    if spec.goal == "latency" and candidate.dims != base.dims:
        return "it changes the sizes, and latency is wanted at these"
    return ""


def mend(books: Books) -> Asking[None]:
    """Of each precision that failed the gate, the fastest candidate: the smallest set of modules kept in fp32 with which it passes, if there is one."""
    failed: dict[str, list[tuple[float, str]]] = {}
    for key, trial in books.trials.items():
        candidate = books.known[key]
        if trial.outcome in (Status.ACCURACY_FAIL, Status.NAN) and candidate.precision is not None and trial.screened_ms:
            failed.setdefault(candidate.precision.value, []).append((books.cost(candidate, trial.screened_ms), key))
    for precision, ones in failed.items():
        cost, key = min(ones)
        candidate = books.known[key]
        if _passes(books, precision) or candidate.transforms.keep_fp32 or cost >= books.best_cost() or books.spent():
            continue
        answer = yield Mend(candidate=candidate)
        assert isinstance(answer, Mended)
        books.pay("mending", answer.seconds)
        if answer.kept:
            kept = replace(candidate, transforms=replace(candidate.transforms, keep_fp32=answer.kept))
            yield from screen(books, kept, "sensitive modules")
        elif answer.note:
            books.trials[key] = replace(books.trials[key], reason=f"{books.trials[key].reason}; {answer.note}")


def _passes(books: Books, precision: str) -> bool:
    """Some candidate of this precision passed the gate."""
    own = (books.known[key].precision for key, trial in books.trials.items() if trial.outcome in GOOD)
    return any(found is not None and found.value == precision for found in own)
