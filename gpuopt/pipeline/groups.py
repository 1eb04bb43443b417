"""Candidates -> groups that are timed against each other; a group -> its seats, built, verified and timed in blocks that take turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from gpuopt.core import codec
from gpuopt.core.progress import Progress
from gpuopt.core.result import Device, Run
from gpuopt.core.spec import Candidate, Job
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
    with ExitStack() as stack:
        # Left last: the children are gone by then, so no thread still waits for one.
        builders = stack.enter_context(ThreadPoolExecutor(max_workers=max(1, job.bench.build_jobs)))
        seats: list[Seat] = []

        def prepared(seat: Seat) -> None:
            if job.bench.build_jobs > 1 and len(group) > 1:
                seat.run = replace(
                    seat.run, notes=(*seat.run.notes, "built beside other candidates: its compile time and cold start are upper bounds")
                )
            prepare(seat, job)

        for wave in range(0, len(group), max(1, job.bench.build_jobs)):
            # Children are started here, a wave at a time: the kernel ends a child with the thread that started it.
            started = [
                stack.enter_context(seated(candidate, job, progress, fewer_threads(machine_of(candidate, machines).device, job)))
                for candidate in group[wave : wave + max(1, job.bench.build_jobs)]
            ]
            seats += started
            for done in [builders.submit(prepared, seat) for seat in started]:
                done.result()
                on_update([s.run for s in seats])
        live = [seat for seat in seats if seat.ok]
        if len(live) == 1:
            live[0].step(lambda s: measured(s, job, machine_of(s.candidate, machines)))
        elif live:
            interleaved(live, job, machines, progress)
        if afterwards is not None:
            afterwards([seat for seat in live if seat.ok])
        return seats


def fewer_threads(device: Device, job: Job) -> dict[str, str]:
    """Their share of the cores for candidates of a GPU that are built at once: eight processes with a thread a core each took five times as long as one after the other.

    A CPU's candidates keep them all: they are what is timed.
    """
    if job.bench.build_jobs < 2 or device.kind == "cpu" or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // job.bench.build_jobs))}
