"""A program's words, or a trace's file -> what `show.run` does: both are explained beside this machine's ceilings, and neither is a candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gpuopt.core import units
from gpuopt.core.progress import Progress
from gpuopt.core.result import Device, Report
from gpuopt.core.spec import Job

Act = Callable[[Job, Progress], Report]


def trace(file: str, *, limit: str | None = None, max_events: int | None = None) -> Act:
    """`--trace FILE`. `limit`, `max_events`: None for those of `profiling.foreign`."""
    max_bytes = units.parse_bytes(limit) if limit is not None else None

    def act(job: Job, progress: Progress) -> Report:
        from gpuopt.profiling import foreign

        # Read before anything else, torch included: a file that is none is told at once.
        progress.start("trace", f"reading {Path(file).name}")
        with foreign.uncollected():
            found = foreign.read_foreign(
                Path(file),
                max_bytes=foreign.MAX_BYTES if max_bytes is None else max_bytes,
                max_events=foreign.MAX_EVENTS if max_events is None else max_events,
            )
            progress.done("trace")
            from gpuopt.pipeline import elsewhere

            here = elsewhere.same_here(found.device, job, progress)
            report = elsewhere.explained(found, Path(file), here, command=job.command, ignore=job.ignore)
        return replace(report, verb=job.verb)

    return act


def program(words: Sequence[str], *, timeout: str | None, save_inputs: str | None, traced: bool) -> Act:
    """`-- python SCRIPT ARGS`. Its own output goes where it would."""
    timeout_s = units.parse_seconds(timeout) if timeout is not None else None

    def act(job: Job, progress: Progress) -> Report:
        from gpuopt.pipeline import scripts

        scripts.parse(words)  # a wrong command line is told before ceilings are measured
        here = _here(job, progress)
        report = scripts.run(
            words,
            timeout_s,
            here=here,
            traced=traced,
            save_inputs=Path(save_inputs) if save_inputs else None,
            command=job.command,
            ignore=job.ignore,
        )
        return replace(report, verb=job.verb)

    return act


def _here(job: Job, progress: Progress) -> Device:
    from gpuopt.pipeline import machine

    return machine.survey(job, progress).device
