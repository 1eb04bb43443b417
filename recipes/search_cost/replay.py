"""Record -> what the search would have cost: its strategy as it is (`gpuopt.pipeline.search.strategy`), every question answered out of the record. Pure.

    Screen   in the record: what it says. One above the question's limit is answered as screening does, without verification and without what that cost.
             outside it (a fix of the doctor's, a rewrite tried alone): `skipped` without a time, from which the strategy learns nothing; charged with what candidates of its
             backend took (the median; of all where there are none), and counted in `num_outside`.
    Explain  of the input: as recorded. Of a later leader, which the record has no trace of: nothing proposed, charged with what the input's took.
    Mend     not recorded: no set found, charged with nothing, counted in `num_outside`.
    Finals   the times of screening once more, as if the pairs confirmed them; free, as a full measurement would need them just as well.

What verification holds candidates against is computed by the first that needs it and shared by the others, as in a search: in the record by the first of each precision, in the
replay by the first that the search has verified. What it took is told from the median of the other verifications in that precision (`_References`).

The search's time is set against that of all candidates of the space, without the trace: a full measurement needs none, and the search has to pay for its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from gpuopt.core.errors import BadInput
from gpuopt.core.result import Status
from gpuopt.core.search import Screened, Search, Timed
from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.questions import Answer, Ask, Explain, Explained, Finalists, Finals, Mended, Screen
from gpuopt.pipeline.search.strategy import search
from recipes.search_cost.record import Record, Row

GOAL_REACHED = 0.98
"""Of the optimum: the least time of any candidate of the record that passed / that of the best one so far."""
GOAL_SHARE = 0.3
"""Of the time that all candidates take."""
GOAL_MODELS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A search beside the full measurement."""

    whole_s: float
    """All candidates."""
    until_s: float | None
    """Spent by the search until its best was within 2% of the optimum; None where it never was."""
    search_s: float
    """Until it ended by itself, without the finals."""
    explain_s: float
    """Of `search_s`, traces."""
    optimum_ms: float
    input_ms: float
    chosen_ms: float
    optimum: str
    """Its settings in words."""
    chosen: str
    num_screened: int
    """Candidates of the record that the search tried, the input among them."""
    num_space: int
    num_failed: int
    """Of the space: candidates that did not pass."""
    num_outside: int
    """Questions that the record has no answer to."""
    outside_s: float
    """What they were charged with, within `search_s`."""
    stopped: str
    """Why the search ended, in its own words."""

    @property
    def until_share(self) -> float | None:
        """Of the time that all candidates take."""
        return None if self.until_s is None else self.until_s / self.whole_s

    @property
    def reached(self) -> float:
        """Of the optimum, by the final choice."""
        return self.optimum_ms / self.chosen_ms

    @property
    def passed(self) -> bool:
        """98% of the optimum within 30% of the time, and still so in the end."""
        return self.until_share is not None and self.until_share <= GOAL_SHARE and self.reached >= GOAL_REACHED


def replay(record: Record) -> Replayed:
    """Raises BadInput for a record that was cut short: its optimum is not known."""
    missing = len(record.missing())
    if missing:
        raise BadInput(f"{record.name}: {missing} of {len(record.space())} candidates were not measured", fix="measure them: --resume")
    rows = {tune.key(row.candidate): row for row in record.rows}
    best = min((row for row in record.rows if row.status == Status.OK), key=_ms)
    desk = _Desk(record=record, rows=rows)
    steps, answer = search(record.base, record.spec), None
    spent, until, reached = 0.0, None, float("inf")
    tried: set[str] = set()
    while True:
        try:
            question = next(steps) if answer is None else steps.send(answer)
        except StopIteration as ended:
            found: Search = ended.value
            break
        answer = desk.answer(question)
        spent += answer.seconds
        if isinstance(question, Screen) and isinstance(answer, Screened):
            tried.add(tune.key(question.candidate))
            if answer.status == Status.OK and answer.ms is not None:
                reached = min(reached, answer.ms)
        if until is None and _ms(best) >= GOAL_REACHED * reached:
            until = spent
    assert found.choice is not None
    final = rows[found.choice.key]
    return Replayed(
        whole_s=sum(row.seconds for row in record.rows),
        until_s=until,
        search_s=spent,
        explain_s=desk.explain_s,
        optimum_ms=_ms(best),
        input_ms=_ms(record.rows[0]),
        chosen_ms=_ms(final),
        optimum=best.label,
        chosen=final.label,
        num_screened=len(tried & rows.keys()),
        num_space=len(rows),
        num_failed=sum(row.status != Status.OK for row in record.rows),
        num_outside=desk.num_outside,
        outside_s=desk.outside_s,
        stopped=found.stopped,
    )


