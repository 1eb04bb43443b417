"""Job -> Report, one function a command. The parent's side: no model is opened here, every candidate lives in a child."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from gpuopt.bundles import write as bundle_writer
from gpuopt.core import codec
from gpuopt.core.errors import UsageError
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import SCHEMA_VERSION, Finding, Report, Run, Status
from gpuopt.core.spec import BackendSpec, Candidate, EvalSpec, Job, Transforms
from gpuopt.pipeline import facts, generation, groups, isolate, outputs, reporting, sweep
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.reporting import finish
from gpuopt.pipeline.seats import Seat, built, diagnose, interleaved, loaded, measured, prepare, profiled, raise_if_failed, seated


def device(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt device`: what this machine is and what it can do."""
    progress = progress or Silent()
    found = machines.survey(job, progress)
    return reporting.report(job, found)


def backends(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt backends [MODEL]`: the matrix of forms and backends, each cell that cannot be with its reason."""
    progress = progress or Silent()
    candidate = job.candidates[0] if job.candidates else None
    with isolate.Child() as child:
        progress.start("matrix", "asking the backends")
        try:
            found = child.call(
                "matrix",
                facts.Matrix,
                timeout_s=machines.SURVEY_TIMEOUT_S,
                device_id=candidate.device if candidate else job.device or "auto",
                candidate=candidate if candidate is not None and candidate.model.text else None,
            )
        except ChildFailed as failure:
            raise machines.told(failure, "asking the backends") from failure
        progress.done("matrix")
    report = Report(schema_version=SCHEMA_VERSION, command=job.command, verb=job.verb, environment=found.environment, device=found.device)
    return replace(report, tables={"matrix": [codec.dump(cell) for cell in found.cells], "form": found.form, "model": found.model})


@isolate.forks
def profile(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt profile MODEL`: where the time goes and how far that is from the roofline."""
    progress = progress or Silent()
    candidate = only(job)
    job = as_is(job, candidate)
    machine = machines.surveyed(job, progress)
    with seated(candidate, job, progress) as seat:
        prepare(seat, job, traced=True)
        seat.step(lambda s: measured(s, job, machine))
        seat.step(lambda s: machine.judged(lambda device: profiled(s, job, device)))
        found = diagnose(seat, job, machine) if seat.ok else ()
    raise_if_failed(seat)
    report = finish(job, machine.found, [seat.run], progress)
    return replace(report, findings=(*found, *report.findings))


@isolate.forks
def bench(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt bench MODEL…`: verified times over backends, precisions and batches, interleaved where they are compared."""
    progress = progress or Silent()
    if not job.candidates:
        raise UsageError("nothing to bench", fix="gpuopt bench MODEL")
    if job.generate is not None:
        return generation.bench(job, progress)
    if job.gates.baseline is not None:
        codec.read_json(Report, Path(job.gates.baseline))  # before hours of measuring, not after
    job, found = machines.all_surveyed(job, progress)
    if len(found) > 1:
        return sweep.bench(job, progress, found)
    (machine,) = found
    together = groups.waves(groups.comparable(job.candidates), job.bench.build_jobs or 1)
    waves = [groups.Wave(groups=wave, job=job, machines=[machine], progress=progress) for wave in together]
    seats: list[Seat] = []

    def so_far(_: int, runs: list[Run]) -> None:
        progress.so_far(reporting.report(job, machine.found, [*(seat.run for seat in seats), *runs]))

    with closing(groups.roll(waves, jobs=job.bench.build_jobs or 1, on_update=so_far)) as rolled:
        for finished in rolled:
            seats += finished
            so_far(0, [])
    _raise_if_all_failed_alike(seats)
    return finish(job, machine.found, [seat.run for seat in seats], progress)


@isolate.forks
def bench_all(
    jobs: Sequence[Job], progress: Progress | None = None, *, on_report: Callable[[int, Report, bool], None] | None = None
) -> list[Report]:
    """`gpuopt run A.yaml B.yaml …`: each job's report, as `bench` would give it. The machine is looked at once, and while one job's candidates are timed those of the next,
    built in the meantime, stand still. `on_report` gets a job's number and report whenever more of it is known, and whether that is all. Raises UsageError for jobs that cannot be done so."""
    progress = progress or Silent()
    on_report = on_report or (lambda number, report, is_whole: None)
    if not jobs:
        raise UsageError("nothing to bench", fix="gpuopt run RECIPE…")
    first = jobs[0]
    for job in jobs:
        if job.gates.baseline is not None:
            codec.read_json(Report, Path(job.gates.baseline))  # before hours of measuring, not after
        if job.verb != "bench" or job.generate is not None or not job.candidates:
            what = "generates" if job.verb == "bench" and job.generate is not None else f"is of the verb {job.verb}"
            raise UsageError(f"one of the recipes {what}, and no bench of single calls", fix="run it alone")
        if len({candidate.device for one in (first, job) for candidate in one.candidates}) > 1:
            raise UsageError("recipes that are run together are timed on one device", fix="--device cuda")
    _, (machine,) = machines.all_surveyed(first, progress)
    # Its own limits stay each job's; figures that beat the ceilings measure them again for all that follow.
    placed = [replace(job, candidates=tuple(replace(c, device=machine.device.id) for c in job.candidates)) for job in jobs]
    waves, owners = [], []
    for number, job in enumerate(placed):
        together = groups.waves(groups.comparable(job.candidates), max(job.bench.build_jobs or 1, 1))
        waves += [groups.Wave(groups=wave, job=job, machines=[machine], progress=progress) for wave in together]
        owners += [number] * len(together)
    seats: list[list[Seat]] = [[] for _ in placed]

    def so_far(wave: int, runs: list[Run]) -> None:
        number = owners[wave]
        on_report(number, reporting.report(placed[number], machine.found, [*(seat.run for seat in seats[number]), *runs]), False)

    at_once = max(job.bench.build_jobs or 1 for job in placed)
    done: dict[int, Report] = {}
    rolled = groups.roll(waves, jobs=at_once, ahead=2 * at_once if machine.device.kind != "cpu" else 0, on_update=so_far)
    with closing(rolled):
        for wave, finished in enumerate(rolled):
            number = owners[wave]
            seats[number] += finished
            if number not in owners[wave + 1 :]:
                done[number] = finish(placed[number], machine.found, [seat.run for seat in seats[number]], Silent())
                on_report(number, done[number], True)
    return [done[number] for number in range(len(placed))]


def _raise_if_all_failed_alike(seats: Sequence[Seat]) -> None:
    """Where nothing ran and the reason is one and the same, it is the command's."""
    errors = [seat.error for seat in seats if seat.error is not None]
    if all(seat.run.status is not Status.OK for seat in seats) and errors and len(errors) == len(seats):
        if len({(type(e), e.message) for e in errors}) == 1:
            raise errors[0]


@isolate.forks
def compile(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt compile MODEL --backend B -o DIR`: build, verify, measure against the model as it is, write a bundle."""
    progress = progress or Silent()
    candidate = only(job)
    if job.output is None:
        raise UsageError("compile writes a bundle", fix="-o FOLDER")
    target = Path(job.output)
    bundle_writer.check_target(target, force=job.force, source=outputs.source_of(candidate))
    machine = (
        Machine(job=job, progress=progress, survey=machines.survey(job, progress, ceilings=False))
        if job.build_only
        else machines.surveyed(job, progress)
    )
    baseline = replace(candidate, backend=BackendSpec(), precision=None, transforms=Transforms(), evaluation=EvalSpec())
    runs: list[Run] = []
    with ExitStack() as stack:
        seat = stack.enter_context(seated(candidate, job, progress))
        prepare(seat, job, build_only=job.build_only)
        if not seat.ok:
            raise_if_failed(seat)
            return finish(job, machine.found, [seat.run], progress)
        runs = [seat.run]
        if not job.build_only:
            runs = _against_eager(seat, baseline, job, machine, progress, stack)
        if seat.ok:
            outputs.write_bundle(seat, job, target, progress)
            runs[-1] = seat.run
    raise_if_failed(seat)
    # Without a bundle the command has failed, however well eager ran beside it.
    report = finish(job, machine.found, runs if seat.ok else [seat.run], progress, judged=[seat.run])
    slower = seat.run.relative is not None and seat.run.relative.verdict == "slower"
    findings = report.findings
    if slower:
        findings = (
            *findings,
            Finding(
                code="slower-than-eager",
                severity="warning",
                message=f"{candidate.backend} is slower than the model as it is: {seat.run.relative.ratio:.2f}×"
                if seat.run.relative
                else "",
                fix="keep eager, or try another backend: gpuopt bench MODEL --backend eager --backend …",
            ),
        )
    return replace(report, output=target.name if seat.ok else None, findings=findings)


def _against_eager(seat: Seat, baseline: Candidate, job: Job, machine: Machine, progress: Progress, stack: ExitStack) -> list[Run]:
    """Time the candidate beside the model as it came. A model whose own form cannot run is timed alone."""
    other = stack.enter_context(seated(baseline, job, progress))
    other.step(loaded)
    other.step(built)
    if not other.ok:
        seat.run = replace(seat.run, notes=(*seat.run.notes, f"not compared with eager: {other.run.reason}"))
        seat.step(lambda s: measured(s, job, machine))
        return [seat.run]
    interleaved([other, seat], job, [machine], progress)
    return [other.run, seat.run]


def convert(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt convert MODEL --precision … --to … -o FILE`: change the model, verify the change, write the file."""
    progress = progress or Silent()
    candidate = only(job)
    if job.output is None:
        raise UsageError("convert writes a file", fix="-o FILE")
    target = Path(job.output)
    kind = outputs.kind_of(target, job.to)
    outputs.check_file_target(target, force=job.force, source=outputs.source_of(candidate))
    found = machines.survey(job, progress, ceilings=False)
    with seated(candidate, job, progress) as seat:
        prepare(seat, job)
        if seat.ok:
            outputs.write_file(seat, job, target, kind)
    raise_if_failed(seat)
    report = finish(job, found, [seat.run], progress)
    return replace(report, output=target.name if seat.ok else None)


def only(job: Job) -> Candidate:
    if len(job.candidates) != 1:
        raise UsageError(f"{job.verb} takes one model, backend, precision and batch", fix="gpuopt bench compares several")
    return job.candidates[0]


def as_is(job: Job, candidate: Candidate) -> Job:
    """Without verification where nothing is changed: there is nothing to verify, and nobody should wait for an fp64 forward of the model as it is."""
    is_plain = candidate.backend.name == "eager" and candidate.precision is None and candidate.transforms == Transforms()
    return replace(job, bench=replace(job.bench, verify="off")) if is_plain else job
