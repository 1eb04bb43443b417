"""Runs + the machine -> Report: with its gates judged, its baseline compared, and what a command noticed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuopt.core.progress import Progress
from gpuopt.core.result import SCHEMA_VERSION, Device, Finding, Report, Run
from gpuopt.core.spec import Job
from gpuopt.core.sweep import Sweep
from gpuopt.pipeline import facts, gates
from gpuopt.reports import diff


def report(job: Job, found: facts.Survey, runs: Sequence[Run] = (), devices: Sequence[Device] = (), sweep: Sweep | None = None) -> Report:
    """What is known so far. `devices`: all of them, where there are several."""
    return Report(
        schema_version=SCHEMA_VERSION,
        command=job.command,
        verb=job.verb,
        environment=found.environment,
        device=found.device,
        devices=tuple(devices) if len(devices) > 1 else (),
        runs=tuple(runs),
        sweep=sweep,
    )


def finish(
    job: Job,
    found: facts.Survey,
    runs: list[Run],
    progress: Progress,
    judged: list[Run] | None = None,
    *,
    devices: Sequence[Device] = (),
    sweep: Sweep | None = None,
) -> Report:
    """`judged`: the runs that gates are about, where others are there for comparison alone."""
    findings = tuple(
        Finding(
            code="guessed-inputs",
            severity="info",
            message=f"{run.model}: inputs are a {run.input_source}",
            fix="--input 'name:dtype[dims]' or --inputs FILE replaces it",
        )
        for run in runs[:1]
        if run.input_source.startswith("guess")
    )
    whole = replace(
        report(job, found, runs, devices, sweep), gates=gates.judge(runs if judged is None else judged, job.gates), findings=findings
    )
    whole = diff.against_baseline(whole, job.gates)
    progress.so_far(whole)
    return whole
