"""Candidates on several devices -> their runs over batch, never timed at the same time; what explains them; and how large a batch memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError
from gpuopt.core.progress import Progress
from gpuopt.core.result import Report, Run, Status
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, Job, Transforms
from gpuopt.core.sweep import Curve, Memory, Sweep
from gpuopt.pipeline import crossing, facts, figures, groups, reporting, seats
from gpuopt.pipeline.crossing import Key, Shares
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.seats import Seat, machine_of
from gpuopt.profiling.roofline import ImpossibleFigure

LARGEST = 1 << 14
"""Batches that nobody named end here."""
CALLS = 20
"""What one more batch costs at least, in calls: building, verifying, warming up, and a pilot and a call in each block."""
SATURATED = 1.03
"""Two doublings that bring less than this in samples a second, and more will bring no more."""
NEAR = 0.9
"""Of the largest batch by the fit, what is tried: near enough to be a check, far enough not to fail by its error."""
OUT_OF_MEMORY = (Status.OOM_DEVICE, Status.OOM_HOST)


@dataclass(slots=True)
class Line:
    """One candidate over batch, as far as it has come."""

    candidate: Candidate
    """Without a batch where none was named."""
    machine: Machine
    runs: list[Run] = field(default_factory=list)
    stopped: str = ""

    @property
    def last(self) -> Run:
        return self.runs[-1]

    @property
    def memory(self) -> Memory | None:
        """The fit to what its runs took."""
        points = [(run.batch or 1, run.peak_bytes) for run in self.runs if run.status is Status.OK and run.peak_bytes]
        return crossing.memory([(batch, peak) for batch, peak in points if peak is not None], self.machine.device)


@dataclass(slots=True)
class Bench:
    """A bench over several devices on its way."""

    job: Job
    progress: Progress
    machines: list[Machine]
    lines: list[Line] = field(default_factory=list)
    errors: list[GpuoptError] = field(default_factory=list)
    explained: dict[Key, Shares] = field(default_factory=dict)
    order: list[Run] = field(default_factory=list)

    def report(self, more: Sequence[Run] = ()) -> Report:
        """What is known so far."""
        return reporting.report(self.job, self.machines[0].found, [*self.order, *more], [m.device for m in self.machines])

    def timed(self, lines: Sequence[Line], batch: int | None, *, job: Job) -> None:
        """One more batch of these lines: all of them interleaved, then what the devices that are behind waited for."""
        group = [with_batch(line.candidate, batch) for line in lines]
        ended = groups.bench(
            [group],
            job,
            self.machines,
            self.progress,
            on_update=lambda done: self.progress.so_far(self.report(done)),
            afterwards=lambda live: self.explain(live, is_first=not lines[0].runs),
        )
        for line, seat in zip(lines, ended, strict=True):
            self.keep(line, seat.run)
            self.errors += [seat.error] if seat.error is not None else []
        self.progress.so_far(self.report())

    def keep(self, line: Line, run: Run) -> None:
        """One more run of a line."""
        line.runs.append(run)
        self.order.append(run)

    def explain(self, live: list[Seat], *, is_first: bool) -> None:
        """Trace each GPU's candidate at the smallest batch, and wherever another device is ahead of it: what it waits for there is what is asked."""
        for seat in live:
            machine = machine_of(seat.candidate, self.machines)
            others = [_ms(s.run) for s in live if s.candidate.device != seat.candidate.device]
            if machine.device.kind == "cpu" or not others or not (is_first or _ms(seat.run) > min(others)):
                continue
            try:
                fall = seats.profiled(seat, self.job, machine.device).waterfall
            except (ChildFailed, ImpossibleFigure) as error:
                self.progress.warn(f"{seat.run.backend} at batch {seat.run.batch} on {machine.device.id} is not explained: {error}")
                continue
            shares = crossing.shares(fall) if fall is not None else None
            if shares is not None:
                self.explained[(*crossing.key(seat.run), seat.run.batch)] = shares


