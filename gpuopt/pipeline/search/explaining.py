"""A candidate -> what a search learns from tracing it (the facts the others are predicted from, the changes the doctor proposes), and what must stay in fp32 in one
that is inaccurate."""

from __future__ import annotations

from dataclasses import replace

from gpuopt.converters import rewrites
from gpuopt.core.result import Count, Run, Sensitivity, Status
from gpuopt.core.spec import Candidate, Job, Precision
from gpuopt.pipeline import facts, seats
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.crew import Crew
from gpuopt.pipeline.search.questions import Explained, Mended, Proposal
from gpuopt.pipeline.seats import Seat, diagnose, loaded, measured, profiled
from gpuopt.pipeline.traits import Traits
from gpuopt.profiling import bounds as roofline_bounds

MEND_S = 120.0
"""For the search of modules that have to stay in fp32."""
AFTER_QUERY_KEY_VALUE = 3
"""Commas in the shapes of an attention that reads a fourth tensor, its mask."""
UNTRACED = 2.0
"""Times the roofline of its ops that a GPU is taken to work on a call of which there is no trace; it waits for the host the rest of the time."""


def explained(crew: Crew, candidate: Candidate) -> tuple[Explained, Run]:
    """Without the seconds it took. One that cannot be timed at length or traced (a busy machine, a profiler that crashes) says why, and is explained by what is
    known without: its time in screening, its FLOPs and bytes, the ceilings. Its child ends, because a profiler that ran once slows what comes after it."""
    key = tune.key(candidate)
    seat = crew.seat(candidate).seat
    screened = seat.run if seat.run.latency_ms is not None else crew.runs.get(key, seat.run)
    job = replace(crew.job, bench=replace(crew.job.bench, max_time_s=min(2.0, crew.job.bench.max_time_s), energy_s=0.0))
    with crew.ahead.still():
        seat.step(lambda s: measured(s, job, crew.machine))
    timed = seat.run if seat.ok else replace(screened, status=Status.OK, reason="", fix="")
    with crew.ahead.still():
        seat.step(lambda s: crew.machine.judged(lambda device: profiled(s, job, device)))
    proposals = _proposals(crew, seat, job) if seat.ok else ()
    reason = "" if seat.ok else seat.run.reason
    found: tune.Facts | None = None
    if candidate == crew.base and timed.latency_ms is not None:
        found = replace(
            _facts(crew, timed, seat.run if seat.ok else None, seat.count),
            masked_attention=_masked_attention(seat.count, seat.run if seat.ok else None),
            unfilled=(seat.unfilled or 0.0) if seat.ok else 0.0,
        )
    if reason:
        crew.progress.warn(f"no trace of {tune.words(candidate, crew.base)}: {reason}")
    run = seat.run if seat.ok or timed.latency_ms is None else timed
    crew.dismiss(key)
    return Explained(facts=found, proposals=proposals, reason=reason), run


def mended(crew: Crew, candidate: Candidate) -> Mended:
    """Without the seconds it took. In a child of its own that builds nothing: copies of the model are cast, with more and more of it kept."""
    with seats.seated(candidate, replace(crew.job, candidates=(candidate,)), crew.progress) as seat:
        try:
            seat.step(loaded)
            if not seat.ok:
                return Mended(note=seat.run.reason)
            found = seat.ask("sensitivity", Sensitivity, tolerance=crew.job.tolerance, seconds=MEND_S)
        except ChildFailed as failure:
            return Mended(note=f"no set of modules to keep was looked for: {failure.reason}")
    return Mended(kept=found.kept, note=found.note)


def _proposals(crew: Crew, seat: Seat, job: Job) -> tuple[Proposal, ...]:
    try:
        return tuple(
            Proposal(change=f.change, origin=f.code, gain_low_ms=f.gain_low_ms or 0.0, gain_high_ms=f.gain_high_ms or 0.0)
            for f in diagnose(seat, job, crew.machine)
            if f.change is not None
        )
    except ChildFailed as failure:
        crew.progress.warn(f"no proposals of the doctor: {failure.reason}")
        return ()


