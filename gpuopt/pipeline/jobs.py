"""Job -> Report, one function a command. The parent's side: no model is opened here, every candidate lives in a child."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

from gpuopt.bundles import write as bundle_writer
from gpuopt.bundles.manifest import require_output_name
from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, ResourceError, Unavailable, Unsupported, UsageError
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import SCHEMA_VERSION, Ceiling, Count, Device, Finding, Report, Run, Samples, Status
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, Job, Transforms
from gpuopt.core.stats import MIN_PAIRS
from gpuopt.pipeline import anchor, facts, figures, gates, manifests, pairs
from gpuopt.pipeline.isolate import Child, ChildFailed
from gpuopt.profiling.roofline import ImpossibleFigure
from gpuopt.reports import diff
from gpuopt.trust import consent

T = TypeVar("T")

SURVEY_TIMEOUT_S = 300.0
MIN_ANCHOR_BLOCKS = 3
"""Fewer blocks of products say nothing about what a device keeps up."""


@dataclass(slots=True)
class Machine:
    """What the survey found, and a second look when a figure contradicts it."""

    job: Job
    progress: Progress
    survey: facts.Survey
    is_fresh: bool = False
    sustained: dict[str, Ceiling] = field(default_factory=dict)
    """What products kept up between the blocks of the last group."""

    @property
    def device(self) -> Device:
        """The device with the ceilings that hold now."""
        return self.found.device

    @property
    def found(self) -> facts.Survey:
        """The survey with what was measured since."""
        device = self.survey.device
        rows = (*device.ceilings.rows, *self.sustained.values())
        return replace(self.survey, device=replace(device, ceilings=replace(device.ceilings, rows=rows)))

    def judged(self, work: Callable[[Device], T]) -> T:
        """`work` against the ceilings; where a figure lies above the measured ones, against ceilings measured again: the old ones may have been
        taken while the machine was busy. Raises ImpossibleFigure or ChildFailed when it does so even then."""
        try:
            return work(self.device)
        except ImpossibleFigure:
            if self.is_fresh:
                raise
        except ChildFailed as failure:
            if self.is_fresh or "ImpossibleFigure" not in failure.reason:
                raise
        self._measure_again()
        try:
            return work(self.device)
        except (ImpossibleFigure, ChildFailed) as error:
            if self.device.kind != "cpu" or (isinstance(error, ChildFailed) and "ImpossibleFigure" not in error.reason):
                raise
            # Nothing vouches for a CPU's ceilings but this measurement: others use its cores, and no data sheet is kept.
            raise ResourceError(
                f"this machine is too busy to be measured: {str(error).splitlines()[0][:300]}",
                fix="stop what else runs on it, and try again",
            ) from error

    def keep(self, sustained: dict[str, Ceiling]) -> None:
        """These sustained ceilings hold from now on. Products that beat the measured one show that it was taken on a busy machine."""
        self.sustained = sustained
        beaten = [
            row
            for row in sustained.values()
            if (peak := self.survey.device.ceilings.flops(row.quantity, "measured")) and row.value > peak * (1 + figures.slack(self.device))
        ]
        if beaten and not self.is_fresh:
            self._measure_again()

    def _measure_again(self) -> None:
        self.progress.warn("a figure lies above the measured ceilings: measuring them again")
        self.survey, self.is_fresh = survey(replace(self.job, refresh=True), self.progress), True


@dataclass(slots=True)
class Seat:
    """A candidate, its child, and its run so far."""

    candidate: Candidate
    child: Child
    run: Run
    progress: Progress
    spec: BenchSpec
    key: str
    keeps_inaccurate: bool = False
    """A failed verification does not end it (--allow-inaccurate): the verdict becomes a note."""
    error: GpuoptError | None = None
    sampled: Samples = field(default_factory=Samples)
    count: Count | None = None

    @property
    def ok(self) -> bool:
        """Whether it is still in the race."""
        return self.run.status is Status.OK

    def ask(self, verb: str, result: type[T], **arguments: object) -> T:
        """One step in the child, with its progress shown."""

        def show(fraction: float | None, note: str) -> None:
            self.progress.update(self.key, fraction, note)

        return self.child.call(verb, result, timeout_s=self.spec.timeout_s, on_progress=show, **arguments)

    def step(self, work: Callable[[Seat], Run]) -> None:
        """Do one step if it is still in the race; a failure becomes its result."""
        if not self.ok:
            return
        try:
            self.run = work(self)
        except ChildFailed as failure:
            self.fail(failure)
        except ResourceError as error:
            self.error = error
            self.run = figures.failed(self.run, Status.SKIPPED, error.message, error.fix)
        except ImpossibleFigure as error:
            self.run = figures.failed(self.run, Status.BUG, str(error), "report this: a figure above the data sheet is an error of gpuopt")
        if self.keeps_inaccurate and self.error is None and self.run.status in (Status.ACCURACY_FAIL, Status.NAN):
            self.progress.warn(f"kept although it failed verification (--allow-inaccurate): {self.run.reason}")
            notes = (*self.run.notes, f"failed verification: {self.run.reason}")
            self.run = replace(self.run, status=Status.OK, notes=notes, reason="", fix="")
        if not self.ok:
            self.progress.done(self.key, f"{self.run.status}: {self.run.reason}")
            self.child.close()

    def fail(self, failure: ChildFailed) -> None:
        """Record how the child's step ended."""
        self.error = failure.error
        self.run = figures.failed(self.run, failure.status, failure.reason, failure.fix)
        if failure.traceback:
            self.run = replace(self.run, notes=(*self.run.notes, failure.traceback[-2000:]))


