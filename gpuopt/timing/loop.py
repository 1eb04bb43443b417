"""A call and a clock -> samples: warm-up to steady state, one block of a pair, a whole measurement with its stop rule."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

from gpuopt.core.errors import Unavailable
from gpuopt.core.result import Samples
from gpuopt.core.spec import BenchSpec
from gpuopt.core.stats import MIN_PAIRS, is_steady, relative_noise
from gpuopt.timing.clocks import RESOLUTIONS_PER_SAMPLE, Call, Clock

MAX_CALLS = 20_000
"""A chunk between two synchronisations: bounds events in flight, and the time until a stop rule is asked again."""
PILOT_CALLS = 3
"""Untimed-for-the-record calls before a block: they size it, and bring caches and clocks back after the other side's block."""
WINDOW_CALLS = 5
"""Fewest calls of a warm-up window that is not short of time."""
MIN_SAMPLES = 3
"""What a measurement of very slow calls takes even when its time is over."""


def warm_up(call: Call, clock: Clock, spec: BenchSpec) -> tuple[tuple[int, ...], bool]:
    """Call until two windows in a row agree and `spec.warmup_s` has passed -> (ns of every warm-up call, whether it became steady).

    Gives up after `spec.max_warmup_s`; the caller reports that. Calls too slow for two full windows get windows of one call.
    """
    with _no_gc():
        return _warm_up(call, clock, spec)


def block(call: Call, clock: Clock, spec: BenchSpec) -> Samples:
    """One block of an interleaved pair: at least `spec.block_ms` and `spec.min_iterations` calls, after a short pilot kept as warm-up.

    Fewer calls where as many blocks as a verdict needs would not fit `spec.max_time_s`.

    Raises Unavailable when the clock cannot see the call pass.
    """
    with _no_gc(collect=False):
        pilot = _pilot(call, clock, spec.block_ms * 1e6)
        inner = _inner(pilot, clock)
        affordable = max(1, int(spec.max_time_s * 1e9 / MIN_PAIRS / _typical(pilot)))
        taken, _ = _block(call, clock, _typical(pilot), spec.block_ms * 1e6, min(spec.min_iterations, affordable), inner)
    return _finish(taken, pilot, inner)


def measure(call: Call, clock: Clock, spec: BenchSpec, progress: Callable[[float], None] | None = None) -> Samples:
    """Warm up, then blocks until `min_time_s` has been measured and the median is known to `target_noise`, or `max_time_s` is over.

    `progress` gets the share done, 0..1. Time is the clock's own, so a fake clock needs no waiting. Raises Unavailable when the clock cannot see the call pass.
    """
    report = progress or _ignore
    report(0.0)
    min_ns, max_ns = spec.min_time_s * 1e9, spec.max_time_s * 1e9
    with _no_gc():
        warmup, steady = _warm_up(call, clock, spec)
        pilot = _pilot(call, clock, spec.block_ms * 1e6)
        inner = _inner(pilot, clock)
        per_call = _typical(pilot)
        taken, measured = Samples(), 0
        while True:
            # min_iterations gives way to max_time_s, or ten calls of a minute each would take ten minutes.
            affordable = max(MIN_SAMPLES, int((max_ns - measured) / per_call))
            chunk, wall_ns = _block(call, clock, per_call, min(spec.block_ms * 1e6, max_ns), min(spec.min_iterations, affordable), inner)
            taken, measured = taken + chunk, measured + wall_ns
            per_call = _typical(taken.samples_ns)
            noise = relative_noise(taken.samples_ns)
            precise = noise is not None and noise <= spec.target_noise and len(taken.samples_ns) >= spec.min_iterations
            if measured >= max_ns or (measured >= min_ns and precise):
                break
            report(min(0.99, _share_done(measured, min_ns, max_ns, noise, spec.target_noise)))
    report(1.0)
    return replace(_finish(taken, warmup + pilot, inner), steady=steady)


