"""Candidates -> groups that are timed against each other; a group -> its seats, built, verified and timed in blocks that take turns."""

from __future__ import annotations

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
    """Candidates timed against each other: the same sizes, inputs and input mode on the same device. Order is kept."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        key = codec.digest(
            Candidate(
                model=replace(candidate.model, text="", arch=None),
                inputs=candidate.inputs,
                dims=candidate.dims,
                device=candidate.device,
                input_mode=candidate.input_mode,
            )
        )
        groups.setdefault(key, []).append(candidate)
    return list(groups.values())


def bench(
    group: Sequence[Candidate],
    job: Job,
    machines: Sequence[Machine],
    progress: Progress,
    *,
    on_update: Callable[[list[Run]], None],
    afterwards: Callable[[list[Seat]], None] | None = None,
) -> list[Seat]:
    """Build and verify, then time all that are left in interleaved blocks. `afterwards` gets those that ended well while their children still live."""
    jobs = job.bench.build_jobs or 1
    with ExitStack() as stack:
        # Left last: the children are gone by then, so no thread still waits for one.
        builders = stack.enter_context(ThreadPoolExecutor(max_workers=jobs))
        seats: list[Seat] = []

        def prepared(seat: Seat) -> None:
            if jobs > 1 and len(group) > 1:
                seat.run = replace(
                    seat.run, notes=(*seat.run.notes, "built beside other candidates: its compile time and cold start are upper bounds")
                )
            prepare(seat, job)

        building: set[Future[None]] = set()
        for candidate in group:
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
        live = [seat for seat in seats if seat.ok]
        if len(live) == 1:
            live[0].step(lambda s: measured(s, job, machine_of(s.candidate, machines)))
        elif live:
            interleaved(live, job, machines, progress)
        if afterwards is not None:
            afterwards([seat for seat in live if seat.ok])
        return seats


def _some_done(building: set[Future[None]]) -> set[Future[None]]:
    """Wait for one at least; those that still build. What a builder raised is raised here."""
    done, left = wait(building, return_when=FIRST_COMPLETED)
    for one in done:
        one.result()
    return left
