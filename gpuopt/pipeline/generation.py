"""A Job with `generate` -> Report: every way to generate in a child of its own, tokens compared, whole generations timed in interleaved blocks, and each held against the
bound that reading the weights sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from gpuopt import generation
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.generation import PLACED, Generated, GenerateSpec, GenerationBuilt, TokenTimes
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import Accuracy, Device, Relative, Report, Run, Status
from gpuopt.core.spec import DTYPE_BYTES, BackendSpec, BenchSpec, Candidate, Job, Transforms
from gpuopt.core.stats import MIN_PAIRS, PRACTICAL
from gpuopt.generation import bounds
from gpuopt.pipeline import facts, figures, groups, reporting
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.admission import Door
from gpuopt.pipeline.cores import cores, share_of_cores
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.seats import Seat, interleaved, measured, seated

REFERENCE = "tokens of eager generate(), same dtype"
KEPT_TIMES = 1024
"""Token times a report keeps of a run."""
CORES_A_BUILD = 2
"""One traces, another compiles what was traced."""
MOST_AT_ONCE = 8
"""Each holds the weights on the device."""
WARM_S = 2.0
"""At most, before the blocks: every way has made its tokens three times by then."""
FAR_SLOWER = 2.0
"""Times the fastest: nobody needs pairs to see that."""
FEWEST_CALLS = 2
"""Of one that is timed alone."""


def bench(job: Job, progress: Progress | None = None) -> Report:
    """`gpuopt bench MODEL --generate N`. Raises UsageError for a backend that does not generate; whatever every candidate failed with."""
    progress = progress or Silent()
    spec = job.generate
    if spec is None or not job.candidates:
        raise UsageError("nothing to generate", fix="gpuopt bench MODEL --generate 128")
    if spec.new_tokens < 1:
        raise UsageError(f"generate is {spec.new_tokens}", fix="a whole number from 1")
    for candidate in job.candidates:
        if spec.backends_named:
            generation.resolve(candidate.backend)
    # Presets here are ways to generate, checked above: what backends know of theirs is not asked.
    bare = tuple(replace(candidate, backend=replace(candidate.backend, preset=None)) for candidate in job.candidates)
    _, found = machines.all_surveyed(replace(job, candidates=bare), progress)
    if len(found) > 1:
        raise UsageError("generation is timed on one device at a time", fix="--device cuda")
    (machine,) = found
    placed = [replace(candidate, device=machine.device.id) for candidate in job.candidates]
    once = tuple(c for i, c in enumerate(placed) if c not in placed[:i]) if len({c.device for c in job.candidates}) > 1 else tuple(placed)
    job = replace(job, candidates=_ways(once, spec, machine.device))
    runs: list[Run] = []
    errors: list[GpuoptError] = []
    for group in groups.comparable(job.candidates):
        seats = _group(group, job, spec, machine, progress, runs)
        runs += [seat.run for seat in seats]
        errors += [seat.error for seat in seats if seat.error is not None]
        progress.so_far(reporting.report(job, machine.found, runs))
    if all(run.status is not Status.OK for run in runs) and len(errors) == len(runs):
        if len({(type(e), e.message) for e in errors}) == 1:
            raise errors[0]
    return reporting.finish(job, machine.found, runs, progress)


def _ways(candidates: Sequence[Candidate], spec: GenerateSpec, device: Device) -> tuple[Candidate, ...]:
    """Where no backend was named, every model in the ways this kind of device is compared in."""
    if spec.backends_named:
        return tuple(candidates)
    found: list[Candidate] = []
    for candidate in candidates:
        dtype = None if candidate.precision is None else candidate.precision.dtype
        names = generation.unasked(device.kind, candidate.dims.get("N"), dtype)
        found += [replace(candidate, backend=BackendSpec.parse(name)) for name in names]
    return tuple(found)


def _group(
    group: Sequence[Candidate], job: Job, spec: GenerateSpec, machine: Machine, progress: Progress, before: Sequence[Run]
) -> list[Seat]:
    """Build and compare tokens, several at once on a GPU, nothing being timed meanwhile; then time what is left."""
    at_once = _at_once(len(group), job, machine.device)
    # Who compiles nothing keeps one core busy, however many it may use.
    sharing = min(at_once, max(2, sum(generation.resolve(candidate.backend).compiles for candidate in group)))
    seats: list[Seat] = []
    told: dict[str, GenerationBuilt] = {}

    def so_far() -> None:
        progress.so_far(reporting.report(job, machine.found, [*before, *(s.run for s in seats)]))

    with ExitStack() as stack:
        # Left last: the children are gone by then, so no thread still waits for one.
        builders = stack.enter_context(ThreadPoolExecutor(max_workers=at_once))
        for wave in range(0, len(group), at_once):
            # Children are started here: the kernel ends a child with the thread that started it.
            started = [
                stack.enter_context(seated(candidate, job, progress, share_of_cores(machine.device, sharing)))
                for candidate in group[wave : wave + at_once]
            ]
            seats += started
            door = Door(max(started, key=lambda s: _effort(s.candidate)).key)
            for done in as_completed([builders.submit(_prepared, seat, job, spec, door, told, at_once) for seat in started]):
                done.result()
                so_far()
        fast, slow = _paced([seat for seat in seats if seat.ok], told, job.bench)
        swift = replace(job, bench=replace(job.bench, max_warmup_s=min(job.bench.max_warmup_s, WARM_S)))
        if len(fast) == 1:
            fast[0].step(lambda s: measured(s, swift, machine))
        elif fast:
            interleaved(fast, swift, [machine], progress)
        for seat in fast:
            seat.step(lambda s: timed(s.run, told[s.key], s.ask("token_times", TokenTimes), machine.device))
        so_far()
        for seat in slow:
            seat.step(lambda s: _alone(s, told[s.key].call_s or 0.0, job, machine))
            seat.step(lambda s: timed(s.run, told[s.key], s.ask("token_times", TokenTimes), machine.device))
            so_far()
        if slow:
            _against_the_first(seats, fast)
        return seats


def _against_the_first(seats: Sequence[Seat], fast: Sequence[Seat]) -> None:
    """Those that did not take turns with the first of all, by the times of whole calls; what the others were held against meanwhile was not that first one."""
    first = next((seat for seat in seats if seat.ok), None)
    for seat in seats:
        if first is None or not seat.ok or seat is first:
            continue
        if seat not in fast or first not in fast:
            seat.run = replace(seat.run, relative=apart(first.run.samples_ns, seat.run.samples_ns))
    if first is not None and first.run.relative is not None:
        first.run = replace(first.run, relative=None)


def apart(base: Sequence[int], mine: Sequence[int]) -> Relative:
    """Two runs that were timed one after the other, in ns: medians, and from the fastest call of one to the slowest of the other. Not inconclusive only where they do not meet."""
    low, high = min(base) / max(mine), max(base) / min(mine)
    verdict = "faster" if low > 1 + PRACTICAL else "slower" if high < 1 - PRACTICAL else "inconclusive"
    return Relative(
        ratio=median(base) / median(mine),
        ci95_low=low,
        ci95_high=high,
        num_pairs=0,
        verdict=verdict,
        threshold=PRACTICAL,
        reason="not timed in turns: the interval spans all calls of both",
    )


def _at_once(num: int, job: Job, device: Device) -> int:
    """Children that build at the same time. Tracing and compiling keep one core busy for minutes, and generate() as shipped another; a CPU's own cores are what is timed."""
    if device.kind == "cpu":
        return 1
    return max(1, min(num, job.bench.build_jobs or cores() // CORES_A_BUILD, MOST_AT_ONCE))


def _effort(candidate: Candidate) -> int:
    """Who compiles longest loads first."""
    way = generation.resolve(candidate.backend)
    return way.compiles * (1 + len(way.options))


def _prepared(seat: Seat, job: Job, spec: GenerateSpec, door: Door, told: dict[str, GenerationBuilt], at_once: int) -> None:
    """Load, build, compare tokens. Host memory is asked for before, and given back when the weights are on the device."""
    if seat.run.reproduce:
        seat.run = replace(seat.run, reproduce=f"{seat.run.reproduce} --generate {spec.new_tokens}")
    if at_once > 1:
        note = f"built beside {at_once - 1} others at most: its compile time and cold start are upper bounds"
        seat.run = replace(seat.run, notes=(*seat.run.notes, note))
    with door.passing(seat.key) as inside:

        def opened(s: Seat) -> Run:
            found = s.ask("load", facts.Loaded, candidate=s.candidate)
            inside.weighs(_host_bytes(found, s.candidate))
            return figures.loaded(s.run, found)

        def ready(s: Seat) -> Run:
            def show(fraction: float | None, note: str) -> None:
                if note == PLACED:
                    inside.leave()
                s.progress.update(s.key, fraction, note)

            told[s.key] = s.child.call(
                "generate",
                GenerationBuilt,
                timeout_s=s.spec.timeout_s,
                on_progress=show,
                generate=spec,
                verify=job.bench.verify != "off",
            )
            return verified(s.run, told[s.key])

        seat.step(opened)
        seat.step(ready)


def _host_bytes(found: facts.Loaded, candidate: Candidate) -> int:
    """What one more of these takes while it loads: its weights as they come, and a copy of them where they are changed."""
    own = (found.num_parameters or 0) * DTYPE_BYTES.get(found.dtype or "float32", 4)
    changes = candidate.precision is not None and candidate.precision.carrier.dtype != found.dtype
    return own * (2 if changes or candidate.transforms != Transforms() else 1)


def _paced(live: Sequence[Seat], told: Mapping[str, GenerationBuilt], spec: BenchSpec) -> tuple[list[Seat], list[Seat]]:
    """Those that take turns, and those so much slower than the fastest that turns would cost all the time and tell nothing more."""
    calls = {seat.key: told[seat.key].call_s for seat in live}
    fastest = min((s for s in calls.values() if s is not None), default=0.0)
    limit = max(spec.max_time_s / MIN_PAIRS, FAR_SLOWER * fastest)
    slow = [seat for seat in live if (calls[seat.key] or 0.0) > limit]
    return [seat for seat in live if seat not in slow], slow


def _alone(seat: Seat, call_s: float, job: Job, machine: Machine) -> Run:
    """A few calls, as many as its time allows, after one that warms up; memory, and no energy: that would be as many again."""
    calls = max(FEWEST_CALLS, min(job.bench.min_iterations, int(job.bench.max_time_s / call_s)))
    block = replace(job.bench, min_iterations=calls, block_ms=1.0, max_time_s=2 * MIN_PAIRS * calls * call_s)
    seat.sampled = seat.ask("block", facts.Measured, spec=block).samples
    found = replace(seat.ask("meters", facts.Measured, spec=replace(job.bench, energy_s=0.0)), samples=seat.sampled)
    note = f"timed alone over {calls} calls of {call_s:.3g} s: far slower than the fastest, it took no turns with the others"
    return machine.judged(lambda device: figures.measured(replace(seat.run, notes=(*seat.run.notes, note)), found, device, None))


def verified(run: Run, found: GenerationBuilt) -> Run:
    """With what the child found out before it was timed. Other tokens than eager's, and no tie to explain them, end the run."""
    generated = found.generated
    run = replace(run, generated=generated, compile_s=found.compile_s, cold_start_s=found.cold_start_s, notes=(*run.notes, *found.notes))
    if found.passed is None:
        return run
    accuracy = Accuracy(
        passed=found.passed,
        reference=REFERENCE,
        worst_output="tokens",
        relative_rmse=0.0 if generated.equal else None,
        reason=generated.reason,
        notes=(generated.reason,) if generated.reason and found.passed else (),
    )
    run = replace(run, accuracy=accuracy)
    if found.passed:
        return run
    return replace(
        run,
        status=Status.ACCURACY_FAIL,
        reason=generated.reason,
        fix="another way to run it or another precision; --verify off times it all the same",
    )


def timed(run: Run, found: GenerationBuilt, times: TokenTimes, device: Device) -> Run:
    """With tokens a second, and what reading allows. `run` has the times of whole calls."""
    told = found.generated
    decode_ms = tuple(ns / 1e6 for ns in times.decode_ns)
    step_ms = median(decode_ms) if decode_ms else None
    told = replace(
        told,
        prefill_ms=median(times.prefill_ns) / 1e6 if times.prefill_ns else None,
        decode_ms=decode_ms[-KEPT_TIMES:],
        ms_per_token=step_ms,
        tokens_per_s=told.batch * 1e3 / step_ms if step_ms else None,
        tokens_per_s_overall=told.batch * told.new_tokens * 1e3 / run.latency_ms.median if run.latency_ms else None,
    )
    return replace(run, generated=bounded(told, found, device, run.precision))


def bounded(told: Generated, found: GenerationBuilt, device: Device, precision: str | None) -> Generated:
    """With its bound and the bounds of larger batches, where this device's bandwidth was measured."""
    row = device.ceilings.find("memory", "measured")
    mine, full = found.kv_bytes_a_sequence, found.full_kv_bytes_a_sequence
    if row is None or told.weight_bytes is None or told.kv_bytes is None or mine is None or full is None:
        return told
    most = bounds.bound(batch=told.batch, weight_bytes=told.weight_bytes, kv_bytes=told.kv_bytes, bandwidth=row.value)
    return replace(
        told,
        bound_tokens_per_s=most,
        ceiling=f"{row.value / 1e9:.4g} GB/s measured: {row.source}",
        pct_of_bound=100 * told.tokens_per_s / most if told.tokens_per_s else None,
        larger_batches=bounds.larger(
            batch=told.batch,
            weight_bytes=told.weight_bytes,
            kv_bytes=mine,
            full_kv_bytes=full,
            step_flops=(told.step_flops or 0.0) / told.batch,
            bandwidth=row.value,
            peak=device.ceilings.flops(precision, "measured"),
            memory_bytes=device.memory_bytes,
            held_bytes=found.held_bytes,
        ),
    )
