"""Candidates -> groups that are timed against each other; a group -> its seats, built, verified and timed in blocks that take turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace

from gpuopt.core import codec
from gpuopt.core.progress import Progress
from gpuopt.core.result import Run
from gpuopt.core.spec import Candidate, Job
from gpuopt.pipeline.ahead import share_of_cores
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.seats import Seat, interleaved, machine_of, measured, prepare, seated


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
    jobs = job.bench.build_jobs or 1
    with ExitStack() as stack:
        # Left last: the children are gone by then, so no thread still waits for one.
        builders = stack.enter_context(ThreadPoolExecutor(max_workers=jobs))
        seats: list[Seat] = []

        def prepared(seat: Seat) -> None:
            if jobs > 1 and sum(map(len, groups)) > 1:
                seat.run = replace(
                    seat.run, notes=(*seat.run.notes, "built beside other candidates: its compile time and cold start are upper bounds")
                )
            prepare(seat, job)

        building: set[Future[None]] = set()
        for candidate in (candidate for group in groups for candidate in group):
            if len(building) == jobs:
                building = _some_done(building)
                on_update([s.run for s in seats])
            # Children are started here and not by the builders: the kernel ends a child with the thread that started it.
            seat = stack.enter_context(seated(candidate, job, progress, share_of_cores(machine_of(candidate, machines).device, jobs)))
            seats.append(seat)
            building.add(builders.submit(prepared, seat))
        while building:
            building = _some_done(building)
            on_update([s.run for s in seats])
        waiting = iter(seats)
        for group in groups:
            _timed([seat for seat in itertools.islice(waiting, len(group)) if seat.ok], job, machines, progress)
            on_update([s.run for s in seats])
        live = [seat for seat in seats if seat.ok]
        if afterwards is not None:
            afterwards(live)
        return seats


def _timed(live: list[Seat], job: Job, machines: Sequence[Machine], progress: Progress) -> None:
    if len(live) == 1:
        live[0].step(lambda s: measured(s, job, machine_of(s.candidate, machines)))
    elif live:
        interleaved(live, job, machines, progress)


def _some_done(building: set[Future[None]]) -> set[Future[None]]:
    """Wait for one at least; those that still build. What a builder raised is raised here."""
    done, left = wait(building, return_when=FIRST_COMPLETED)
    for one in done:
        one.result()
    return left
