"""Job -> Report of a search: the questions of `search.py` answered by children, the answers kept in a journal, the winner published as a bundle.

Nothing here decides what is tried or what wins; it builds, times, verifies and traces what it is asked to, and survives what goes wrong on the way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from gpuopt.bundles import write as bundle_writer
from gpuopt.core import codec, stats
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import Report, Run, Samples, Sensitivity, Status
from gpuopt.core.search import GOALS, Economics, Screened, Search, SearchSpec, Timed
from gpuopt.core.spec import BenchSpec, Candidate, Job, Precision
from gpuopt.pipeline import facts, figures, isolate, jobs, journal, outputs, pairs, reporting, seats, tune
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.search import Answer, Ask, Explain, Explained, Finalists, Finals, Mend, Mended, Proposal, Screen, search
from gpuopt.pipeline.seats import Seat, built, diagnose, interleaved, loaded, measured, profiled, verified
from gpuopt.pipeline.traits import Traits

SCREEN_BLOCKS = 3
"""Short blocks a candidate is screened with; the median of their calls counts."""
FIRST_PAIRS = 8
"""Interleaved pairs after which finalists that are clearly behind leave: enough for a 95% interval."""
MEND_S = 120.0
"""For the search of modules that have to stay in fp32."""
MEMORY_SHARE = 0.6
"""Of the device's memory that candidates waiting for the finals may hold together."""


def optimize(
    job: Job,
    progress: Progress | None = None,
    *,
    hire: seats.Hire | None = None,
    identity: str = "",
    known: dict[str, Candidate] | None = None,
) -> Report:
    """`gpuopt optimize MODEL -o FOLDER`: the fastest verified way to run it that the search found, never one slower than the input.

    For a live module `hire` makes the workers that hold it, and `identity` says which module it is, so that no journal of another is resumed;
    `known` is filled with the candidates of the trials, by key.
    """
    progress = progress or Silent()
    base = jobs.only(job)
    spec = _checked(job.search)
    target = Path(job.output) if job.output is not None else None
    if target is not None:
        bundle_writer.check_target(target, force=job.force or spec.resume, source=outputs.source_of(base))
    machine = machines.surveyed(job, progress)
    base = replace(base, device=machine.device.id)
    base = _sized(base, spec, job, hire)
    header = journal.Header(search=_digest(job, base, identity), fingerprint=_fingerprint(machine))
    path = journal.path_of(target) if target is not None else None
    with journal.opened(path, header, resume=spec.resume) as book, _bench(job, machine, base, progress, hire, known) as bench:
        steps = search(base, spec)
        asked: Answer | None = None
        resumed = 0
        try:
            while True:
                try:
                    question = next(steps) if asked is None else steps.send(asked)
                except StopIteration as ended:
                    found: Search = ended.value
                    break
                bench.learn(question)
                line = book.get(question.key)
                if line is None:
                    asked, runs = bench.answer(question)
                    book.add(question.key, asked, runs)
                    bench.keep(runs)
                else:
                    asked, resumed = line.answer, resumed + 1
                    bench.keep(line.runs)
                bench.heard(question, asked)
                progress.so_far(_report(job, machine, bench, None))
        except BaseException as ended:
            if target is not None and not isinstance(ended, Exception):  # Ctrl-C, or a signal that asks to end
                _rescued(job, bench, target, progress)
            raise
        bench.raise_if_base_failed(base)
        found = replace(found, resumed=resumed)
        if target is not None and found.choice is not None and not spec.dry_run and spec.time_budget_s != 0:
            found = _published(job, bench, found, target, progress)
        elif found.choice is not None:
            found = replace(found, economics=_economics(bench, found, None))
    report = _report(job, machine, bench, found)
    progress.so_far(report)
    return report


@dataclass(slots=True)
class _Live:
    """A seat whose child waits for the finals."""

    seat: Seat
    stack: ExitStack
    verify: str = ""
    """How far it was verified: `precision`, `full`, or not at all."""
    cost_ms: float = 0.0