def bench(job: Job, progress: Progress, machines: list[Machine]) -> Report:
    """`gpuopt bench --device A,B`: the candidates' devices are ids of these machines. The first is what the others are compared with."""
    state = Bench(job=job, progress=progress, machines=machines)
    for column in columns(job.candidates):
        lines = [Line(candidate=_without_batch(c), machine=machine_of(c, machines)) for c in column.candidates]
        state.lines += lines
        if column.batches:
            _named(state, lines, column.batches)
        else:
            _doubling(state, lines)
    if state.errors and len(state.errors) == len(state.order) and len({(type(e), e.message) for e in state.errors}) == 1:
        raise state.errors[0]
    found = tuple(_finished(state, line) for line in state.lines)
    devices = [machine.device for machine in machines]
    curves = tuple(curve for curve in found if curve is not None)
    runs = state.order
    whole = Sweep(curves=curves, crossovers=crossing.crossovers(runs, devices, state.explained))
    return reporting.finish(job, machines[0].found, runs, progress, devices=devices, sweep=whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Candidates alike in everything that a comparison wants alike, but for their batch and device."""

    candidates: tuple[Candidate, ...]
    batches: tuple[int, ...]
    """Smallest first; empty where none was named."""


def columns(candidates: Sequence[Candidate]) -> list[Column]:
    """Every candidate once, its batches apart."""
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        alike = _without_batch(candidate)
        key = codec.digest(
            replace(
                alike,
                model=replace(alike.model, text="", arch=None),
                device="",
                backend=BackendSpec(),
                precision=None,
                transforms=Transforms(),
            )
        )
        found.setdefault(key, []).append(candidate)
    rows = []
    for group in found.values():
        unique: list[Candidate] = []
        for candidate in group:
            if _without_batch(candidate) not in unique:
                unique.append(_without_batch(candidate))
        rows.append(Column(candidates=tuple(unique), batches=tuple(sorted({c.dims["N"] for c in group if "N" in c.dims}))))
    return rows


def _without_batch(candidate: Candidate) -> Candidate:
    """A range of batches that a build must accept is part of the build and stays."""
    asked = replace(candidate.inputs, dims=tuple(dim for dim in candidate.inputs.dims if dim.name != "N" or dim.low is not None))
    return replace(candidate, inputs=asked, dims={name: value for name, value in candidate.dims.items() if name != "N"})


def with_batch(candidate: Candidate, batch: int | None) -> Candidate:
    """None leaves it to the model's own inputs."""
    return candidate if batch is None else replace(candidate, dims={"N": batch, **candidate.dims})


def _named(state: Bench, lines: list[Line], batches: Sequence[int]) -> None:
    """Each batch that was asked for: timed, or a row that says why not."""
    for batch in batches:
        going = []
        for line in lines:
            reason = _hopeless(line, batch)
            if reason:
                run = replace(figures.started(with_batch(line.candidate, batch)), precision=line.last.precision, model=line.last.model)
                state.keep(line, figures.failed(run, Status.SKIPPED, reason, "a smaller --batch"))
            else:
                going.append(line)
        if going:
            state.timed(going, batch, job=state.job)


def _hopeless(line: Line, batch: int) -> str:
    """Why a larger batch is not even tried. A GPU that runs out of memory says so; a machine that does takes others with it."""
    full = next((run for run in line.runs if run.status in OUT_OF_MEMORY), None)
    if full is not None:
        return f"batch {full.batch} was out of memory already"
    found = line.memory
    if line.machine.device.kind == "cpu" and found is not None and found.limit_bytes is not None:
        wanted = crossing.predicted_bytes(found, batch)
        if wanted > found.limit_bytes:
            return f"batch {batch} would take about {_gib(wanted)} of the {_gib(found.limit_bytes)} that are free"
    return ""


def _doubling(state: Bench, lines: list[Line]) -> None:
    """1, 2, 4 … for each device until time or memory ends its curve, or no device gains any more."""
    job = replace(state.job, bench=_shorter(state.job.bench))
    state.timed(lines, None, job=job)
    batch = next((run.batch for line in lines if (run := line.last).status is Status.OK and "N" in run.dims), None)
    if batch is None:
        for line in lines:
            line.stopped = line.stopped or _why_failed(line.last) or "its inputs have no free batch dimension N"
        return
    while True:
        batch *= 2
        going = [line for line in lines if not line.stopped]
        for line in going:
            line.stopped = _why_no_more(line, batch, going, state.job.bench.max_time_s)
        going = [line for line in going if not line.stopped]
        if going and all(_is_saturated(line) for line in going):
            for line in going:
                line.stopped = f"more than {line.last.batch} a call brings no more samples a second"
            going = []
        if not going:
            return
        state.timed(going, batch, job=job)


def _shorter(spec: BenchSpec) -> BenchSpec:
    """There are many batches, and a curve needs less of each than a verdict on one."""
    return replace(spec, max_time_s=spec.max_time_s / 4, min_time_s=min(spec.min_time_s, spec.max_time_s / 4))


def _why_failed(run: Run) -> str:
    return "" if run.status is Status.OK else f"{run.status.value.replace('_', ' ')} at batch {run.batch or 1}: {run.reason}"


def _why_no_more(line: Line, batch: int, beside: Sequence[Line], max_time_s: float) -> str:
    """Why this line ends here; empty where it goes on."""
    if failed := _why_failed(line.last):
        return failed
    if batch > LARGEST:
        return f"batches that nobody named end at {LARGEST}"
    if 2 * _ms(line.last) / 1e3 * CALLS > max_time_s:
        return f"a call at batch {batch} would take about {2 * _ms(line.last) / 1e3:.2g} s; --batch or a longer --max-time asks for it"
    neighbours = [other for other in beside if other.machine is line.machine]
    wanted = [crossing.predicted_bytes(found, batch) for other in neighbours if (found := other.memory) is not None]
    own = line.memory
    if own is not None and own.limit_bytes is not None and sum(wanted) > own.limit_bytes:
        shared = f" for {len(neighbours)} candidates at once" if len(neighbours) > 1 else ""
        return f"batch {batch} would take about {_gib(sum(wanted))} of the {_gib(own.limit_bytes)} that are free{shared}"
    return ""


def _is_saturated(line: Line) -> bool:
    rates = [run.samples_per_s for run in line.runs if run.samples_per_s is not None]
    return len(rates) >= 3 and rates[-1] < SATURATED * rates[-3]


def _finished(state: Bench, line: Line) -> Curve | None:
    """The curve of a line with its memory checked; None where it has no run."""
    if not line.runs:
        return None
    stopped = line.stopped or next((_why_failed(run) for run in line.runs if run.status is not Status.OK), "")
    return replace(
        crossing.curve(line.runs, state.explained, stopped, [run for run in state.order if run.status is Status.OK]),
        memory=_checked(state, line),
    )


def _checked(state: Bench, line: Line) -> Memory | None:
    """The memory model of a line, held against a call near the batch at which it says that a GPU is full."""
    found = line.memory
    if found is None or found.largest_batch is None:
        return found
    done = [run for run in line.runs if run.status is Status.OK]
    last = done[-1]
    batch = int(found.largest_batch * NEAR)
    call_s = _ms(last) / 1e3 * batch / (last.batch or 1)
    if any(run.status in OUT_OF_MEMORY for run in line.runs):
        return replace(found, note="a larger batch was out of memory")
    if line.machine.device.kind == "cpu":
        return replace(found, note="not checked: a machine that runs out of memory ends other programs too")
    if (last.batch or 1) > found.largest_batch:
        return replace(found, largest_batch=None, note=f"batch {last.batch} still ran: more is free than was at the start")
    if batch <= (last.batch or 1):
        return replace(found, note="measured close to it")
    if call_s * CALLS / 2 > state.job.bench.max_time_s:
        return replace(found, note=f"not checked: a call there would take about {call_s:.2g} s")
    return _probed(state, line, found, batch)


def _probed(state: Bench, line: Line, found: Memory, batch: int) -> Memory:
    job = replace(state.job, bench=replace(state.job.bench, energy_s=0.0))
    peaks: list[int] = []

    def tried(seat: Seat) -> Run:
        seat.run = seats.loaded(seat)
        seat.run = seats.built(seat)
        peak = seat.ask("meters", facts.Measured, spec=job.bench).peak_bytes
        peaks.extend([] if peak is None else [peak])
        return seat.run

    with seats.seated(with_batch(line.candidate, batch), job, state.progress) as seat:
        seat.step(tried)
    if not seat.ok:
        return replace(found, probed_batch=batch, note=f"tried and failed: {seat.run.status.value.replace('_', ' ')}")
    if not peaks:
        return replace(found, probed_batch=batch, note="it ran; how much it took is not known")
    miss = crossing.predicted_bytes(found, batch) / peaks[0] - 1
    return replace(found, probed_batch=batch, probed_bytes=peaks[0], note=f"checked: the fit is {miss:+.1%} off at batch {batch}")


def _ms(run: Run) -> float:
    return run.latency_ms.median if run.latency_ms else 0.0


def _gib(value: float) -> str:
    return f"{value / 2**30:.3g} GiB"