def _facts(crew: Crew, timed: Run, traced: Run | None, count: Count | None) -> tune.Facts:
    """Of the input. `timed`: its run before it was traced; without a trace (None) the roofline of its `count` says how long the device has to work."""
    device = crew.machine.device
    assert timed.latency_ms is not None
    wall_ms = timed.latency_ms.median
    traits, cannot = _surroundings(crew)
    # As it was loaded: what a candidate without a precision is asked for, whatever the input turned out to compute in.
    asked = timed.precision_audit.requested if timed.precision_audit is not None else None
    own = Precision(asked or timed.precision or Precision.FP32)
    found = traced.bounds if traced is not None else None
    if found is None and count is not None:
        found = roofline_bounds.build(count, device.ceilings)
    bounds, floors = {}, {}
    if found is not None:
        bounds = {own.value: found.unfused_ms} | dict(found.by_precision)
        floors = {own.value: found.fused_ms} | dict(found.fused_by_precision)
    if (floors.get(own.value) or 0.0) > wall_ms:  # ceilings that the input itself beats were taken on a busy machine: they rule nothing out
        floors = {}
    waits = 0.0
    if traced is not None and traced.waterfall is not None:
        waits = traced.waterfall.idle_ms + (traced.waterfall.ms("python and framework") if device.kind == "cpu" else 0.0)
    elif traced is None and device.kind == "cuda" and found is not None and found.unfused_ms:
        waits = max(0.0, wall_ms - UNTRACED * found.unfused_ms)
    return tune.Facts(
        wall_ms=wall_ms,
        idle_ms=min(waits, wall_ms),
        own=own,
        on_gpu=device.kind == "cuda",
        batch=timed.batch or 1,
        bounds_ms={k: v for k, v in bounds.items() if v},
        floors_ms={k: v for k, v in floors.items() if v},
        has_batch_norm=traits.has_batch_norm,
        has_convolutions=traits.has_convolutions,
        has_products=traits.has_products,
        rewrites={text: why or rewrites.lacks_kernel(text, device.kind) for text, why in traits.rewrites.items()},
        cannot=cannot,
        peak_bytes=timed.peak_bytes,
        memory_bytes=device.memory_bytes,
    )


def _masked_attention(count: Count | None, traced: Run | None) -> float:
    """Share of the call in attention, where some of it is given a mask: of its time where a trace tells, else of its FLOPs. 0 where none is."""
    ours = [r for r in count.records if "attention" in r.op] if count is not None else []
    if count is None or not any(r.shapes.count(",") >= AFTER_QUERY_KEY_VALUE for r in ours):
        return 0.0
    timed = [(p.name, p.time_ns) for p in traced.roofline if p.time_ns] if traced is not None else []
    whole = sum(ns for _, ns in timed)
    by_time = sum(ns for name, ns in timed if "attention" in name) / whole if whole else 0.0
    # Attention that fell to products and a softmax has no name of its own in a trace.
    return max(by_time, sum(r.flops or 0.0 for r in ours) / count.flops if count.flops else 0.0)


def _surroundings(crew: Crew) -> tuple[Traits, dict[str, str]]:
    """What kinds of layers the model has, and what the matrix of backends rules out, so that nothing is built to find that out. One child tells both."""
    try:
        with crew.helper() as child:
            traits = child.call("traits", Traits, timeout_s=crew.job.bench.timeout_s, ref=crew.base.model)
            matrix = child.call(
                "matrix", facts.Matrix, timeout_s=machines.SURVEY_TIMEOUT_S, device_id=crew.base.device, candidate=crew.base
            )
    except ChildFailed as failure:
        crew.progress.warn(f"no rewrites are tried, and what cannot run shows when it is built: {failure.reason}")
        return Traits(has_products=True), {}
    cannot: dict[str, str] = {}
    for cell in matrix.cells:
        if cell.reason or not cell.route:
            cannot[cell.backend] = cell.reason or "no way from this form"
        cannot.update({f"{cell.backend}@{p}": why for p, why in cell.precisions.items() if why})
    return traits, cannot
