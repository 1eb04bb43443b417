"""A candidate -> the child that holds it, loaded and built; and what is known so far of every candidate of a search.

A few of the best stay alive between screening and the finals; the others are built again if they are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from gpuopt.core.errors import GpuoptError
from gpuopt.core.progress import Progress
from gpuopt.core.result import Run, Status
from gpuopt.core.search import Screened
from gpuopt.core.spec import Candidate, Job
from gpuopt.pipeline import isolate, seats
from gpuopt.pipeline.cores import share_of_cores
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.ahead import Ahead, jobs_of_search
from gpuopt.pipeline.search.questions import Answer, Ask, Finalists, Finals, Screen
from gpuopt.pipeline.seats import Seat, built, loaded, verified

MEMORY_SHARE = 0.6
"""Of the device's memory that candidates waiting for the finals may hold together."""


@dataclass(slots=True)
class Member:
    """A seat whose child waits for the finals."""

    seat: Seat
    stack: ExitStack
    verify: str = ""
    """How far it was verified: `precision`, `full`, or not at all."""
    cost_ms: float = 0.0


@dataclass(slots=True)
class Crew:
    """The children of a search, and what they found."""

    job: Job
    machine: Machine
    base: Candidate
    progress: Progress
    hire: seats.Hire | None = None
    """Makes a worker; None: a process."""
    known: dict[str, Candidate] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    """Key -> the last that is known of each candidate."""
    alive: dict[str, Member] = field(default_factory=dict)
    failures: dict[str, GpuoptError] = field(default_factory=dict)
    ahead: Ahead = field(init=False)
    costs: dict[str, float] = field(default_factory=dict)
    """Key -> milliseconds, a sample where throughput is wanted, of those that passed so far; also of those that a journal told of."""

    def __post_init__(self) -> None:
        self.ahead = Ahead(seated=self._seated, build=_build)

    @property
    def jobs(self) -> int:
        """How many of them build at once."""
        return jobs_of_search(self.job.bench, self.machine.device)

    # -- what is known --------------------------------------------------------------------------------------------------------

    def learn(self, question: Ask) -> None:
        """Who is asked about: an answer out of a journal names candidates by their keys alone."""
        for candidate in question.candidates if isinstance(question, Finals) else (question.candidate,):
            self.known[tune.key(candidate)] = candidate

    def keep(self, runs: Mapping[str, Run]) -> None:
        """The last that is known of each; where its time goes stays from when it was traced."""
        for key, run in runs.items():
            before = self.runs.get(key)
            if before is not None and run.waterfall is None and before.waterfall is not None:
                run = replace(
                    run,
                    waterfall=before.waterfall,
                    roofline=before.roofline,
                    modules=before.modules,
                    bounds=before.bounds,
                    useful=before.useful,
                )
            self.runs[key] = run

    def hear(self, question: Ask, answer: Answer) -> None:
        """Who may still be written where the search is interrupted."""
        if isinstance(question, Screen) and isinstance(answer, Screened) and answer.status == Status.OK and answer.ms is not None:
            over = self.job.search.over(answer.ms, answer.peak_bytes)
            if question.candidate == self.base or (not over and answer.verified):
                self.costs[tune.key(question.candidate)] = answer.ms / self.share(question.candidate)
        if isinstance(answer, Finalists):
            for key, timed in answer.timed.items():
                if timed.status != Status.OK:
                    self.costs.pop(key, None)

    def share(self, candidate: Candidate) -> int:
        """Samples among which the time of a call is divided: 1 where its latency is what counts."""
        return tune.share(candidate, self.job.search.goal)

    def raise_if_base_failed(self) -> None:
        """The input is what everything is held against: where it cannot run, its own error is the command's."""
        key = tune.key(self.base)
        run, error = self.runs.get(key), self.failures.get(key)
        if error is not None and run is not None and run.status is not Status.OK:
            raise error

    # -- who is alive ---------------------------------------------------------------------------------------------------------

    def seat(self, candidate: Candidate) -> Member:
        """A child with this candidate loaded and built; the one that waits, where one does."""
        key = tune.key(candidate)
        if key in self.alive and self.alive[key].seat.child.alive:
            return self.alive[key]
        found = self.ahead.take(key)
        if found is not None:
            seat, stack = found
            self.alive[key] = Member(seat=seat, stack=stack)
            return self.alive[key]
        stack = ExitStack()
        try:
            seat = self._seated(candidate, stack)
            self.alive[key] = Member(seat=seat, stack=stack)
            _build(seat)
        except BaseException:
            self.alive.pop(key, None)
            stack.close()
            raise
        return self.alive[key]

    def expect(self, candidates: Sequence[Candidate]) -> None:
        """Who will be asked for next, the likeliest first: their children begin to build. A worker of the caller's own process builds when it is asked."""
        if self.hire is None and self.jobs > 1:
            self.ahead.expect(candidates, known=self.alive, most=min(self.jobs, self._room()))

    def _room(self) -> int:
        """How many more the device's memory holds, as large as the input and as much again for the work of building."""
        memory, peak = self.machine.device.memory_bytes, getattr(self.runs.get(tune.key(self.base)), "peak_bytes", None)
        if not memory or not peak:
            return 1
        held = sum(member.seat.run.peak_bytes or 0 for member in self.alive.values())
        return max(0, int((MEMORY_SHARE * memory - held) / (2 * peak)))

    def _seated(self, candidate: Candidate, stack: ExitStack) -> Seat:
        job = replace(self.job, candidates=(candidate,))
        environment = share_of_cores(self.machine.device, self.jobs)
        return stack.enter_context(seats.seated(candidate, job, self.progress, environment, hire=self.hire))

    def prove(self, member: Member, verify: str) -> None:
        """Verify it this far, where it was not yet: a child that was built again, and the input itself, were verified not at all."""
        if verify != "off" and member.verify != verify:
            job = replace(self.job, bench=replace(self.job.bench, verify=verify))
            member.seat.step(lambda s: verified(s, job))
            member.verify = verify

    def make_room(self) -> None:
        """Keep the cheapest few, by count and by the memory of the device."""
        ranked = sorted(self.alive, key=lambda k: self.alive[k].cost_ms)
        limit = MEMORY_SHARE * (self.machine.device.memory_bytes or 0)
        held = 0.0
        for number, key in enumerate(ranked):
            held += self.alive[key].seat.run.peak_bytes or 0
            if number >= self.job.search.finalists or (limit and held > limit and number):
                self.dismiss(key)

    def dismiss(self, key: str) -> None:
        """End its child. Harmless twice."""
        member = self.alive.pop(key, None)
        if member is not None:
            member.stack.close()

    def helper(self) -> AbstractContextManager[seats.Worker]:
        """One more worker, that holds no candidate."""
        return isolate.Child() if self.hire is None else self.hire()


@contextmanager
def gathered(crew: Crew) -> Iterator[Crew]:
    """Nobody is left behind, however the search ends."""
    try:
        yield crew
    finally:
        crew.ahead.close()
        for key in list(crew.alive):
            crew.dismiss(key)


def _build(seat: Seat) -> None:
    seat.step(lambda s: loaded(s, "optimize"))
    seat.step(built)
