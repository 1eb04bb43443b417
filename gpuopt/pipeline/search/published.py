"""The best candidate of a search -> a bundle, and what it cost to find: at the end, or where the search is interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.search import Economics, Search
from gpuopt.pipeline import outputs
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.crew import Crew, Member


def published(crew: Crew, found: Search, target: Path) -> Search:
    """The winner as a bundle. One that cannot be written is said so, and the search's findings stay."""
    assert found.choice is not None
    key = found.choice.key
    member = crew.seat(crew.known[key])
    seat = member.seat
    if not seat.ok:
        raise UsageError(f"the winner could not be built again: {seat.run.reason}", fix=seat.run.fix or "--resume tries again")
    _write(crew, member, key, target)
    crew.runs[key] = seat.run
    if not seat.ok:
        if seat.error is not None:
            raise seat.error
        raise UsageError(f"the bundle could not be written: {seat.run.reason}", fix=seat.run.fix)
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    return replace(found, economics=economics(crew, found, size))


def rescued(crew: Crew, target: Path) -> None:
    """After Ctrl-C: the best verified candidate so far, where it is better than the input. What goes wrong now is not told over the interrupt."""
    crew.ahead.close()  # nobody builds for what is not tried any more
    progress, base_key = crew.progress, tune.key(crew.base)
    key = min(crew.costs, key=lambda k: crew.costs[k], default=base_key)
    if key == base_key:
        progress.warn("interrupted before anything better than the input was found: no bundle was written")
        return
    if key not in crew.alive:
        progress.warn("interrupted: building the best so far once more to write it; interrupt again to leave at once")
    try:
        member = crew.seat(crew.known[key])
        if member.seat.ok:
            _write(crew, member, key, target)
        if not member.seat.ok:
            progress.warn(f"interrupted, and the best so far could not be written: {member.seat.run.reason}")
            return
        progress.warn(f"interrupted: {target.name} holds the best so far, {tune.words(crew.known[key], crew.base)}; --resume goes on")
    except GpuoptError as error:
        progress.warn(f"interrupted, and the best so far could not be written: {error.message}")


def _write(crew: Crew, member: Member, key: str, target: Path) -> None:
    """With the figures it was chosen for, and verified as far as was asked: a bundle carries the outputs it is held against wherever it is opened."""
    member.seat.run = crew.runs[key]
    crew.prove(member, crew.job.bench.verify)
    job = replace(crew.job, force=crew.job.force or crew.job.search.resume)
    if member.seat.ok:
        outputs.write_bundle(member.seat, job, target, crew.progress)


def economics(crew: Crew, found: Search, artifact_bytes: int | None) -> Economics:
    """What the change costs, and after how many calls it has paid for itself."""
    assert found.choice is not None
    run, base = crew.runs.get(found.choice.key), crew.runs.get(tune.key(crew.base))
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
