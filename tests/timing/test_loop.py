"""The loop against scripted clocks: what it counts, when it stops, what it refuses."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gpuopt.core.errors import Unavailable
from gpuopt.core.spec import BenchSpec
from gpuopt.timing import clocks, loop

MS = 1_000_000
SPEC = BenchSpec(min_time_s=0.5, max_time_s=2.0, warmup_s=0.1, max_warmup_s=1.0, block_ms=50.0)


def nothing() -> None:
    pass


def settling(start_ns: int, end_ns: int, calls: int) -> Iterator[int]:
    """Falls from start to end over `calls` calls, then stays."""
    for i in range(calls):
        yield start_ns + (end_ns - start_ns) * i // calls
    while True:
        yield end_ns


def test_warm_up_ends_when_two_windows_agree() -> None:
    samples, steady = loop.warm_up(nothing, clocks.FakeClock([MS]), SPEC)
    assert steady
    assert 100 <= len(samples) <= 250


def test_a_slow_first_call_is_not_taken_for_warm_up_time() -> None:
    clock = clocks.FakeClock(itertools.chain([900 * MS], itertools.repeat(MS, 10_000)))
    samples, steady = loop.warm_up(nothing, clock, SPEC)
    assert steady
    assert sum(samples[1:]) >= 0.1e9


def test_warm_up_goes_on_while_times_fall_and_none_of_it_is_counted() -> None:
    clock = clocks.FakeClock(itertools.islice(settling(6 * MS, 2 * MS, 150), 5000))
    found = loop.measure(nothing, clock, replace(SPEC, max_warmup_s=5.0))
    assert found.steady
    assert max(found.samples_ns) < 2.1 * MS
    assert max(found.warmup_ns) == 6 * MS


def test_times_that_never_settle_are_reported_and_bounded() -> None:
    clock = clocks.FakeClock(itertools.accumulate(itertools.repeat(MS // 4, 2000)))
    samples, steady = loop.warm_up(nothing, clock, SPEC)
    assert not steady
    assert 0.5e9 < sum(samples) < 2.5e9


def test_a_call_slower_than_the_whole_warm_up_is_called_a_few_times_only() -> None:
    clock = clocks.FakeClock([30_000 * MS])
    loop.warm_up(nothing, clock, SPEC)
    assert clock.num_calls <= 4


@pytest.mark.parametrize(("call_ns", "expected"), [(MS, 50), (20 * MS, 10), (200 * MS, 10), (40_000, 1250)])
def test_a_block_lasts_50_ms_and_ten_calls(call_ns: int, expected: int) -> None:
    found = loop.block(nothing, clocks.FakeClock([call_ns]), replace(SPEC, max_time_s=20.0))
    assert expected <= len(found.samples_ns) <= expected * 1.05
    assert found.block_sizes == (len(found.samples_ns),)
    assert found.wall_ns == sum(found.samples_ns) >= 50 * MS
    assert len(found.warmup_ns) == (loop.PILOT_CALLS if call_ns < 50 * MS else 1)


def test_a_block_of_slow_calls_leaves_room_for_as_many_blocks_as_a_verdict_needs() -> None:
    found = loop.block(nothing, clocks.FakeClock([100 * MS]), replace(SPEC, max_time_s=2.0))
    assert len(found.samples_ns) == 3  # six blocks of three calls fit two seconds
    assert len(loop.block(nothing, clocks.FakeClock([9000 * MS]), replace(SPEC, max_time_s=2.0)).samples_ns) == 1


def test_a_block_is_long_enough_even_when_its_pilot_was_slow() -> None:
    script = itertools.chain(itertools.repeat(10 * MS, loop.PILOT_CALLS), itertools.repeat(MS, 1000))
    found = loop.block(nothing, clocks.FakeClock(script), SPEC)
    assert (found.wall_ns or 0) >= 50 * MS
    assert set(found.samples_ns) == {MS}


def test_measuring_stops_at_min_time_when_the_median_is_known() -> None:
    found = loop.measure(nothing, clocks.FakeClock([MS]), SPEC)
    assert 0.5e9 <= (found.wall_ns or 0) < 0.6e9
    assert sum(found.block_sizes) == len(found.samples_ns)
    assert found.clock == "fake"


def test_measuring_goes_on_to_max_time_when_it_is_noisy() -> None:
    rng = random.Random(0)
    script = [rng.choice((MS // 2, 2 * MS)) for _ in range(9973)]
    found = loop.measure(nothing, clocks.FakeClock(script), SPEC)
    assert 2.0e9 <= (found.wall_ns or 0) < 2.2e9


def test_noise_that_more_samples_can_cure_ends_between_the_two() -> None:
    rng = random.Random(0)
    script = [int(rng.gauss(1, 0.04) * MS) for _ in range(9973)]
    spec = replace(SPEC, min_time_s=0.1, max_time_s=50.0)
    found = loop.measure(nothing, clocks.FakeClock(script), spec)
    assert 0.2e9 < (found.wall_ns or 0) < 20e9


def test_slow_calls_get_fewer_than_min_iterations_but_never_none() -> None:
    clock = clocks.FakeClock([10_000 * MS])
    found = loop.measure(nothing, clock, SPEC)
    assert len(found.samples_ns) == loop.MIN_SAMPLES


def test_calls_too_short_for_the_clock_share_a_sample_and_the_clock_says_so() -> None:
    clock = clocks.FakeClock([2_000], resolution_ns=500)
    found = loop.block(nothing, clock, SPEC)
    assert set(found.samples_ns) == {2_000}
    assert found.clock == "fake, 13 calls a sample"
    assert clock.num_calls == loop.PILOT_CALLS + 13 * len(found.samples_ns)
    assert (found.wall_ns or 0) / len(found.samples_ns) == pytest.approx(2_000, rel=0.01)


def test_short_calls_are_measured_for_as_long_as_any() -> None:
    clock = clocks.FakeClock([2_000], resolution_ns=500)
    loop.measure(nothing, clock, SPEC)
    assert clock.num_calls * 2_000 < 1.2e9


@pytest.mark.parametrize("step", [loop.block, loop.measure])
def test_time_that_does_not_pass_is_never_a_result(step: object) -> None:
    with pytest.raises(Unavailable, match="no time pass"):
        step(nothing, clocks.FakeClock([0]), SPEC)  # type: ignore[operator]


class Dead:
    """A clock that takes no samples."""

    name, resolution_ns = "dead", 1

    def time_calls(self, call: clocks.Call, n: int, inner: int = 1) -> tuple[tuple[int, ...], int]:
        return (1,) * (n if n <= 3 else 0), 1

    def synchronize(self) -> None: ...


def test_no_samples_are_never_a_result() -> None:
    with pytest.raises(Unavailable):
        loop.block(nothing, Dead(), SPEC)


def test_progress_rises_from_0_to_1() -> None:
    shares: list[float] = []
    rng = random.Random(0)
    script = [int(rng.gauss(1, 0.2) * MS) for _ in range(997)]
    loop.measure(nothing, clocks.FakeClock(script), SPEC, shares.append)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert all(0 <= share <= 1 for share in shares)
    assert len(shares) > 3


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_is_not_collected_while_timing_and_the_setting_comes_back(was_on: bool) -> None:
    seen: list[bool] = []
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        loop.block(lambda: seen.append(gc.isenabled()), clocks.FakeClock([MS]), SPEC)
        assert gc.isenabled() is was_on

        def fail() -> None:
            raise RuntimeError("the model failed")

        with pytest.raises(RuntimeError, match="the model failed"):
            loop.measure(fail, clocks.FakeClock([MS]), SPEC)
        assert gc.isenabled() is was_on
    finally:
        (gc.enable if before else gc.disable)()
    assert set(seen) == {False}


def test_a_real_clock_measures_a_real_sleep() -> None:
    spec = BenchSpec(min_time_s=0.05, max_time_s=0.2, warmup_s=0.02, max_warmup_s=0.2, block_ms=10.0)
    found = loop.measure(lambda: time.sleep(0.002), clocks.WallClock(), spec)
    assert all(sample > 1.9e6 for sample in found.samples_ns)
    assert (found.wall_ns or 0) >= sum(found.samples_ns)


def test_blocks_join_and_stay_apart() -> None:
    one = loop.block(nothing, clocks.FakeClock([MS]), SPEC)
    two = loop.block(nothing, clocks.FakeClock([2 * MS]), SPEC)
    both = one + two
    assert both.block_sizes == (len(one.samples_ns), len(two.samples_ns))
    assert both.wall_ns == (one.wall_ns or 0) + (two.wall_ns or 0)
