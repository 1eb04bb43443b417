"""Candidate -> Seat: its child, and its run so far. Load, build and verify; then blocks of all of them in turn, and what is read off afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol, TypeVar

from gpuopt.core.errors import GpuoptError, ResourceError, Unsupported, UsageError
from gpuopt.core.progress import Progress
from gpuopt.core.result import Ceiling, Count, Device, Finding, Run, Samples, Status
from gpuopt.core.spec import BenchSpec, Candidate, Job
from gpuopt.core.stats import MIN_PAIRS
from gpuopt.pipeline import anchor, facts, figures, gates, isolate, pairs
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.machine import SURVEY_TIMEOUT_S, Machine
from gpuopt.profiling.roofline import ImpossibleFigure

T = TypeVar("T")

SETTLE_S = 0.02
"""Between blocks of two devices: OpenMP's threads go on spinning for some milliseconds after a CPU's call, on the cores that launch a GPU's kernels."""
PASSING = frozenset({Status.OOM_DEVICE, Status.OOM_HOST, Status.TIMEOUT})
"""Ends that a candidate may owe to those it was built beside."""
MIN_ANCHOR_BLOCKS = 3
"""Fewer blocks of products say nothing about what a device keeps up."""


class Worker(Protocol):
    """Who does the steps of a candidate: a process of its own (`isolate.Child`), or this one for a live module (`search.live.local.LocalChild`)."""

    @property
    def pid(self) -> int:
        """Tells workers apart."""

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""

    def call(
        self,
        verb: str,
        result: type[T],
        *,
        timeout_s: float,
        on_progress: Callable[[float | None, str], None] | None = None,
        **arguments: object,
    ) -> T:
        """One step. Raises ChildFailed."""

    def pause(self) -> None:
        """Let it stand still while somebody else is timed."""

    def resume(self) -> None:
        """Go on. Harmless where it was not paused."""

    def kill(self) -> None:
        """End it at once."""

    def close(self) -> None:
        """End it. Harmless twice."""


Hire = Callable[[], AbstractContextManager[Worker]]
"""Makes a worker that ends with its `with`."""


@dataclass(slots=True)
class Seat:
    """A candidate, its child, and its run so far."""

    candidate: Candidate
    child: Worker
    run: Run
    progress: Progress
    spec: BenchSpec
    key: str
    keeps_inaccurate: bool = False
    """A failed verification does not end it (--allow-inaccurate): the verdict becomes a note."""
    error: GpuoptError | None = None
    sampled: Samples = field(default_factory=Samples)
    count: Count | None = None
    unfilled: float | None = None
    """After a profile: share of the multiprocessors' time without a block."""

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
def seated(
    candidate: Candidate, job: Job, progress: Progress, environment: Mapping[str, str] | None = None, hire: Hire | None = None
) -> Iterator[Seat]:
    """A child for this candidate, ended on the way out whatever happens. `hire` makes another than a process of gpuopt's own."""
    run = figures.started(candidate)
    with isolate.Child(environment=environment) if hire is None else hire() as child:
        name = gates.label(run, where=len({one.device for one in job.candidates}) > 1)
        key = f"{name}#{child.pid}"  # the same candidate may be named twice
        progress.start(key, name)
        yield Seat(
            candidate=candidate, child=child, run=run, progress=progress, spec=job.bench, key=key, keeps_inaccurate=job.allow_inaccurate
        )
        progress.done(key)


def raise_if_failed(seat: Seat) -> None:
    """Where one candidate is all there is, its own error is the command's."""
    if seat.error is not None:
        raise seat.error
    if seat.run.status in (Status.ACCURACY_FAIL, Status.NAN):
        return  # a verdict, with its evidence in the report
    if seat.run.status is Status.UNSUPPORTED:
        raise Unsupported(seat.run.reason, fix=seat.run.fix)


def prepare(seat: Seat, job: Job, *, build_only: bool = False, traced: bool = False) -> None:
    """Load, build and verify: what every command does before it measures. `traced`: it will be profiled, which is asked before it is built."""

    def traceable(s: Seat) -> Run:
        s.ask("require_traceable", type(None))
        return s.run

    seat.step(lambda s: loaded(s, job.verb))
    if traced:
        seat.step(traceable)
    if seat.ok and seat.run.input_source.startswith("guess"):
        seat.progress.warn(f"inputs are a {seat.run.input_source}")
    seat.step(lambda s: built(s, build_only=build_only))
    if job.bench.verify != "off" and not build_only:
        seat.step(lambda s: verified(s, job))


def loaded(seat: Seat, verb: str = "") -> Run:
    """Open the model. `verb`: what is to become of it, where some forms have nothing more to give."""
    found = seat.ask("load", facts.Loaded, candidate=seat.candidate)
    if found.form == "bundle" and verb in ("compile", "convert", "optimize"):
        raise UsageError(f"{found.name} is a bundle, built for {found.bundle_backend} already", fix=f"{verb} the model it was built from")
    if found.form == "onnx" and verb == "convert":
        raise Unsupported(f"{found.name} is an ONNX file, and convert changes PyTorch models", fix="convert the model it was exported from")
    return figures.loaded(seat.run, found)


def built(seat: Seat, *, build_only: bool = False) -> Run:
    """Convert, compile, call once."""
    found = seat.ask("build", facts.Built, build_only=build_only)
    seat.count = found.count
    return figures.built(seat.run, found, seat.candidate)


def verified(seat: Seat, job: Job) -> Run:
    """Hold its outputs against the reference."""
    return figures.verified(seat.run, seat.ask("verify", facts.Verified, tolerance=job.tolerance, mode=job.bench.verify))


