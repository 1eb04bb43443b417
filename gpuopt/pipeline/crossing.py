"""Runs of one model on several devices -> curves over batch, where they cross, why, and what memory allows. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gpuopt.core import stats
from gpuopt.core.result import Device, Run, Samples, Status, Waterfall
from gpuopt.core.sweep import Cause, Crossover, Curve, Memory, Point, Versus
from gpuopt.pipeline import pairs

COPY_PARTS = ("host-to-device (pageable)", "host-to-device (pinned)", "copy calls", "device-to-host")
USABLE = {"cuda": 0.95, "cpu": 0.9}
"""Share of the free memory a model may take. On a GPU its context, library workspaces and gaps between allocations need the rest; on a CPU, everybody else."""
MIN_SHARE = 0.25
"""A part of the wall time below this is no cause of anything, however close the two devices are."""

Key = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What of a traced call's wall time the device did not compute in, 0..1 each."""

    waits: float
    launches: float
    copies: float


def shares(fall: Waterfall) -> Shares | None:
    """None for a call that took no time."""
    if fall.wall_ms <= 0:
        return None
    return Shares(
        waits=min(1.0, fall.idle_ms / fall.wall_ms),
        launches=min(1.0, fall.ms("launch gaps") / fall.wall_ms),
        copies=min(1.0, fall.ms(*COPY_PARTS) / fall.wall_ms),
    )


def without_device(run: Run) -> Key:
    """What two runs have in common that are the same question to two devices, whatever the batch."""
    rest = tuple(sorted((k, v) for k, v in run.dims.items() if k != "N"))
    return (run.model, run.backend, run.preset, repr(sorted(run.options.items())), run.precision, run.transforms, run.input_mode, rest)


def key(run: Run) -> Key:
    """The curve a run lies on."""
    return (run.device, *without_device(run))


def curve(runs: Sequence[Run], explained: Mapping[Key, Shares], stopped: str = "", among: Sequence[Run] = ()) -> Curve:
    """`among`: all runs of the report, which the curve is told apart from. The runs of one candidate on one device; those that were timed are its points. `explained`: shares by (`key`, batch)."""
    one = next((run for run in runs if _is_timed(run)), runs[0])
    timed = sorted((run for run in runs if _is_timed(run)), key=lambda run: run.batch or 1)
    return Curve(
        device=one.device or "",
        what=what(one, among or runs),
        model=one.model,
        backend=one.backend,
        preset=one.preset,
        precision=one.precision,
        transforms=one.transforms,
        input_mode=one.input_mode,
        dims={k: v for k, v in one.dims.items() if k != "N"},
        points=tuple(_point(run, explained.get((*key(run), run.batch))) for run in timed),
        stopped=stopped,
    )


def _is_timed(run: Run) -> bool:
    return run.status is Status.OK and run.latency_ms is not None


def _point(run: Run, shares: Shares | None) -> Point:
    assert run.latency_ms is not None
    return Point(
        batch=run.batch or 1,
        latency_ms=run.latency_ms.median,
        low_ms=run.latency_ms.ci95_low,
        high_ms=run.latency_ms.ci95_high,
        samples_per_s=run.samples_per_s or 0.0,
        pct_of_measured=run.pct_of_measured,
        peak_bytes=run.peak_bytes,
        waits=shares.waits if shares else None,
        launches=shares.launches if shares else None,
        copies=shares.copies if shares else None,
    )


def versus(first: Run, second: Run) -> Versus | None:
    """The second against the first at one batch; None where they were not timed in the same interleaved blocks."""
    blocks = [pairs.split(Samples(samples_ns=run.samples_ns, block_sizes=run.block_sizes)) for run in (first, second)]
    if not blocks[0] or len(blocks[0]) != len(blocks[1]):
        return None
    found = stats.compare_pairs(blocks[0], blocks[1])
    return Versus(
        batch=first.batch or 1,
        ratio=found.ratio,
        low=found.ci95_low,
        high=found.ci95_high,
        verdict=found.verdict,
        first_ms=_ms(first),
        second_ms=_ms(second),
    )


