"""A Job with `generate` -> Report: every way to generate in a child of its own, tokens compared, whole generations timed in interleaved blocks, and each held against the
bound that reading the weights sets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from gpuopt import generation
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.generation import Generated, GenerateSpec, GenerationBuilt, TokenTimes
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import Accuracy, Device, Report, Run, Status
from gpuopt.core.spec import BackendSpec, Candidate, Job
from gpuopt.generation import bounds
from gpuopt.pipeline import groups, reporting
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.machine import Machine
from gpuopt.pipeline.seats import Seat, interleaved, loaded, measured, seated

REFERENCE = "tokens of eager generate(), same dtype"
KEPT_TIMES = 1024
"""Token times a report keeps of a run."""


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
    job, found = machines.all_surveyed(job, progress)
    if len(found) > 1:
        raise UsageError("generation is timed on one device at a time", fix="--device cuda")
    (machine,) = found
    job = replace(job, candidates=_ways(job.candidates, spec, machine.device))
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
    names = generation.UNASKED.get(device.kind, generation.UNASKED["cpu"])
    return tuple(replace(c, backend=BackendSpec.parse(name)) for c in candidates for name in names)


def _group(
    group: Sequence[Candidate], job: Job, spec: GenerateSpec, machine: Machine, progress: Progress, before: Sequence[Run]
) -> list[Seat]:
    """Build and compare tokens one after the other, then time what is left in blocks that take turns."""
    with ExitStack() as stack:
        seats: list[Seat] = []
        told: dict[str, GenerationBuilt] = {}
        for candidate in group:
            seat = stack.enter_context(seated(candidate, job, progress))
            seats.append(seat)
            if seat.run.reproduce:
                seat.run = replace(seat.run, reproduce=f"{seat.run.reproduce} --generate {spec.new_tokens}")
            seat.step(lambda s: loaded(s))

            def prepared(s: Seat) -> Run:
                told[s.key] = s.ask("generate", GenerationBuilt, generate=spec, verify=job.bench.verify != "off")
                return verified(s.run, told[s.key])

            seat.step(prepared)
            progress.so_far(reporting.report(job, machine.found, [*before, *(s.run for s in seats)]))
        live = [seat for seat in seats if seat.ok]
        if len(live) == 1:
            live[0].step(lambda s: measured(s, job, machine))
        elif live:
            interleaved(live, job, [machine], progress)
        for seat in live:
            seat.step(lambda s: timed(s.run, told[s.key], s.ask("token_times", TokenTimes), machine.device))
        return seats


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