def measured(seat: Seat, job: Job, machine: Machine) -> Run:
    """Alone; on a GPU followed by blocks of products between blocks of its own, while it is as hot as it was."""
    with products([seat], job, machine) as anchors:
        found = seat.ask("measure", facts.Measured, spec=job.bench)
        if anchors.sides:
            seat.sampled = found.samples
            few = replace(job.bench, num_pairs=MIN_PAIRS)
            own = {seat.key: lambda: seat.ask("block", facts.Measured, spec=job.bench).samples}
            blocks = pairs.interleave(own, few, beside=anchors.sides, on_failure=_on_lost([seat], seat.progress))
            if not seat.ok:
                return seat.run
            machine.keep(anchors.ceilings(blocks))
    return machine.judged(lambda device: figures.measured(seat.run, found, device, seat.count))


def machine_of(candidate: Candidate, machines: Sequence[Machine]) -> Machine:
    """The machine whose ceilings this candidate stands against; the only one whatever its name is."""
    return next((machine for machine in machines if machine.device.id == candidate.device), machines[0])


def interleaved(live: list[Seat], job: Job, machines: Sequence[Machine], progress: Progress) -> None:
    """Time all of them in blocks that take turns, then read memory and energy off one after the other. Two devices are never busy at once: a busy CPU
    is late with the launches of a GPU."""
    key = "pairs"
    progress.start(key, f"timing {len(live)} candidates in interleaved blocks")
    for seat in live:
        seat.step(lambda s: _warmed(s, job.bench))
    live = [seat for seat in live if seat.ok]
    by_machine = [(machine, [seat for seat in live if machine_of(seat.candidate, machines) is machine]) for machine in machines]
    turn = _Turn()
    with ExitStack() as stack:
        anchors = [(machine, stack.enter_context(products(mine, job, machine))) for machine, mine in by_machine]
        blocks = pairs.interleave(
            {seat.key: (lambda s=seat: turn.block(s, job.bench)) for seat in live},  # type: ignore[misc]
            job.bench,
            beside={name: side for _, found in anchors for name, side in found.sides.items()},
            on_round=lambda fraction: progress.update(key, fraction),
            on_failure=_on_lost(live, progress),
        )
        for machine, found in anchors:
            machine.keep(found.ceilings(blocks))
    for seat in live:
        seat.sampled = seat.sampled + pairs.joined(blocks[seat.key])
        seat.step(lambda s: _metered(s, job, machine_of(s.candidate, machines)))
    for _, mine in by_machine:
        base = next((seat for seat in mine if seat.ok), None)
        for seat in mine:
            if seat is not base and base is not None and seat.ok:
                seat.run = figures.relative(seat.run, base.sampled, seat.sampled)
    progress.done(key)


@dataclass(slots=True)
class _Turn:
    """Whose block it was last."""

    device: str = ""

    def block(self, seat: Seat, spec: BenchSpec) -> Samples:
        """One block of this seat; after another device's, when that has come to rest."""
        if self.device not in ("", seat.candidate.device):
            time.sleep(SETTLE_S)
        self.device = seat.candidate.device
        return seat.ask("block", facts.Measured, spec=spec).samples


def _on_lost(live: list[Seat], progress: Progress) -> Callable[[str, Exception], None]:
    """What becomes of a side that raised: of a candidate it is the result; products that are timed beside them are missed, and no more."""
    by_key = {seat.key: seat for seat in live}

    def lost(which: str, error: Exception) -> None:
        if not isinstance(error, ChildFailed):
            raise error
        if which in by_key:
            by_key[which].fail(error)
            by_key[which].child.close()
        else:
            progress.warn(f"no {which}: {error.reason}")

    return lost


def _warmed(seat: Seat, spec: BenchSpec) -> Run:
    seat.sampled = seat.ask("warm", facts.Measured, spec=spec).samples
    return seat.run


def _metered(seat: Seat, job: Job, machine: Machine) -> Run:
    found = replace(seat.ask("meters", facts.Measured, spec=job.bench), samples=seat.sampled)
    return machine.judged(lambda device: figures.measured(seat.run, found, device, seat.count))


def profiled(seat: Seat, job: Job, device: Device) -> Run:
    found = seat.ask("profile", facts.Profiled, device=device, wall_ms=_wall_ms(seat.run), depth=job.depth)
    seat.unfilled = found.unfilled
    return figures.profiled(seat.run, found)


def probed(seat: Seat, machine: Machine) -> Run:
    """At other sizes, for the doctor: before the trace, because a profiler that ran once slows what comes after it."""
    seat.ask("probe", type(None), device=machine.device, wall_ms=_wall_ms(seat.run))
    return seat.run


def _wall_ms(run: Run) -> float:
    """Host time of a typical call: the mean over all of them, less what rare slow ones added. A busy machine would else show as time nobody can place."""
    assert run.latency_ms is not None
    if not run.wall_ms:
        return run.latency_ms.median
    return run.wall_ms * min(1.0, run.latency_ms.median / run.latency_ms.mean)


def diagnose(seat: Seat, job: Job, machine: Machine) -> tuple[Finding, ...]:
    """The findings of a seat whose child still lives."""
    return seat.ask("diagnose", facts.Diagnosed, device=machine.device, ignore=list(job.ignore)).findings


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
    with isolate.Child() as child:
        for quantity in quantities:
            name = f"sustained {quantity} ceiling" + (f" of {machine.device.id}" if machine.is_beside_others else "")
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