def crossovers(runs: Sequence[Run], devices: Sequence[Device], explained: Mapping[Key, Shares]) -> tuple[Crossover, ...]:
    """The first device against each other one: alike candidates each, and the fastest of each where there are several. `explained`: shares by (`key`, batch)."""
    timed = [run for run in runs if _is_timed(run)]
    rows = []
    for other in devices[1:]:
        mine, theirs = ([run for run in timed if run.device == device.id] for device in (devices[0], other))
        alike = list(dict.fromkeys(without_device(run) for run in mine if any(without_device(t) == without_device(run) for t in theirs)))
        kinds = [[without_device(run) for run in side] for side in (mine, theirs)]
        for name in alike:
            one = next(run for run in mine if without_device(run) == name)
            sides = [{run.batch or 1: run for run in side if without_device(run) == name} for side in (mine, theirs)]
            rows.append(_crossover(devices[0].id, other.id, what(one, timed), sides, explained))
        several = any(len(set(kind)) > 1 for kind in kinds) or not alike
        for scene in dict.fromkeys(_scene(run) for run in timed) if several else ():
            sides = [_fastest(run for run in side if _scene(run) == scene) for side in (mine, theirs)]
            if all(sides):
                rows.append(_crossover(devices[0].id, other.id, _fastest_words(sides, timed), sides, explained))
    return tuple(row for row in rows if row.points)


def _scene(run: Run) -> Key:
    """Runs that answer the same request at some batch: model, sizes and where the inputs are."""
    return (run.model, run.input_mode, tuple(sorted((k, v) for k, v in run.dims.items() if k != "N")))


def _fastest(runs: Iterable[Run]) -> dict[int, Run]:
    best: dict[int, Run] = {}
    for run in runs:
        batch = run.batch or 1
        if batch not in best or _ms(run) < _ms(best[batch]):
            best[batch] = run
    return best


def _fastest_words(sides: Sequence[Mapping[int, Run]], timed: Sequence[Run]) -> str:
    told = [list(dict.fromkeys(what(run, timed) for _, run in sorted(side.items()))) for side in sides]
    return "fastest of each: " + " against ".join(" or ".join(names) for names in told)


def _ms(run: Run) -> float:
    return run.latency_ms.median if run.latency_ms else math.inf


def what(run: Run, among: Sequence[Run]) -> str:
    """A candidate in words, its device and batch apart: `eager fp32`."""
    parts = [run.model] if len({r.model for r in among}) > 1 else []
    parts += [run.backend + (f":{run.preset}" if run.preset else ""), run.precision or "", *run.transforms]
    parts += [" ".join(f"{k}={v}" for k, v in run.dims.items() if k != "N")] if len({_scene(r) for r in among}) > 1 else []
    parts += [f"{run.input_mode} inputs"] if len({r.input_mode for r in among}) > 1 else []
    return " ".join(part for part in parts if part)


def _crossover(first: str, second: str, told: str, sides: Sequence[Mapping[int, Run]], explained: Mapping[Key, Shares]) -> Crossover:
    shared = sorted(sides[0].keys() & sides[1].keys())
    row = cross(first, second, [point for batch in shared if (point := versus(sides[0][batch], sides[1][batch])) is not None])
    decided = next((point for point in row.points if point.verdict in _SIGNS), None)
    if decided is None:
        return replace(row, what=told)
    loser = 0 if decided.verdict == "faster" else 1  # whoever loses at the smallest batch is who is to be explained
    cause = _cause((first, second)[loser], sides[loser][decided.batch], _ms(sides[1 - loser][decided.batch]), explained)
    return replace(row, what=told, cause=cause)


def _cause(device: str, run: Run, other_ms: float, explained: Mapping[Key, Shares]) -> Cause | None:
    """What is measured to make it lose; None where nothing was, or where it would lose without it too."""
    seen = explained.get((*key(run), run.batch))
    if seen is None:
        return None
    kinds = {"launches": seen.launches, "waits": seen.waits, "copies": seen.copies}
    # The narrowest word first: launches are a part of the waiting.
    for kind in sorted(("launches", "copies"), key=lambda k: -kinds[k]) + ["waits"]:
        left_ms = _ms(run) * (1 - kinds[kind])
        if kinds[kind] >= MIN_SHARE and left_ms < other_ms:
            return Cause(device=device, batch=run.batch or 1, kind=kind, share=kinds[kind], without_ms=left_ms, other_ms=other_ms)
    return None


