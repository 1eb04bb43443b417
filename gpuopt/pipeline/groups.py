"""Candidates -> groups that are timed against each other; a group -> its seats, built, verified and timed in blocks that take turns."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

from gpuopt.core import codec
from gpuopt.core.progress import Progress
from gpuopt.core.result import Run
from gpuopt.core.spec import Candidate, Job
from gpuopt.pipeline.cores import share_of_cores
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.seats import PASSING, Seat, interleaved, machine_of, measured, prepare, seated


def comparable(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates timed against each other: the same sizes and inputs, which lie in the same memory, on the same device. Order is kept."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        key = codec.digest(
            Candidate(
                model=replace(candidate.model, text="", arch=None),
                inputs=candidate.inputs,
                dims=candidate.dims,
                device=candidate.device,
                input_mode="device" if candidate.input_mode == "device" else "host",  # both ways to begin with inputs in host memory
            )
        )
        groups.setdefault(key, []).append(candidate)
    return list(groups.values())


def waves(groups: Sequence[Sequence[Candidate]], at_once: int) -> list[list[Sequence[Candidate]]]:
    """Groups that are built together, since no more candidates are in them than may build at once. Order is kept."""
    found: list[list[Sequence[Candidate]]] = []
    for group in groups:
        if found and sum(map(len, found[-1])) + len(group) <= at_once:
            found[-1].append(group)
        else:
            found.append([group])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Groups whose candidates live at the same time."""

    groups: Sequence[Sequence[Candidate]]
    job: Job
    machines: Sequence[Machine]
    progress: Progress

    @property
    def candidates(self) -> list[Candidate]:
        """Of all its groups, in order."""
        return [candidate for group in self.groups for candidate in group]


def bench(
    groups: Sequence[Sequence[Candidate]],
    job: Job,
    machines: Sequence[Machine],
    progress: Progress,
    *,
    on_update: Callable[[list[Run]], None],
    afterwards: Callable[[list[Seat]], None] | None = None,
) -> list[Seat]:
    """Build and verify, then time all that are left, group by group, in interleaved blocks. `afterwards` gets those that ended well while their children still live."""
    wave = Wave(groups=groups, job=job, machines=machines, progress=progress)
    with closing(roll([wave], jobs=job.bench.build_jobs or 1, on_update=lambda _, runs: on_update(runs), afterwards=afterwards)) as rolled:
        return next(rolled)


def roll(
    waves: Sequence[Wave],
    *,
    jobs: int,
    ahead: int = 0,
    on_update: Callable[[int, list[Run]], None],
    afterwards: Callable[[list[Seat]], None] | None = None,
) -> Generator[list[Seat]]:
    """Each wave's seats, in order, once they are timed. `jobs` candidates build at once; up to `ahead` of later waves build beside the wave whose turn it is, and stand still
    while that one is timed. One that failed for memory or time beside another wave is built again when its own has its turn."""
    with ExitStack() as stack:
        # Left last: the children are gone by then, so no thread still waits for one.
        builders = stack.enter_context(ThreadPoolExecutor(max_workers=max(1, jobs)))
        sets = [_Built(wave, stack.enter_context(ExitStack()), builders, jobs) for wave in waves]
        for one in sets:
            stack.callback(one.end)
        for index, mine in enumerate(sets):
            later = sets[index + 1 :]
            while not mine.is_ready:
                building = mine.building | set().union(*(other.building for other in later))
                if len(building) < jobs:
                    held = sum(len(other.seats) for other in later)
                    following = next((other for other in later if other.is_waiting), None) if held < ahead else None
                    chosen = mine if mine.is_waiting else following
                    if chosen is not None:
                        chosen.start(beside=chosen is not mine)
                        mine.was_beside |= chosen is not mine
                        continue
                _some_done(building)
                on_update(index, mine.runs)
            if mine.may_owe:  # what is built ahead holds memory of the device, also while it stands still
                for other in later:
                    other.give_back()
            with _still(later):
                mine.build_again()
                waiting = iter(mine.seats)
                for group in mine.wave.groups:
                    live = [seat for seat in itertools.islice(waiting, len(group)) if seat.ok]
                    _timed(live, mine.wave.job, mine.wave.machines, mine.wave.progress)
                    on_update(index, mine.runs)
                if afterwards is not None:
                    afterwards([seat for seat in mine.seats if seat.ok])
            mine.stack.close()
            yield mine.seats


