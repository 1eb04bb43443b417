"""A candidate -> Screened: built in a child, timed in a few short blocks, verified where it could still win. One that fails is a result too."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from gpuopt.core.errors import ResourceError
from gpuopt.core.result import Run, Samples, Status
from gpuopt.core.search import Screened
from gpuopt.core.spec import BenchSpec
from gpuopt.pipeline import facts, figures, pairs
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.crew import Crew, Member
from gpuopt.pipeline.search.questions import Screen
from gpuopt.pipeline.seats import PASSING, Seat
from gpuopt.profiling.roofline import ImpossibleFigure

BLOCKS = 3
"""Short ones; the median of their calls counts."""


def tried(crew: Crew, question: Screen) -> tuple[Screened, Run]:
    """Without the seconds it took. Its child stays alive where it is one of the best so far."""
    candidate, key = question.candidate, tune.key(question.candidate)
    crew.expect([candidate, *question.ahead])
    member = crew.seat(candidate)
    crew.expect(question.ahead)
    seat = member.seat
    _hold_to_name(crew, seat)
    with crew.ahead.still():
        samples = _quick(seat, _short(crew.job.bench)) if seat.ok else None
    if seat.run.status in PASSING and crew.ahead.coming:  # for memory, or time, that those who build ahead took
        crew.dismiss(key)
        crew.ahead.close()
        member = crew.seat(candidate)
        seat = member.seat
        _hold_to_name(crew, seat)
        samples = _quick(seat, _short(crew.job.bench)) if seat.ok else None
    ms = median(samples.samples_ns) / 1e6 if samples is not None and samples.samples_ns else None
    if not seat.ok or ms is None:
        return _lost(crew, key, member)
    seat.sampled = samples or Samples()
    with crew.ahead.still():
        seat.step(lambda s: _metered(crew, s))
    peak, run = seat.run.peak_bytes, seat.run
    if question.limit_ms is not None and ms > question.limit_ms:
        reason = f"{ms:.4g} ms, and what may be chosen takes less than {question.limit_ms:.4g} ms: not verified"
        crew.dismiss(key)
        return Screened(status=Status.SKIPPED, reason=reason, ms=ms, peak_bytes=peak), figures.failed(run, Status.SKIPPED, reason)
    if candidate != crew.base:
        crew.prove(member, "off" if crew.job.bench.verify == "off" else "precision")
    if not seat.ok:
        return _lost(crew, key, member, ms)
    member.cost_ms = ms / crew.share(candidate)
    crew.make_room()
    return Screened(status=Status.OK, ms=ms, peak_bytes=peak, verified=bool(member.verify)), seat.run


def _hold_to_name(crew: Crew, seat: Seat) -> None:
    """Where precisions were named, the model's own is one of them: a candidate left as it was loaded stands for it, and computes in it or is refused, as in `bench`. The
    input itself is what it is."""
    audit, candidate = seat.run.precision_audit, seat.candidate
    is_named = bool(crew.job.search.precisions) and candidate.precision is None and not candidate.transforms.keep_fp32
    if seat.ok and is_named and candidate != crew.base and audit is not None and not audit.honoured:
        seat.run = figures.not_honoured(seat.run, audit)


def _quick(seat: Seat, spec: BenchSpec) -> Samples | None:
    """Warm, then a few short blocks."""
    found: list[Samples] = []

    def blocks(s: Seat) -> Run:
        s.ask("warm", facts.Measured, spec=spec)
        found.extend(s.ask("block", facts.Measured, spec=spec).samples for _ in range(BLOCKS))
        return s.run

    seat.step(blocks)
    return pairs.joined(found) if seat.ok and found else None


def _short(spec: BenchSpec) -> BenchSpec:
    return replace(
        spec,
        warmup_s=min(spec.warmup_s, 0.2),
        max_warmup_s=min(spec.max_warmup_s, 3.0),
        block_ms=min(spec.block_ms, 50.0),
        min_iterations=min(spec.min_iterations, 5),
    )


def _metered(crew: Crew, seat: Seat) -> Run:
    """Memory, without the second and a half that an energy counter needs, and the figures of the short blocks. A rate that cannot be is left out, and with it all rates:
    ceilings taken in a busy minute end no search, and whoever reaches the finals is judged again."""
    found = seat.ask("meters", facts.Measured, spec=replace(crew.job.bench, energy_s=0.0))
    found = replace(found, samples=seat.sampled)
    try:
        return crew.machine.judged(lambda device: figures.measured(seat.run, found, device, seat.count))
    except (ImpossibleFigure, ResourceError) as error:
        crew.progress.warn(f"no rates of {tune.words(seat.candidate, crew.base)} from its screening: {error}")
        return figures.measured(seat.run, found, crew.machine.device, None)


def _lost(crew: Crew, key: str, member: Member, ms: float | None = None) -> tuple[Screened, Run]:
    """`ms`: what it takes, where it was timed before it failed: one that is fast and inaccurate is worth mending."""
    run = member.seat.run
    if member.seat.error is not None:
        crew.failures[key] = member.seat.error
    crew.dismiss(key)
    return Screened(status=run.status.value, reason=run.reason, ms=ms, peak_bytes=run.peak_bytes), run