@dataclass(slots=True, kw_only=True)
class _Desk:
    """Answers out of the record, and what had to be answered without it."""

    record: Record
    rows: dict[str, Row]
    num_outside: int = 0
    outside_s: float = 0.0
    explain_s: float = 0.0
    references: _References = field(init=False)

    def __post_init__(self) -> None:
        self.references = _References.of(self.record)

    def answer(self, question: Ask) -> Answer:
        if isinstance(question, Screen):
            return self._screened(question)
        if isinstance(question, Explain):
            recorded = self.record.explained
            self.explain_s += recorded.seconds
            if question.candidate == self.record.base:
                return recorded
            return Explained(seconds=recorded.seconds, reason="the record has no trace of it")
        if isinstance(question, Finals):
            return self._finals(question)
        self.num_outside += 1
        return Mended(note="no set of modules to keep is in the record")

    def _screened(self, question: Screen) -> Screened:
        row = self.rows.get(tune.key(question.candidate))
        if row is None:
            seconds = self._usual_s(question.candidate)
            self.num_outside += 1
            self.outside_s += seconds
            return Screened(status=Status.SKIPPED, reason="not in the record", seconds=seconds)
        if question.limit_ms is not None and row.ms is not None and row.ms > question.limit_ms:
            reason = f"{row.ms:.4g} ms, and what may be chosen takes less than {question.limit_ms:.4g} ms: not verified"
            seconds = row.build_s + row.timing_s
            return Screened(status=Status.SKIPPED, reason=reason, ms=row.ms, peak_bytes=row.peak_bytes, seconds=seconds)
        seconds = row.build_s + row.timing_s + self.references.verify_s(row)
        return Screened(status=row.status, reason=row.reason, ms=row.ms, peak_bytes=row.peak_bytes, verified=row.verified, seconds=seconds)

    def _finals(self, question: Finals) -> Finalists:
        base_ms, timed = _ms(self.record.rows[0]), {}
        for candidate in question.candidates:
            row = self.rows[tune.key(candidate)]  # whoever is a finalist was screened with a time, which only the record gives
            ratio = base_ms / _ms(row)
            verdict = "faster" if ratio > 1 else "slower" if ratio < 1 else "same"
            timed[tune.key(candidate)] = Timed(
                status=Status.OK, ms=row.ms, ratio=ratio, low=ratio, high=ratio, verdict=verdict, peak_bytes=row.peak_bytes
            )
        return Finalists(timed=timed)

    def _usual_s(self, candidate: Candidate) -> float:
        same = [row.seconds for row in self.record.rows if str(row.candidate.backend) == str(candidate.backend)]
        return median(same or [row.seconds for row in self.record.rows])


@dataclass(slots=True, kw_only=True)
class _References:
    """Who pays for what candidates are held against."""

    paid: dict[str, float]
    """Key of a row that paid in the record -> seconds of its verification that were for others too."""
    due: dict[str, float]
    """Precision -> those seconds, until somebody pays them in the replay. The first of all, whatever its precision, pays for the reference that all share."""
    reference_s: float

    @classmethod
    def of(cls, record: Record) -> _References:
        """Told from the order of its rows."""
        by: dict[str, list[Row]] = {}
        for row in record.rows:
            if row.verify_s:
                by.setdefault(_precision(row), []).append(row)
        paid, due, reference_s = {}, {}, 0.0
        for number, (precision, rows) in enumerate(by.items()):
            first, *others = rows
            extra = max(0.0, first.verify_s - median(row.verify_s for row in others)) if others else 0.0
            paid[tune.key(first.candidate)] = extra
            if number:
                due[precision] = extra
            else:
                reference_s = extra  # with what its own precision needs besides: it cannot be told apart
        return cls(paid=paid, due=due, reference_s=reference_s)

    def verify_s(self, row: Row) -> float:
        """Of this one in the replay, its turn now."""
        if not row.verify_s:
            return 0.0
        seconds = row.verify_s - self.paid.get(tune.key(row.candidate), 0.0) + self.reference_s + self.due.pop(_precision(row), 0.0)
        self.reference_s = 0.0
        return seconds


def _precision(row: Row) -> str:
    return row.candidate.precision.value if row.candidate.precision is not None else ""


def _ms(row: Row) -> float:
    assert row.ms is not None
    return row.ms