class _Built:
    """A wave's seats on their way: the first of its candidates are started, some of those are built."""

    def __init__(self, wave: Wave, stack: ExitStack, builders: ThreadPoolExecutor, jobs: int) -> None:
        self.wave, self.stack = wave, stack
        self.seats: list[Seat] = []
        self._builders, self._jobs = builders, jobs
        self._left = deque(wave.candidates)
        self._building: set[Future[None]] = set()
        self.was_beside = False
        """Another wave: whatever failed for want of room may do better alone."""

    @property
    def building(self) -> set[Future[None]]:
        """What is not built yet. What a builder raised is raised here."""
        for one in [one for one in self._building if one.done()]:
            self._building.discard(one)
            one.result()
        return set(self._building)

    @property
    def is_waiting(self) -> bool:
        """There are candidates to start."""
        return bool(self._left)

    @property
    def is_ready(self) -> bool:
        """All of them are built, or have failed."""
        return not self._left and not self.building

    @property
    def runs(self) -> list[Run]:
        """As far as they are known."""
        return [seat.run for seat in self.seats]

    def start(self, *, beside: bool) -> None:
        """The next one's child. Children are started here and not by the builders: the kernel ends a child with the thread that started it."""
        self.was_beside |= beside
        candidate = self._left.popleft()
        seat = self._seated(candidate, self._jobs)
        self.seats.append(seat)
        self._building.add(self._builders.submit(self._prepared, seat))

    @property
    def may_owe(self) -> bool:
        """Some of them may have ended because of another wave."""
        return self.was_beside and any(not seat.ok and seat.run.status in PASSING for seat in self.seats)

    def end(self) -> None:
        """No child and no builder is left: in this order, as closing would give the pipes that a builder reads from to others."""
        for seat in self.seats:
            seat.child.kill()
        wait(self._building)
        self._building.clear()
        self.stack.close()

    def give_back(self) -> None:
        """End those that were built ahead: all of them wait for their turn again."""
        self.end()
        self.seats.clear()
        self.was_beside = False
        self._left = deque(self.wave.candidates)

    def build_again(self) -> None:
        """Those that may owe their end to another wave, one after the other."""
        if not self.may_owe:
            return
        for number, seat in enumerate(self.seats):
            if not seat.ok and seat.run.status in PASSING:
                self.seats[number] = again = self._seated(seat.candidate, 1)
                prepare(again, self.wave.job)

    def _seated(self, candidate: Candidate, jobs: int) -> Seat:
        wave = self.wave
        cores = share_of_cores(machine_of(candidate, wave.machines).device, jobs)
        return self.stack.enter_context(seated(candidate, wave.job, wave.progress, cores))

    def _prepared(self, seat: Seat) -> None:
        prepare(seat, self.wave.job)
        if self._jobs > 1 and (self.was_beside or len(self.wave.candidates) > 1):
            note = "built beside other candidates: its compile time and cold start are upper bounds"
            seat.run = replace(seat.run, notes=(note, *seat.run.notes))


@contextmanager
def _still(others: Sequence[_Built]) -> Iterator[None]:
    """What is built ahead stands still inside: nothing else runs on the device that is timed, or on the cores that launch its work."""
    children = [seat.child for other in others for seat in other.seats]
    try:
        for child in children:
            child.pause()
        yield
    finally:
        for child in children:
            child.resume()


def _timed(live: list[Seat], job: Job, machines: Sequence[Machine], progress: Progress) -> None:
    if len(live) == 1:
        live[0].step(lambda s: measured(s, job, machine_of(s.candidate, machines)))
    elif live:
        interleaved(live, job, machines, progress)


def _some_done(building: set[Future[None]]) -> None:
    """Wait for one at least."""
    wait(building, return_when=FIRST_COMPLETED)