@dataclass(slots=True)
class _Bench:
    """Answers questions with children. A few of the best stay alive between screening and the finals."""

    job: Job
    machine: Machine
    base: Candidate
    progress: Progress
    hire: seats.Hire | None = None
    """Makes a worker; None: a process."""
    runs: dict[str, Run] = field(default_factory=dict)
    """Key -> the last that is known of each candidate."""
    known: dict[str, Candidate] = field(default_factory=dict)
    live: dict[str, _Live] = field(default_factory=dict)
    failures: dict[str, GpuoptError] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    """Key -> milliseconds, a sample where throughput is wanted, of those that passed so far; also of those that a journal told of."""
    memory: dict[str, int] = field(default_factory=dict)
    """Key -> most host memory of its process, its compilers included."""

    def learn(self, question: Ask) -> None:
        """Who is asked about: an answer out of a journal names candidates by their keys alone."""
        for candidate in question.candidates if isinstance(question, Finals) else (question.candidate,):
            self.known[tune.key(candidate)] = candidate

    def keep(self, runs: Mapping[str, Run]) -> None:
        """The last that is known of each; where its time goes stays from when it was traced."""
        for key, run in runs.items():
            before = self.runs.get(key)
            if before is not None and run.waterfall is None and before.waterfall is not None:
                run = replace(
                    run,
                    waterfall=before.waterfall,
                    roofline=before.roofline,
                    modules=before.modules,
                    bounds=before.bounds,
                    useful=before.useful,
                )
            self.runs[key] = run

    def heard(self, question: Ask, answer: Answer) -> None:
        """Who may still be written where the search is interrupted."""
        if isinstance(question, Screen) and isinstance(answer, Screened) and answer.status == Status.OK and answer.ms is not None:
            spec, ms = self.job.search, answer.ms
            fits = spec.latency_budget_ms is None or ms <= spec.latency_budget_ms
            fits = fits and (spec.max_memory_bytes is None or (answer.peak_bytes or 0) <= spec.max_memory_bytes)
            if question.candidate == self.base or (fits and answer.verified):
                batch = question.candidate.dims.get("N", 1) if spec.goal == "throughput" else 1
                self.costs[tune.key(question.candidate)] = ms / batch
        if isinstance(answer, Finalists):
            for key, timed in answer.timed.items():
                if timed.status != Status.OK:
                    self.costs.pop(key, None)

    def answer(self, question: Ask) -> tuple[Answer, dict[str, Run]]:
        """Do what is asked; a candidate that fails is an answer too."""
        began = time.monotonic()
        if isinstance(question, Screen):
            screened, run = self._screened(question)
            return replace(screened, seconds=time.monotonic() - began), {tune.key(question.candidate): run}
        if isinstance(question, Explain):
            explained, run = self._explained(question.candidate)
            return replace(explained, seconds=time.monotonic() - began), {tune.key(question.candidate): run}
        if isinstance(question, Mend):
            return replace(self._mended(question.candidate), seconds=time.monotonic() - began), {}
        timed, runs = self._timed(question)
        return Finalists(timed=timed, seconds=time.monotonic() - began), runs

    def close(self) -> None:
        """End every child."""
        for key in list(self.live):
            self._leave(key)

    def raise_if_base_failed(self, base: Candidate) -> None:
        """The input is what everything is held against: where it cannot run, its own error is the command's."""
        run = self.runs.get(tune.key(base))
        error = self.failures.get(tune.key(base))
        if error is not None and run is not None and run.status is not Status.OK:
            raise error

    # -- screen ---------------------------------------------------------------------------------------------------------------

    def _screened(self, question: Screen) -> tuple[Screened, Run]:
        candidate, key = question.candidate, tune.key(question.candidate)
        live = self.seated(candidate)
        seat = live.seat
        samples = self._quick(seat) if seat.ok else None
        ms = median(samples.samples_ns) / 1e6 if samples is not None and samples.samples_ns else None
        if not seat.ok or ms is None:
            return self._lost(key, live)
        seat.sampled = samples or Samples()
        seat.step(lambda s: self._metered(s))
        peak, run = seat.run.peak_bytes, seat.run
        if question.limit_ms is not None and ms > question.limit_ms:
            reason = f"{ms:.4g} ms, and what may be chosen takes less than {question.limit_ms:.4g} ms: not verified"
            self._leave(key)
            return Screened(status=Status.SKIPPED, reason=reason, ms=ms, peak_bytes=peak), figures.failed(run, Status.SKIPPED, reason)
        if self.job.bench.verify != "off" and candidate != self.base:
            seat.step(lambda s: verified(s, replace(self.job, bench=replace(self.job.bench, verify="precision"))))
            live.verify = "precision"
        if not seat.ok:
            return self._lost(key, live)
        live.cost_ms = ms / (candidate.dims.get("N", 1) if self.job.search.goal == "throughput" else 1)
        self._make_room(key)
        return Screened(status=Status.OK, ms=ms, peak_bytes=peak, verified=bool(live.verify)), seat.run

    def seated(self, candidate: Candidate) -> _Live:
        """A child with this candidate loaded and built; the one that waits, where one does."""
        key = tune.key(candidate)
        if key in self.live and self.live[key].seat.child.alive:
            return self.live[key]
        stack = ExitStack()
        job = replace(self.job, candidates=(candidate,))
        try:
            seat = stack.enter_context(seats.seated(candidate, job, self.progress, hire=self.hire))
            live = _Live(seat=seat, stack=stack)
            self.live[key] = live
            seat.step(loaded)
            seat.step(built)
        except BaseException:
            self.live.pop(key, None)
            stack.close()
            raise
        return live

    def _quick(self, seat: Seat) -> Samples | None:
        """Warm, then a few short blocks."""
        found: list[Samples] = []

        def blocks(s: Seat) -> Run:
            spec = _short(self.job.bench)
            s.ask("warm", facts.Measured, spec=spec)
            found.extend(s.ask("block", facts.Measured, spec=spec).samples for _ in range(SCREEN_BLOCKS))
            return s.run

        seat.step(blocks)
        return pairs.joined(found) if seat.ok and found else None

    def _metered(self, seat: Seat) -> Run:
        """Memory, without the second and a half that an energy counter needs, and the figures of the short blocks."""
        found = seat.ask("meters", facts.Measured, spec=replace(self.job.bench, energy_s=0.0))
        found = replace(found, samples=seat.sampled)
        return self.machine.judged(lambda device: figures.measured(seat.run, found, device, seat.count))

    def _lost(self, key: str, live: _Live) -> tuple[Screened, Run]:
        run = live.seat.run
        if live.seat.error is not None:
            self.failures[key] = live.seat.error
        self._leave(key)
        return Screened(status=run.status.value, reason=run.reason, peak_bytes=run.peak_bytes), run

    def prove(self, live: _Live) -> None:
        """Verify what is about to be written as far as was asked: a bundle carries the outputs it is held against wherever it is opened, and a child that was
        built again, or the input itself, has none yet."""
        verify = self.job.bench.verify
        if verify != "off" and live.verify != verify:
            live.seat.step(lambda s: verified(s, self.job))
            live.verify = verify

    def _make_room(self, newest: str) -> None:
        """Keep the cheapest few, by count and by the memory of the device; the others are built again if they are wanted."""
        ranked = sorted(self.live, key=lambda k: self.live[k].cost_ms)
        limit = MEMORY_SHARE * (self.machine.device.memory_bytes or 0)
        held = 0.0
        for number, key in enumerate(ranked):
            held += self.live[key].seat.run.peak_bytes or 0
            if number >= self.job.search.finalists or (limit and held > limit and number):
                self._leave(key)

    def _leave(self, key: str) -> None:
        live = self.live.pop(key, None)
        if live is not None:
            live.stack.close()

    # -- explain --------------------------------------------------------------------------------------------------------------

    def _explained(self, candidate: Candidate) -> tuple[Explained, Run]:
        key = tune.key(candidate)
        live = self.seated(candidate)
        seat = live.seat
        job = replace(self.job, bench=replace(self.job.bench, max_time_s=min(2.0, self.job.bench.max_time_s), energy_s=0.0))
        seat.step(lambda s: measured(s, job, self.machine))
        timed = seat.run
        seat.step(lambda s: self.machine.judged(lambda device: profiled(s, job, device)))
        proposals: tuple[Proposal, ...] = ()
        found: tune.Facts | None = None
        reason = "" if seat.ok else seat.run.reason
        if seat.ok:
            try:
                proposals = tuple(
                    Proposal(change=f.change, origin=f.code, gain_low_ms=f.gain_low_ms or 0.0, gain_high_ms=f.gain_high_ms or 0.0)
                    for f in diagnose(seat, job, self.machine)
                    if f.change is not None
                )
            except ChildFailed as failure:
                self.progress.warn(f"no proposals of the doctor: {failure.reason}")
        if candidate == self.base and timed.status is Status.OK and timed.latency_ms is not None:
            found = self._facts(seat, timed)
        run = seat.run if seat.ok else timed
        self._leave(key)  # a profiler that ran once slows what comes after it
        return Explained(facts=found, proposals=proposals, reason=reason), run

    def _mended(self, candidate: Candidate) -> Mended:
        """In a child of its own that builds nothing: copies of the model are cast, with more and more of it kept."""
        with seats.seated(candidate, replace(self.job, candidates=(candidate,)), self.progress) as seat:
            try:
                seat.step(loaded)
                if not seat.ok:
                    return Mended(note=seat.run.reason)
                found = seat.ask("sensitivity", Sensitivity, tolerance=self.job.tolerance, seconds=MEND_S)
            except ChildFailed as failure:
                return Mended(note=f"no set of modules to keep was looked for: {failure.reason}")
        return Mended(kept=found.kept, note=found.note)

    def _facts(self, seat: Seat, timed: Run) -> tune.Facts:
        run, device = seat.run, self.machine.device
        assert timed.latency_ms is not None
        traits = self._traits()
        own = Precision(timed.precision) if timed.precision else Precision.FP32
        bounds, floors = {}, {}
        if run.bounds is not None:
            bounds = {own.value: run.bounds.unfused_ms} | dict(run.bounds.by_precision)
            floors = {own.value: run.bounds.fused_ms} | dict(run.bounds.fused_by_precision)
        waits = 0.0
        if run.waterfall is not None:
            waits = run.waterfall.idle_ms + (run.waterfall.ms("python and framework") if device.kind == "cpu" else 0.0)
        return tune.Facts(
            wall_ms=timed.latency_ms.median,
            idle_ms=min(waits, timed.latency_ms.median),
            own=own,
            on_gpu=device.kind == "cuda",
            batch=timed.batch or 1,
            bounds_ms={k: v for k, v in bounds.items() if v},
            floors_ms={k: v for k, v in floors.items() if v},
            has_batch_norm=traits.has_batch_norm,
            has_convolutions=traits.has_convolutions,
            has_products=traits.has_products,
            rewrites=traits.rewrites,
            cannot=self._cannot(),
            peak_bytes=timed.peak_bytes,
            memory_bytes=device.memory_bytes,
        )

    def _traits(self) -> Traits:
        with isolate.Child() if self.hire is None else self.hire() as child:
            return child.call("traits", Traits, timeout_s=self.job.bench.timeout_s, ref=self.base.model)

    def _cannot(self) -> dict[str, str]:
        """What the matrix of backends rules out, so that nothing is built to find that out."""
        with isolate.Child() if self.hire is None else self.hire() as child:
            found = child.call("matrix", facts.Matrix, timeout_s=machines.SURVEY_TIMEOUT_S, device_id=self.base.device, candidate=self.base)
        told: dict[str, str] = {}
        for cell in found.cells:
            if cell.reason or not cell.route:
                told[cell.backend] = cell.reason or "no way from this form"
            told.update({f"{cell.backend}@{p}": why for p, why in cell.precisions.items() if why})
        return told

    # -- finals ---------------------------------------------------------------------------------------------------------------

    def _timed(self, question: Finals) -> tuple[dict[str, Timed], dict[str, Run]]:
        """All of them alive at once, verified in full, then pairs; those clearly behind leave after the first few."""
        lives = [self.seated(candidate) for candidate in question.candidates]
        unsure = [
            live
            for live in lives
            if live.seat.ok and self.job.bench.verify not in ("off", live.verify) and live.seat.candidate != self.base
        ]
        with ThreadPoolExecutor(max_workers=max(1, self.job.bench.build_jobs)) as pool:  # nothing is timed meanwhile
            for done in [pool.submit(live.seat.step, lambda s: verified(s, self.job)) for live in unsure]:
                done.result()
        for live in unsure:
            live.verify = self.job.bench.verify
        base, others = lives[0].seat, [live.seat for live in lives[1:]]
        for seat in (base, *others):
            seat.sampled = Samples()
        running = [seat for seat in (base, *others) if seat.ok]
        few = min(FIRST_PAIRS, self.job.bench.num_pairs)
        if base.ok and len(running) > 3 and few < self.job.bench.num_pairs:
            interleaved(
                running, replace(self.job, bench=replace(self.job.bench, num_pairs=few, energy_s=0.0)), [self.machine], self.progress
            )
            running = self._halved(base, [seat for seat in running if seat is not base and seat.ok])
        if base.ok and len(running) > 1:
            for seat in running:
                seat.sampled = Samples()
            interleaved(running, self.job, [self.machine], self.progress)
        timed = {tune.key(live.seat.candidate): self._told(base, live.seat) for live in lives}
        return timed, {tune.key(live.seat.candidate): live.seat.run for live in lives}

    def _halved(self, base: Seat, others: list[Seat]) -> list[Seat]:
        """The input and the better half."""
        ranked = sorted(others, key=self._cost)
        return [base, *ranked[: max(1, (len(ranked) + 1) // 2)]]

    def _cost(self, seat: Seat) -> float:
        batch = seat.candidate.dims.get("N", 1) if self.job.search.goal == "throughput" else 1
        return median(seat.sampled.samples_ns) / batch if seat.sampled.samples_ns else float("inf")

    def _told(self, base: Seat, seat: Seat) -> Timed:
        run = seat.run
        if not seat.ok or run.latency_ms is None:
            return Timed(status=run.status.value if not seat.ok else Status.SKIPPED.value, reason=run.reason or "it was not timed")
        ms = run.latency_ms.median
        if seat is base:
            return Timed(status=Status.OK.value, ms=ms, ratio=1.0, peak_bytes=run.peak_bytes)
        try:
            mine = _per_sample(seat, base) if self.job.search.goal == "throughput" else seat.sampled
            relative = stats.compare_pairs(pairs.split(base.sampled), pairs.split(mine), threshold=self.job.search.min_gain)
        except ValueError:
            relative = run.relative  # type: ignore[assignment]  # it left after the first pairs
        if relative is None:
            return Timed(status=Status.OK.value, ms=ms, verdict="inconclusive", peak_bytes=run.peak_bytes)
        seat.run = replace(run, relative=relative)
        return Timed(
            status=Status.OK.value,
            ms=ms,
            ratio=relative.ratio,
            low=relative.ci95_low,
            high=relative.ci95_high,
            verdict=relative.verdict,
            peak_bytes=run.peak_bytes,
        )


def _per_sample(seat: Seat, base: Seat) -> Samples:
    """Its times as if its batch were the input's."""
    scale = base.candidate.dims.get("N", 1) / seat.candidate.dims.get("N", 1)
    return replace(seat.sampled, samples_ns=tuple(max(1, round(ns * scale)) for ns in seat.sampled.samples_ns))


@contextmanager
def _bench(
    job: Job,
    machine: Machine,
    base: Candidate,
    progress: Progress,
    hire: seats.Hire | None = None,
    known: dict[str, Candidate] | None = None,
) -> Iterator[_Bench]:
    bench = _Bench(job=job, machine=machine, base=base, progress=progress, hire=hire, known={} if known is None else known)
    try:
        yield bench
    finally:
        bench.close()


def _short(spec: BenchSpec) -> BenchSpec:
    return replace(spec, warmup_s=min(spec.warmup_s, 0.2), max_warmup_s=min(spec.max_warmup_s, 3.0), block_ms=min(spec.block_ms, 50.0), min_iterations=min(spec.min_iterations, 5))  # fmt: skip


# -- what is written ------------------------------------------------------------------------------------------------------------------


def _published(job: Job, bench: _Bench, found: Search, target: Path, progress: Progress) -> Search:
    """The winner as a bundle. One that cannot be written is said so, and the search's findings stay."""
    assert found.choice is not None
    live = bench.seated(bench.known[found.choice.key])
    if not live.seat.ok:
        raise UsageError(f"the winner could not be built again: {live.seat.run.reason}", fix=live.seat.run.fix or "--resume tries again")
    live.seat.run = bench.runs[found.choice.key]
    bench.prove(live)
    outputs.write_bundle(live.seat, replace(job, force=job.force or job.search.resume), target, progress)
    bench.runs[found.choice.key] = live.seat.run
    if not live.seat.ok:
        if live.seat.error is not None:
            raise live.seat.error
        raise UsageError(f"the bundle could not be written: {live.seat.run.reason}", fix=live.seat.run.fix)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    return replace(found, economics=_economics(bench, found, size))


def _rescued(job: Job, bench: _Bench, target: Path, progress: Progress) -> None:
    """After Ctrl-C: the best verified candidate so far, where it is better than the input. What goes wrong now is not told over the interrupt."""
    base_key = tune.key(bench.base)
    key = min(bench.costs, key=lambda k: bench.costs[k], default=base_key)
    if key == base_key:
        progress.warn("interrupted before anything better than the input was found: no bundle was written")
        return
    if key not in bench.live:
        progress.warn("interrupted: building the best so far once more to write it; interrupt again to leave at once")
    try:
        live = bench.seated(bench.known[key])
        seat = live.seat
        if seat.ok:
            seat.run = bench.runs[key]
            bench.prove(live)
        if seat.ok:
            outputs.write_bundle(seat, replace(job, force=job.force or job.search.resume), target, progress)
        if not seat.ok:
            progress.warn(f"interrupted, and the best so far could not be written: {seat.run.reason}")
            return
        progress.warn(f"interrupted: {target.name} holds the best so far, {tune.words(bench.known[key], bench.base)}; --resume goes on")
    except GpuoptError as error:
        progress.warn(f"interrupted, and the best so far could not be written: {error.message}")


def _economics(bench: _Bench, found: Search, artifact_bytes: int | None) -> Economics:
    assert found.choice is not None
    run, base = bench.runs.get(found.choice.key), bench.runs.get(tune.key(bench.base))
    if run is None:
        return Economics(search_s=found.seconds, artifact_bytes=artifact_bytes)
    saved_ms = None
    if base is not None and base.latency_ms and run.latency_ms and base.batch and run.batch:
        saved_ms = base.latency_ms.median * run.batch / base.batch - run.latency_ms.median

    def calls(seconds: float | None) -> int | None:
        return int(seconds * 1e3 / saved_ms) + 1 if seconds is not None and saved_ms is not None and saved_ms > 0 else None

    keeps = found.choice.keeps_input
    return Economics(
        build_s=run.compile_s,
        build_peak_host_bytes=run.build_peak_host_bytes,
        search_s=found.seconds,
        cold_start_s=run.cold_start_s,
        artifact_bytes=artifact_bytes,
        energy_j_per_sample=run.energy_j_per_sample,
        energy_before_j_per_sample=base.energy_j_per_sample if base else None,
        calls_to_repay_build=None if keeps else calls(run.compile_s),
        calls_to_repay_search=None if keeps else calls(found.seconds),
    )


def _report(job: Job, machine: Machine, bench: _Bench, found: Search | None) -> Report:
    """Runs in the order of their trials, the input first."""
    order = [t.key for t in found.trials if t.key in bench.runs] if found is not None else list(bench.runs)
    runs = [bench.runs[key] for key in order]
    report = reporting.report(job, machine.found, runs)
    output = (
        Path(job.output).name
        if job.output is not None and found is not None and found.economics and found.economics.artifact_bytes
        else None
    )
    return replace(report, search=found, output=output)


# -- what is asked --------------------------------------------------------------------------------------------------------------------


def _sized(base: Candidate, spec: SearchSpec, job: Job, hire: seats.Hire | None) -> Candidate:
    """With the sizes that a search over batches starts from, where none were given: those that loading fills in."""
    if spec.goal != "throughput" or "N" in base.dims:
        return base
    with (hire or isolate.Child)() as child:
        try:
            found = child.call("load", facts.Loaded, timeout_s=job.bench.timeout_s, candidate=base)
        except ChildFailed:
            return base  # the search says why it cannot be loaded
    return replace(base, dims={**found.dims, **base.dims})


def _checked(spec: SearchSpec) -> SearchSpec:
    if spec.goal not in GOALS:
        raise UsageError(f"goal {spec.goal!r} is unknown", fix="--goal " + " or ".join(GOALS))
    for name, value in (("--latency-budget", spec.latency_budget_ms), ("--max-memory", spec.max_memory_bytes)):
        if value is not None and value <= 0:
            raise UsageError(f"{name} is {value}", fix="a figure above 0")
    if spec.time_budget_s is not None and spec.time_budget_s < 0:
        raise UsageError(f"--time-budget is {spec.time_budget_s:g} s", fix="0 for a plan, or more")
    if spec.finalists < 2:
        raise UsageError(f"{spec.finalists} finalists", fix="at least 2: the input and one other")
    return spec


def _digest(job: Job, base: Candidate, identity: str = "") -> str:
    """Of what is searched for: the settings of this run that change an answer, and not where things are written."""
    spec = replace(job.search, resume=False, dry_run=False, time_budget_s=None, max_trials=0)
    asked: Mapping[str, object] = {
        "base": codec.dump(replace(base, device="")),
        "search": codec.dump(spec),
        "tolerance": codec.dump(job.tolerance),
        "verify": job.bench.verify,
        "source": identity or _source_hash(base),
    }
    import hashlib
    import json

    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _source_hash(base: Candidate) -> str:
    from gpuopt.trust import consent

    source = outputs.source_of(base)
    return consent.sha256_of(source) if source is not None and source.is_file() else ""


def _fingerprint(machine: Machine) -> dict[str, str]:
    device, environment = machine.device, machine.found.environment
    found = {"device": device.name, "driver": device.driver or "", "gpuopt": environment.gpuopt}
    return found | {name: version for name, version in environment.packages.items() if name in ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt")}  # fmt: skip
