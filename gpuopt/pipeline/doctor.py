"""Job -> Report of findings: a model that runs is profiled first, one that does not is diagnosed all the same; --fix makes the safe changes and measures them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from gpuopt.core import codec
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import Finding, GateResult, Report, Run
from gpuopt.core.spec import Candidate, Change, Job
from gpuopt.pipeline import facts, isolate, jobs, reporting
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.seats import Seat, built, diagnose, interleaved, loaded, prepare, probed, profiled, seated, verified
from gpuopt.pipeline.seats import measured as timed

SEVERITIES = ("error", "warning", "info")
"""From the worst down; `fail_on` names the mildest that fails."""


@isolate.forks
def doctor(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt doctor [MODEL]`: what breaks or slows it, priced, with the exact change; without a model, the machine."""
    progress = progress or Silent()
    if not job.candidates:
        return _of_machine(job, progress)
    candidate = jobs.only(job)
    asked, job = job, jobs.as_is(job, candidate)
    machine = machines.surveyed(job, progress)
    with seated(candidate, job, progress) as seat:
        found = _diagnosed(seat, job, machine)
        if seat.ok:
            progress.update(seat.key, None, "done")
    runs = [seat.run]
    if seat.error is not None and not any(f.severity == "error" for f in found):
        raise seat.error
    if job.fix and seat.ok:
        found, more = _fixed(asked, machine, candidate, seat.run, found, progress)
        runs = more or runs
    report = reporting.finish(job, machine.found, runs, progress)
    report = replace(report, findings=(*found, *(f for f in report.findings if f.code == "guessed-inputs")))
    return replace(report, gates=(*report.gates, *_judged(found, job.fail_on)))


def _of_machine(job: Job, progress: Progress) -> Report:
    found = machines.survey(job, progress, ceilings=False)
    with isolate.Child() as child:
        told = child.call(
            "diagnose", facts.Diagnosed, timeout_s=machines.SURVEY_TIMEOUT_S, device=found.device, ignore=list(job.ignore)
        ).findings
    report = reporting.finish(job, found, [], progress)
    return replace(report, findings=told, gates=_judged(told, job.fail_on))


def _diagnosed(seat: Seat, job: Job, machine: Machine) -> tuple[Finding, ...]:
    """Load, build, time, trace, then ask the rules; where the build or the first call fails, ask them about that."""
    seat.step(loaded)
    if not seat.ok:
        return ()
    try:
        seat.run = built(seat)
    except ChildFailed as failure:
        seat.fail(failure)
        return diagnose(seat, job, machine) if seat.child.alive else ()
    if job.bench.verify != "off":
        seat.step(lambda s: verified(s, job))
    seat.step(lambda s: timed(s, job, machine))
    seat.step(lambda s: probed(s, machine))
    seat.step(lambda s: machine.judged(lambda device: profiled(s, job, device)))
    return diagnose(seat, job, machine) if seat.child.alive else ()


def _fixed(
    job: Job, machine: Machine, candidate: Candidate, run: Run, found: tuple[Finding, ...], progress: Progress
) -> tuple[tuple[Finding, ...], list[Run]]:
    """Each change alone and all of them together, built, verified and timed in interleaved blocks with the model as it is; predicted beside measured."""
    wanted = [f for f in found if f.change is not None and (f.safe or job.unsafe_fixes)]
    changes = list({codec.digest(f.change): f.change for f in wanted if f.change is not None}.values())
    if not changes:
        return found, [replace(run, notes=(*run.notes, _nothing_to_fix(found)))]
    tried = [change.applied(candidate) for change in changes]
    together = _together(candidate, changes)
    if len(changes) > 1 and together not in tried:
        tried.append(together)
    with ExitStack() as stack:
        seats = []
        for one in (candidate, *tried):
            seat = stack.enter_context(seated(one, job, progress))
            prepare(seat, replace(jobs.as_is(job, one), verb="bench"))
            seats.append(seat)
        live = [seat for seat in seats if seat.ok]
        if len(live) > 1:
            interleaved(live, job, [machine], progress)
    base = seats[0]
    if not base.ok or not base.sampled.samples_ns:
        return found, [seat.run for seat in seats]
    before_ms = median(base.sampled.samples_ns) / 1e6
    gains = {
        codec.digest(change): (
            before_ms - median(seat.sampled.samples_ns) / 1e6,
            seat.run.relative is not None and seat.run.relative.verdict != "inconclusive",
        )
        for change, seat in zip(changes, seats[1:])
        if seat.ok and seat.sampled.samples_ns
    }
    told = []
    for finding in found:
        gain_ms, decided = gains.get(codec.digest(finding.change), (None, False)) if finding.change is not None else (None, False)
        told.append(measured(finding, gain_ms, decided=decided))
    return tuple(told), [seat.run for seat in seats]


def _nothing_to_fix(found: Iterable[Finding]) -> str:
    """Why --fix changed nothing: somebody asked for it, and silence would read as done."""
    held = sum(f.change is not None for f in found)
    if not held:
        return "--fix changed nothing: no finding here is a change that gpuopt makes by itself"
    return f"--fix changed nothing: {held} of the findings may alter results, and --unsafe-fixes lets it make them"


def _together(candidate: Candidate, changes: Iterable[Change]) -> Candidate:
    """All changes in order; of two that disagree the later stands."""
    for change in changes:
        candidate = change.applied(candidate)
    return candidate


def measured(finding: Finding, gain_ms: float | None, *, decided: bool = True) -> Finding:
    """With what its change gave back, and whether that was predicted; where the pairs could not decide, neither yes nor no."""
    if gain_ms is None:
        return finding
    low, high = finding.gain_low_ms, finding.gain_high_ms
    known = decided and low is not None and high is not None
    return replace(finding, measured_gain_ms=gain_ms, confirmed=(low or 0.0) <= gain_ms <= (high or 0.0) if known else None)


def _judged(found: Iterable[Finding], fail_on: str | None) -> tuple[GateResult, ...]:
    """A gate over the findings, where one was asked for."""
    if fail_on is None:
        return ()
    failing = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    counts = {severity: sum(f.severity == severity for f in found) for severity in failing}
    figure = ", ".join(f"{number} {severity}" for severity, number in counts.items() if number) or "none"
    return (GateResult(name="fail-on", passed=not any(counts.values()), figure=figure, limit=f"none of {', '.join(failing)}"),)