@contextmanager
def seated(candidate: Candidate, job: Job, progress: Progress, environment: Mapping[str, str] | None = None) -> Iterator[Seat]:
    """A child for this candidate, ended on the way out whatever happens."""
    run = figures.started(candidate)
    with Child(environment=environment) as child:
        key = f"{gates.label(run)}#{child.pid}"  # the same candidate may be named twice
        progress.start(key, gates.label(run))
        yield Seat(
            candidate=candidate, child=child, run=run, progress=progress, spec=job.bench, key=key, keeps_inaccurate=job.allow_inaccurate
        )
        progress.done(key)


def _fewer_threads(device: Device, job: Job) -> dict[str, str]:
    """Their share of the cores for candidates of a GPU that are built at once: eight processes with a thread a core each took five times as long as one after the other.

    A CPU's candidates keep them all: they are what is timed.
    """
    if job.bench.build_jobs < 2 or device.kind == "cpu" or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // job.bench.build_jobs))}


def device(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt device`: what this machine is and what it can do."""
    progress = progress or Silent()
    found = survey(job, progress)
    return _report(job, found)


def backends(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt backends [MODEL]`: the matrix of forms and backends, each cell that cannot be with its reason."""
    progress = progress or Silent()
    candidate = job.candidates[0] if job.candidates else None
    with Child() as child:
        progress.start("matrix", "asking the backends")
        try:
            found = child.call(
                "matrix",
                facts.Matrix,
                timeout_s=SURVEY_TIMEOUT_S,
                device_id=candidate.device if candidate else job.device or "auto",
                candidate=candidate if candidate is not None and candidate.model.text else None,
            )
        except ChildFailed as failure:
            raise _told(failure, "asking the backends") from failure
        progress.done("matrix")
    report = Report(schema_version=SCHEMA_VERSION, command=job.command, verb=job.verb, environment=found.environment, device=found.device)
    return replace(report, tables={"matrix": [codec.dump(cell) for cell in found.cells], "form": found.form, "model": found.model})


def profile(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt profile MODEL`: where the time goes and how far that is from the roofline."""
    progress = progress or Silent()
    candidate = only(job)
    if candidate.backend.name == "eager" and candidate.precision is None and candidate.transforms == Transforms():
        # Nothing is changed, so there is nothing to verify: a profile should not wait for an fp64 forward of the model as it is.
        job = replace(job, bench=replace(job.bench, verify="off"))
    machine = surveyed(job, progress)
    with seated(candidate, job, progress) as seat:
        prepare(seat, job, traced=True)
        seat.step(lambda s: measured(s, job, machine))
        seat.step(lambda s: machine.judged(lambda device: profiled(s, job, device)))
        found = seat.ask("diagnose", facts.Diagnosed, device=machine.device, ignore=list(job.ignore)).findings if seat.ok else ()
    raise_if_failed(seat)
    report = finish(job, machine.found, [seat.run], progress)
    return replace(report, findings=(*found, *report.findings))


def bench(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt bench MODEL…`: verified times over backends, precisions and batches, interleaved where they are compared."""
    progress = progress or Silent()
    if not job.candidates:
        raise UsageError("nothing to bench", fix="gpuopt bench MODEL")
    if len({candidate.device for candidate in job.candidates}) > 1:
        raise UsageError("a report is about one device, and the candidates name several", fix="one gpuopt bench for each --device")
    if job.gates.baseline is not None:
        codec.read_json(Report, Path(job.gates.baseline))  # before hours of measuring, not after
    machine = surveyed(job, progress)
    runs: list[Run] = []
    errors: list[GpuoptError] = []
    for group in comparable(job.candidates):

        def rewrite(done: list[Run], before: tuple[Run, ...] = tuple(runs)) -> None:
            progress.so_far(_report(job, machine.found, [*before, *done]))

        finished = _bench_group(group, job, machine, progress, rewrite)
        runs += [seat.run for seat in finished]
        errors += [seat.error for seat in finished if seat.error is not None]
        progress.so_far(_report(job, machine.found, runs))
    if all(run.status is not Status.OK for run in runs) and errors and len(errors) == len(runs):
        if len({(type(e), e.message) for e in errors}) == 1:
            raise errors[0]
    return finish(job, machine.found, runs, progress)


def comparable(candidates: tuple[Candidate, ...]) -> list[list[Candidate]]:
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


def _bench_group(
    group: list[Candidate], job: Job, machine: Machine, progress: Progress, on_update: Callable[[list[Run]], None]
) -> list[Seat]:
    """Build and verify, then time all that are left in interleaved blocks."""
    with ExitStack() as stack:
        environment = _fewer_threads(machine.device, job)
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
                stack.enter_context(seated(candidate, job, progress, environment))
                for candidate in group[wave : wave + max(1, job.bench.build_jobs)]
            ]
            seats += started
            for done in [builders.submit(prepared, seat) for seat in started]:
                done.result()
                on_update([s.run for s in seats])
        live = [seat for seat in seats if seat.ok]
        if len(live) == 1:
            live[0].step(lambda s: measured(s, job, machine))
        elif live:
            interleaved(live, job, machine, progress)
        return seats


def interleaved(live: list[Seat], job: Job, machine: Machine, progress: Progress) -> None:
    key = "pairs"
    progress.start(key, f"timing {len(live)} candidates in interleaved blocks")
    for seat in live:
        seat.step(lambda s: _warmed(s, job.bench))
    live = [seat for seat in live if seat.ok]
    by_key = {seat.key: seat for seat in live}
    with products(live, job, machine) as anchors:

        def lost(which: str, error: Exception) -> None:
            if not isinstance(error, ChildFailed):
                raise error
            if which in by_key:
                by_key[which].fail(error)
                by_key[which].child.close()
            else:
                progress.warn(f"no {which}: {error.reason}")

        blocks = pairs.interleave(
            {seat.key: (lambda s=seat: s.ask("block", facts.Measured, spec=job.bench).samples) for seat in live},  # type: ignore[misc]
            job.bench,
            beside=anchors.sides,
            on_round=lambda fraction: progress.update(key, fraction),
            on_failure=lost,
        )
        machine.keep(anchors.ceilings(blocks))
    for seat in live:
        seat.sampled = seat.sampled + pairs.joined(blocks[seat.key])
        seat.step(lambda s: _metered(s, job, machine))
    base = next((seat for seat in live if seat.ok), None)
    for seat in live:
        if seat is not base and base is not None and seat.ok:
            seat.run = figures.relative(seat.run, base.sampled, seat.sampled)
    progress.done(key)


@dataclass(slots=True)
class Products:
    """Sides of an interleaved bench that are no candidates: blocks of products, one side a quantity."""

    sides: dict[str, Callable[[], Samples]] = field(default_factory=dict)
    made: dict[str, tuple[str, facts.Anchored]] = field(default_factory=dict)
    """Side -> its quantity, and what its last block said."""

    def ceilings(self, blocks: Mapping[str, list[Samples]]) -> dict[str, Ceiling]:
        """Those that lasted to the end."""
        return {
            quantity: anchor.ceiling(quantity, pairs.joined(blocks[name]), last.flops, last.how)
            for name, (quantity, last) in self.made.items()
            if len(blocks.get(name, ())) >= MIN_ANCHOR_BLOCKS
        }


@contextmanager
def products(live: list[Seat], job: Job, machine: Machine) -> Iterator[Products]:
    """A child that times products in the quantities these candidates compute in; nothing at all where that is off."""
    found = Products()
    quantities = anchor.wanted([seat.count for seat in live], machine.survey.device, job.bench.sustained)
    if not quantities:
        yield found
        return
    with Child() as child:
        for quantity in quantities:
            name = f"sustained {quantity} ceiling"
            calls_ms = [
                ms for seat in live if quantity in anchor.wanted([seat.count], machine.survey.device, "on") and (ms := _call_ms(seat))
            ]
            spec = anchor.block_spec(job.bench, min(calls_ms, default=0.0))

            def side(name: str = name, quantity: str = quantity, spec: BenchSpec = spec) -> Samples:
                answer = child.call(
                    "anchor", facts.Anchored, timeout_s=SURVEY_TIMEOUT_S, quantity=quantity, device=machine.survey.device, spec=spec
                )
                found.made[name] = (quantity, answer)
                return answer.samples

            try:
                side()  # its process starts and its product is made now: between the blocks that would cool the device down
            except ChildFailed as failure:
                machine.progress.warn(f"no {name}: {failure.reason}")
                break
            found.sides[name] = side
        yield found


def _call_ms(seat: Seat) -> float:
    """A typical call so far: of the samples, or of the warm-up before there are any."""
    seen = seat.sampled.samples_ns or seat.sampled.warmup_ns[-5:] or seat.run.samples_ns
    return median(seen) / 1e6 if seen else 0.0


def measured(seat: Seat, job: Job, machine: Machine) -> Run:
    """Alone; on a GPU followed by blocks of products between blocks of its own, while it is as hot as it was."""
    with products([seat], job, machine) as anchors:
        found = seat.ask("measure", facts.Measured, spec=job.bench)
        if anchors.sides:
            seat.sampled = found.samples
            few = replace(job.bench, num_pairs=MIN_PAIRS)

            def lost(which: str, error: Exception) -> None:
                if not isinstance(error, ChildFailed) or not which:
                    raise error
                seat.progress.warn(f"no {which}: {error.reason}")

            own = {"": lambda: seat.ask("block", facts.Measured, spec=job.bench).samples}
            machine.keep(anchors.ceilings(pairs.interleave(own, few, beside=anchors.sides, on_failure=lost)))
    return machine.judged(lambda device: figures.measured(seat.run, found, device, seat.count))


def _metered(seat: Seat, job: Job, machine: Machine) -> Run:
    found = replace(seat.ask("meters", facts.Measured, spec=job.bench), samples=seat.sampled)
    return machine.judged(lambda device: figures.measured(seat.run, found, device, seat.count))


def profiled(seat: Seat, job: Job, device: Device) -> Run:
    found = seat.ask("profile", facts.Profiled, device=device, wall_ms=_wall_ms(seat.run), depth=job.depth)
    return figures.profiled(seat.run, found)


def _warmed(seat: Seat, spec: BenchSpec) -> Run:
    seat.sampled = seat.ask("warm", facts.Measured, spec=spec).samples
    return seat.run


def compile(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt compile MODEL --backend B -o DIR`: build, verify, measure against the model as it is, write a bundle."""
    progress = progress or Silent()
    candidate = only(job)
    if job.output is None:
        raise UsageError("compile writes a bundle", fix="-o FOLDER")
    target = Path(job.output)
    bundle_writer.check_target(target, force=job.force, source=source_of(candidate))
    machine = (
        Machine(job=job, progress=progress, survey=survey(job, progress, ceilings=False)) if job.build_only else surveyed(job, progress)
    )
    baseline = replace(candidate, backend=BackendSpec(), precision=None, transforms=Transforms())
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
            _write_bundle(seat, job, target, progress)
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
                message=f"{candidate.backend} is slower than the model as it is: {seat.run.relative.ratio:.2f}x"
                if seat.run.relative
                else "",
                fix="keep eager, or try another backend: gpuopt bench MODEL --backend eager --backend …",
            ),
        )
    return replace(report, output=target.name if seat.ok else None, findings=findings)


def _against_eager(seat: Seat, baseline: Candidate, job: Job, machine: Machine, progress: Progress, stack: ExitStack) -> list[Run]:
    """Time the candidate beside the model as it came. A model whose own form cannot run is timed alone."""
    other = stack.enter_context(seated(baseline, job, progress))
    other.step(lambda s: figures.loaded(s.run, s.ask("load", facts.Loaded, candidate=s.candidate)))
    other.step(_built)
    if not other.ok:
        seat.run = replace(seat.run, notes=(*seat.run.notes, f"not compared with eager: {other.run.reason}"))
        seat.step(lambda s: measured(s, job, machine))
        return [seat.run]
    interleaved([other, seat], job, machine, progress)
    return [other.run, seat.run]


def _write_bundle(seat: Seat, job: Job, target: Path, progress: Progress) -> None:
    """The child writes into a folder beside the target; the parent publishes it with one rename."""
    progress.update(seat.key, None, "writing the bundle")
    verified = seat.run.accuracy is not None and seat.run.accuracy.passed
    with bundle_writer.staging(target, force=job.force, source=source_of(seat.candidate)) as folder:
        saved: list[facts.Saved] = []

        def save(s: Seat) -> Run:
            saved.append(s.ask("save", facts.Saved, folder=str(folder)))
            return s.run

        seat.step(save)
        if seat.ok:
            bundle_writer.publish(
                folder, target, manifests.assemble(seat.candidate, seat.run, saved[0], verified=verified), force=job.force
            )


def convert(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt convert MODEL --precision … --to … -o FILE`: change the model, verify the change, write the file."""
    progress = progress or Silent()
    candidate = only(job)
    if job.output is None:
        raise UsageError("convert writes a file", fix="-o FILE")
    target = Path(job.output)
    kind = _kind_of(target, job.to)
    check_file_target(target, force=job.force, source=source_of(candidate))
    found = survey(job, progress, ceilings=False)
    with seated(candidate, job, progress) as seat:
        prepare(seat, job)
        if seat.ok:
            _write_file(seat, job, target, kind)
    raise_if_failed(seat)
    report = finish(job, found, [seat.run], progress)
    return replace(report, output=target.name if seat.ok else None)


def _write_file(seat: Seat, job: Job, target: Path, kind: str) -> None:
    """The child writes into a folder beside the target; the parent moves what it wrote, the main file last: a reader that finds it finds all of it."""
    with _disk_errors(target):
        folder = Path(tempfile.mkdtemp(prefix=".gpuopt-", dir=target.parent))
    try:

        def export(s: Seat) -> Run:
            written = s.ask("export", facts.Exported, kind=kind, folder=str(folder), name=target.name)
            for name in written.files:
                check_file_target(target.parent / name, force=job.force, source=source_of(s.candidate))
            if kind == "pt2":
                consent.record(folder / target.name)  # a program of ours, written just now: its reader need not ask again
            with _disk_errors(target):
                for name in written.files:
                    (folder / name).replace(target.parent / name)
            return replace(s.run, notes=(*s.run.notes, *written.notes))

        seat.step(export)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{target} cannot be written: {error.strerror or error}", fix="free some space, or another -o") from error


def source_of(candidate: Candidate) -> Path | None:
    """The model's own file or folder, which an output must not touch; None for a factory."""
    path = Path(candidate.model.text)
    try:
        return path if candidate.model.text and path.exists() else None
    except OSError:  # a name too long for the file system
        return None


def check_file_target(target: Path, *, force: bool, source: Path | None = None) -> None:
    """Before any work: the name can be one, the folder exists and can be written, nothing is overwritten without --force and the source never is."""
    require_output_name(target.name)
    if target.is_dir():
        raise UsageError(f"{target} is a folder", fix="-o FILE")
    if target.is_symlink():
        raise UsageError(f"{target} is a link", fix="name the file itself, or another one")
    if (
        source is not None
        and target.exists()
        and (target.samefile(source) or (source.is_dir() and source.resolve() in target.resolve().parents))
    ):
        raise UsageError(f"{target} belongs to the model that is being converted", fix="another -o")
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is no regular file", fix="another -o")
    if target.exists() and not force:
        raise UsageError(f"{target} is already there", fix="--force, or another -o")
    if not target.parent.is_dir():
        raise ResourceError(f"the folder {target.parent} does not exist", fix=f"mkdir -p {target.parent}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ResourceError(f"{target.parent} cannot be written: {error.strerror}", fix="another -o") from error


def surveyed(job: Job, progress: Progress) -> Machine:
    """The machine under the candidates, with its ceilings."""
    return Machine(job=job, progress=progress, survey=survey(job, progress), is_fresh=job.refresh)


def survey(job: Job, progress: Progress, *, ceilings: bool = True) -> facts.Survey:
    """Environment, device and its ceilings, from a child of their own."""
    wanted = job.candidates[0].device if job.candidates else job.device or "auto"
    with Child() as child:
        progress.start("device", "looking at this machine")
        try:
            found = child.call(
                "survey",
                facts.Survey,
                timeout_s=SURVEY_TIMEOUT_S,
                on_progress=lambda fraction, note: progress.update("device", fraction, note),
                device_id=wanted,
                refresh=job.refresh,
                ceilings=ceilings,
            )
        except ChildFailed as failure:
            raise _told(failure, "looking at the device") from failure
        progress.done("device", found.device.name)
    for note in found.device.notes:
        progress.warn(note)
    return found


def _told(failure: ChildFailed, what: str) -> Exception:
    """A failure outside any candidate: the user's to act on, a library's that took the process with it, or a bug of ours with its traceback."""
    if failure.error is not None:
        return failure.error
    if failure.status is Status.BUG:
        failure.add_note(failure.traceback)
        return failure
    return Unavailable(
        f"{what} failed: {failure.reason}", fix=failure.fix or "gpuopt device and gpuopt backends show what this machine can do"
    )


def prepare(seat: Seat, job: Job, *, build_only: bool = False, traced: bool = False) -> None:
    """Load, build and verify: what every command does before it measures. `traced`: it will be profiled, which is asked before it is built."""

    def traceable(s: Seat) -> Run:
        s.ask("require_traceable", facts.Diagnosed)
        return s.run

    seat.step(lambda s: _loaded(s, job.verb))
    if traced:
        seat.step(traceable)
    if seat.ok and seat.run.input_source.startswith("guess"):
        seat.progress.warn(f"inputs are a {seat.run.input_source}")
    seat.step(lambda s: _built(s, build_only=build_only))
    if job.bench.verify != "off" and not build_only:
        seat.step(lambda s: figures.verified(s.run, s.ask("verify", facts.Verified, tolerance=job.tolerance, mode=job.bench.verify)))


def _loaded(seat: Seat, verb: str) -> Run:
    found = seat.ask("load", facts.Loaded, candidate=seat.candidate)
    if found.form == "bundle" and verb in ("compile", "convert"):
        raise UsageError(f"{found.name} is a bundle, built for {found.bundle_backend} already", fix=f"{verb} the model it was built from")
    if found.form == "onnx" and verb == "convert":
        raise Unsupported(f"{found.name} is an ONNX file, and convert changes PyTorch models", fix="convert the model it was exported from")
    return figures.loaded(seat.run, found)


def _built(seat: Seat, *, build_only: bool = False) -> Run:
    found = seat.ask("build", facts.Built, build_only=build_only)
    seat.count = found.count
    return figures.built(seat.run, found, seat.candidate)


def only(job: Job) -> Candidate:
    if len(job.candidates) != 1:
        raise UsageError(f"{job.verb} takes one model, backend, precision and batch", fix="gpuopt bench compares several")
    return job.candidates[0]


def _wall_ms(run: Run) -> float:
    """Host time of a typical call: the mean over all of them, less what rare slow ones added. A busy machine would else show as time nobody can place."""
    assert run.latency_ms is not None
    if not run.wall_ms:
        return run.latency_ms.median
    return run.wall_ms * min(1.0, run.latency_ms.median / run.latency_ms.mean)


def _kind_of(target: Path, asked: str | None) -> str:
    """What to write. A suffix that says otherwise is refused: such a file would be refused when it is read."""
    kinds = {".onnx": "onnx", ".pt2": "pt2", ".safetensors": "safetensors"}
    told = kinds.get(target.suffix)
    if asked is None and told is None:
        raise UsageError(f"{target.name} does not say what to write", fix="--to onnx|pt2|safetensors, or such a suffix")
    if asked is not None and told is not None and asked != told:
        raise UsageError(f"{target.name} is the name of a {told} file, and --to is {asked}", fix=f"-o {target.stem}.{asked}")
    return asked or told or ""


def raise_if_failed(seat: Seat) -> None:
    """Where one candidate is all there is, its own error is the command's."""
    if seat.error is not None:
        raise seat.error
    if seat.run.status in (Status.ACCURACY_FAIL, Status.NAN):
        return  # a verdict, with its evidence in the report
    if seat.run.status is Status.UNSUPPORTED:
        raise Unsupported(seat.run.reason, fix=seat.run.fix)


def _report(job: Job, found: facts.Survey, runs: list[Run] | None = None) -> Report:
    return Report(
        schema_version=SCHEMA_VERSION,
        command=job.command,
        verb=job.verb,
        environment=found.environment,
        device=found.device,
        runs=tuple(runs or ()),
    )


def finish(job: Job, found: facts.Survey, runs: list[Run], progress: Progress, judged: list[Run] | None = None) -> Report:
    """`judged`: the runs that gates are about, where others are there for comparison alone."""
    report = _report(job, found, runs)
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
    report = diff.against_baseline(
        replace(report, gates=gates.judge(runs if judged is None else judged, job.gates), findings=findings), job.gates
    )
    progress.so_far(report)
    return report