_SIGNS = {"faster": 1, "slower": -1}


def cross(first: str, second: str, points: Sequence[Versus]) -> Crossover:
    """Where one device takes over from the other. Only batches at which the pairs decided say who wins; between two of them log(ratio) is taken as linear
    over log(batch), and `from_batch` is the first whole batch past its zero."""
    ordered = tuple(sorted(points, key=lambda point: point.batch))
    row = Crossover(first=first, second=second, what="", verdict="undecided", points=ordered)
    decided = [(index, _SIGNS[point.verdict]) for index, point in enumerate(ordered) if point.verdict in _SIGNS]
    if not decided:
        return replace(row, verdict="same") if ordered and all(point.verdict == "same" for point in ordered) else row
    changes = [(a, b) for (a, sign), (b, other) in pairwise(decided) if sign != other]
    last = second if decided[-1][1] > 0 else first
    if not changes:
        return replace(row, verdict="second" if last == second else "first", winner=last)
    if len(changes) > 1:
        return replace(row, verdict="several")
    a, b = changes[0]
    low, high = ordered[a].batch, ordered[b].batch
    at = min(high, max(low + 1, math.ceil(_zero(ordered[a : b + 1]) - 1e-9)))
    return replace(
        row,
        verdict="crosses",
        winner=last,
        from_batch=at,
        between=(low, high),
        interpolated=at not in {p.batch for p in ordered[a : b + 1]},
    )


def _zero(points: Sequence[Versus]) -> float:
    """The batch at which log(ratio) passes zero for good, between the first of these and the last."""
    sign = math.copysign(1.0, math.log(points[-1].ratio))
    for left, right in reversed(list(pairwise(points))):
        y0, y1 = math.log(left.ratio) * sign, math.log(right.ratio) * sign
        if y0 <= 0 < y1:
            share = -y0 / (y1 - y0)
            return math.exp(math.log(left.batch) + share * (math.log(right.batch) - math.log(left.batch)))
    return float(points[-1].batch)


# -- memory -------------------------------------------------------------------------------------------------------------------------------


def memory(points: Sequence[tuple[int, int]], device: Device) -> Memory | None:
    """(batch, peak bytes) -> weights plus so much a sample, by least squares; None under two batches.

    Only the upper half of the batches is fitted where there are many: small ones lie in an allocator's smallest blocks and a library's fixed workspaces.
    """
    rows = sorted(dict(points).items())
    if len(rows) < 2:
        return None
    rows = rows[-max(2, (len(rows) + 1) // 2) :]
    mean_x = sum(x for x, _ in rows) / len(rows)
    mean_y = sum(y for _, y in rows) / len(rows)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in rows) / sum((x - mean_x) ** 2 for x, _ in rows)
    fixed = mean_y - slope * mean_x
    limit = limit_bytes(device)
    known = limit is not None and slope > 0
    return Memory(
        fixed_bytes=fixed,
        bytes_per_sample=slope,
        batches=tuple(x for x, _ in rows),
        misfit=max(abs(fixed + slope * x - y) / y for x, y in rows if y) if any(y for _, y in rows) else 0.0,
        limit_bytes=limit,
        largest_batch=max(0, int(((limit or 0) - fixed) // slope)) if known else None,
        note=""
        if known
        else "it does not grow with the batch"
        if limit is not None
        else "this device does not say how much memory is free",
    )


def limit_bytes(device: Device) -> int | None:
    """What of the device's memory a model may take."""
    free = device.free_bytes if device.free_bytes is not None else device.memory_bytes
    return None if free is None else int(free * USABLE.get(device.kind, 1.0))


def predicted_bytes(found: Memory, batch: int) -> float:
    """Peak at this batch, by the fit."""
    return found.fixed_bytes + found.bytes_per_sample * batch
