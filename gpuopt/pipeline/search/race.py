"""Finalists -> what each takes against the input: all alive at once, verified in full, timed in interleaved pairs; those clearly behind leave after the first few."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median

from gpuopt.core import stats
from gpuopt.core.result import Run, Samples, Status
from gpuopt.core.search import Timed
from gpuopt.pipeline import pairs
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.crew import Crew, Member
from gpuopt.pipeline.search.questions import Finals
from gpuopt.pipeline.seats import Seat, interleaved

FIRST_PAIRS = 8
"""Interleaved pairs after which finalists that are clearly behind leave: enough for a 95% interval."""


def raced(crew: Crew, question: Finals) -> tuple[dict[str, Timed], dict[str, Run]]:
    """Key -> what the pairs said, and the run that holds it."""
    members = []
    for number, candidate in enumerate(question.candidates):
        crew.expect(question.candidates[number:])
        members.append(crew.seat(candidate))
    crew.ahead.close()
    _verify(crew, members)
    everyone = [member.seat for member in members]
    base = everyone[0]
    for seat in everyone:
        seat.sampled = Samples()
    running = [seat for seat in everyone if seat.ok]
    few = min(FIRST_PAIRS, crew.job.bench.num_pairs)
    if base.ok and len(running) > 3 and few < crew.job.bench.num_pairs:
        short = replace(crew.job, bench=replace(crew.job.bench, num_pairs=few, energy_s=0.0))
        interleaved(running, short, [crew.machine], crew.progress)
        running = _halved(crew, base, [seat for seat in running if seat is not base and seat.ok])
    if base.ok and len(running) > 1:
        for seat in running:
            seat.sampled = Samples()
        interleaved(running, crew.job, [crew.machine], crew.progress)
    timed = {tune.key(seat.candidate): _told(crew, base, seat) for seat in everyone}
    return timed, {tune.key(seat.candidate): seat.run for seat in everyone}


def _verify(crew: Crew, members: list[Member]) -> None:
    """In full, side by side: nothing is timed meanwhile. The input is what they are held against."""
    unsure = [member for member in members if member.seat.ok and member.seat.candidate != crew.base]
    with ThreadPoolExecutor(max_workers=crew.jobs) as pool:
        for done in [pool.submit(crew.prove, member, crew.job.bench.verify) for member in unsure]:
            done.result()


def _halved(crew: Crew, base: Seat, others: list[Seat]) -> list[Seat]:
    """The input and the better half."""

    def cost(seat: Seat) -> float:
        return median(seat.sampled.samples_ns) / crew.share(seat.candidate) if seat.sampled.samples_ns else float("inf")

    return [base, *sorted(others, key=cost)[: max(1, (len(others) + 1) // 2)]]


def _told(crew: Crew, base: Seat, seat: Seat) -> Timed:
    run, search = seat.run, crew.job.search
    if not seat.ok or run.latency_ms is None:
        return Timed(status=run.status.value if not seat.ok else Status.SKIPPED.value, reason=run.reason or "it was not timed")
    ms = run.latency_ms.median
    if seat is base:
        return Timed(status=Status.OK.value, ms=ms, ratio=1.0, peak_bytes=run.peak_bytes)
    try:
        mine = _per_sample(seat, base) if search.goal == "throughput" else seat.sampled
        relative = stats.compare_pairs(pairs.split(base.sampled), pairs.split(mine), threshold=search.min_gain)
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
    scale = tune.batch_of(base.candidate) / tune.batch_of(seat.candidate)
    return replace(seat.sampled, samples_ns=tuple(max(1, round(ns * scale)) for ns in seat.sampled.samples_ns))