def _warm_up(call: Call, clock: Clock, spec: BenchSpec) -> tuple[tuple[int, ...], bool]:
    target_ns, limit_ns = spec.warmup_s * 1e9, spec.max_warmup_s * 1e9
    # The first call may compile or allocate: it counts against the limit alone, neither as warm-up time nor as the size of a window.
    samples, spent = clock.time_calls(call, 1)
    second, wall = clock.time_calls(call, 1)
    samples, spent, warm = samples + second, spent + wall, wall
    per_call = max(_typical(second), float(wall), 1.0)
    previous: tuple[int, ...] = ()
    while True:
        wanted = max(WINDOW_CALLS, math.ceil(target_ns / 2 / per_call))
        affordable = int((limit_ns - spent) / 2 / per_call)
        window, wall = clock.time_calls(call, max(1, min(wanted, affordable, MAX_CALLS)))
        samples, spent, warm = samples + window, spent + wall, warm + wall
        per_call = max(_typical(window), wall / max(len(window), 1), 1.0)
        if warm >= target_ns and is_steady(previous, window):
            return samples, True
        if spent >= limit_ns or not wall:
            return samples, False
        previous = window


def _block(call: Call, clock: Clock, per_call_ns: float, block_ns: float, min_iterations: int, inner: int) -> tuple[Samples, int]:
    """Samples that together last `block_ns`, and how long they took; one chunk where the estimate holds: each synchronisation lets the device run dry."""
    samples: tuple[int, ...] = ()
    wall_ns = 0
    while wall_ns < block_ns or len(samples) < min_iterations:
        missing = math.ceil(1.02 * (block_ns - wall_ns) / (per_call_ns * inner))
        more, wall = clock.time_calls(call, min(MAX_CALLS, max(missing, min_iterations - len(samples), 1)), inner)
        samples, wall_ns = samples + more, wall_ns + wall
        if not more or min(more) <= 0 or wall <= 0:
            raise Unavailable(
                f"the clock {clock.name} saw no time pass over {len(more)} samples",
                fix="give a call more work: a larger batch or a longer input",
            )
        per_call_ns = max(per_call_ns, _typical(samples) / 2)
    # Where a sample averages several calls, wall_ns is scaled alike: wall_ns / len(samples) is always host time a call.
    return Samples(samples_ns=samples, wall_ns=wall_ns // inner, clock=clock.name, block_sizes=(len(samples),)), wall_ns


def _pilot(call: Call, clock: Clock, block_ns: float) -> tuple[int, ...]:
    """One call that fills a block by itself is pilot enough."""
    first, wall_ns = clock.time_calls(call, 1)
    return first if wall_ns >= block_ns else first + clock.time_calls(call, PILOT_CALLS - 1)[0]


def _typical(samples_ns: tuple[int, ...]) -> float:
    return max(float(median(samples_ns)), 1.0)


def _inner(pilot: tuple[int, ...], clock: Clock) -> int:
    """Calls that share one sample, so that the clock's step stays below 2% of it."""
    return max(1, math.ceil(RESOLUTIONS_PER_SAMPLE * clock.resolution_ns / _typical(pilot)))


def _finish(samples: Samples, warmup: tuple[int, ...], inner: int) -> Samples:
    clock = samples.clock if inner == 1 else f"{samples.clock}, {inner} calls a sample"
    return replace(samples, warmup_ns=warmup + samples.warmup_ns, clock=clock)


def _share_done(measured: float, min_ns: float, max_ns: float, noise: float | None, target: float) -> float:
    """The interval narrows with the square root of time, so noise twice the target means a quarter of the way."""
    if noise is None or noise <= target:
        return measured / min_ns if min_ns else 1.0
    return max(measured / max_ns, min(measured / min_ns if min_ns else 1.0, (target / noise) ** 2))


def _ignore(share: float) -> None:
    """No one watches."""


@contextmanager
def _no_gc(*, collect: bool = True) -> Iterator[None]:
    """A collection in a timed loop is noise of ours: collect before, keep it off within, restore what was found.

    Not before each block of a pair: with torch loaded a collection takes longer than the block, and cools down what it is to measure.
    """
    was_enabled = gc.isenabled()
    if collect:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
