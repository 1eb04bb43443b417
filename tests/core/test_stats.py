"""Intervals against exact probabilities, verdicts against simulated machines (measuring.md C.2)."""

from __future__ import annotations

import math
import random
from statistics import median

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core import stats
from gpuopt.core.result import Stats


def test_a_percentile_needs_as_many_samples_as_loadgen_wants() -> None:
    assert [stats.required_for_percentile(p) for p in (90, 95, 99)] == [44, 90, 459]


@pytest.mark.parametrize(
    ("count", "known"),
    [(43, ()), (44, ("p90",)), (89, ("p90",)), (90, ("p90", "p95")), (458, ("p90", "p95")), (459, ("p90", "p95", "p99"))],
)
def test_percentiles_appear_exactly_where_the_count_supports_them(count: int, known: tuple[str, ...]) -> None:
    found = stats.summarize(range(1_000_000, 1_000_000 + count))
    assert tuple(name for name in ("p90", "p95", "p99") if getattr(found, name) is not None) == known


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=600))
def test_a_summary_agrees_with_numpy_and_keeps_its_order(samples: list[int]) -> None:
    found = stats.summarize(samples)
    assert found.num_samples == len(samples)
    assert math.isclose(found.median, float(numpy.median(samples)) / 1e6, rel_tol=1e-12)
    assert math.isclose(found.mean, float(numpy.mean(samples)) / 1e6, rel_tol=1e-9)
    assert found.min <= found.median <= found.max and found.min <= found.mean <= found.max
    if found.ci95_low is not None and found.ci95_high is not None:
        assert found.min <= found.ci95_low <= found.median <= found.ci95_high <= found.max
    for name, percent in (("p90", 90), ("p95", 95), ("p99", 99)):
        value = getattr(found, name)
        if value is not None:
            assert math.isclose(value, float(numpy.percentile(samples, percent)) / 1e6, rel_tol=1e-9)


@pytest.mark.parametrize("bad", [[], [0], [5, -1], [10, 0, 10]])
def test_no_samples_or_no_time_is_no_summary(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="sample"):
        stats.summarize(bad)


@pytest.mark.parametrize("n", [6, 7, 8, 20, 33, 100, 1001])
def test_the_interval_of_a_median_is_the_narrowest_with_95_percent(n: int) -> None:
    ordered = list(range(1, n + 1))
    interval = stats.median_interval(ordered)
    assert interval is not None
    k = interval[0]
    assert interval[1] == n + 1 - k

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n

    assert coverage(k) >= 0.95 > coverage(k + 1)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_five_samples_have_no_interval(n: int) -> None:
    assert stats.median_interval(list(range(n))) is None
    assert stats.summarize([7] * n).ci95_low is None


def test_the_interval_of_many_samples_neither_underflows_nor_takes_long() -> None:
    interval = stats.median_interval(range(100_000))
    assert interval is not None
    half = (interval[1] - interval[0]) / 2
    assert half == pytest.approx(1.96 * math.sqrt(100_000) / 2, rel=0.01)


def test_outliers_are_counted_and_not_dropped() -> None:
    samples = [1000 + i % 7 for i in range(100)] + [50_000, 60_000]
    found = stats.summarize(samples)
    assert found.num_outliers == 2
    assert found.max == 0.06
    assert found.num_samples == 102


def test_a_coarse_clock_does_not_make_every_other_sample_an_outlier() -> None:
    assert stats.count_outliers([1000] * 60 + [1001] * 40) == 0
    assert stats.count_outliers([1000] * 100) == 0
    assert stats.count_outliers([1000] * 99 + [90_000]) == 1


def machine(
    rng: random.Random, factor: float, drift: float, *, blocks: int = 20, iterations: int = 20
) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks of A and B (B takes `factor` of A's time) on a machine with 1% jitter, 2% spikes and a slow AR(1) state of sd `drift`."""
    state, sides = 0.0, ([], [])
    rho = 0.95
    for _ in range(blocks):
        for side in rng.sample((0, 1), 2):
            state = rho * state + math.sqrt(1 - rho * rho) * rng.gauss(0, drift)
            base = 1e7 * math.exp(state) * (factor if side else 1.0)
            sides[side].append([int(base * (1 + rng.gauss(0, 0.01)) * (1.3 if rng.random() < 0.02 else 1.0)) for _ in range(iterations)])
    return sides


@pytest.mark.parametrize("drift", [0.005, 0.02, 0.05])
def test_no_change_is_called_a_change_in_at_most_five_percent(drift: float) -> None:
    rng = random.Random(1)
    verdicts = [stats.compare_pairs(*machine(rng, 1.0, drift)).verdict for _ in range(200)]
    assert sum(v in ("faster", "slower") for v in verdicts) <= 10


@pytest.mark.parametrize(("factor", "verdict"), [(1.03, "slower"), (1 / 1.03, "faster")])
@pytest.mark.parametrize("drift", [0.005, 0.02])
def test_three_percent_is_found_in_at_least_95_percent(factor: float, verdict: str, drift: float) -> None:
    rng = random.Random(2)
    verdicts = [stats.compare_pairs(*machine(rng, factor, drift)).verdict for _ in range(100)]
    assert verdicts.count(verdict) >= 95


def test_the_verdict_of_the_other_order_is_the_opposite() -> None:
    a, b = machine(random.Random(3), 1.1, 0.005)
    there, back = stats.compare_pairs(a, b), stats.compare_pairs(b, a)
    assert (there.verdict, back.verdict) == ("slower", "faster")
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.ci95_low == pytest.approx(1 / back.ci95_high)
    assert there.num_pairs == 20


def test_equal_sides_are_the_same_and_ratios_of_time() -> None:
    same = stats.compare_pairs([[100] * 5] * 8, [[100] * 5] * 8)
    assert (same.verdict, same.ratio) == ("same", 1.0)
    twice = stats.compare_pairs([[200] * 5] * 8, [[100] * 5] * 8)
    assert (twice.verdict, twice.ratio) == ("faster", pytest.approx(2.0))


def test_a_sure_but_small_difference_is_the_same() -> None:
    found = stats.compare_pairs([[1000]] * 20, [[1010]] * 20, threshold=0.02)
    assert found.verdict == "same"
    assert stats.compare_pairs([[1000]] * 20, [[1010]] * 20, threshold=0.005).verdict == "slower"


def test_too_few_pairs_or_too_much_noise_are_inconclusive_with_a_reason() -> None:
    few = stats.compare_pairs([[100]] * 5, [[50]] * 5)
    assert few.verdict == "inconclusive" and "5 pairs" in few.reason
    rng = random.Random(4)
    noisy = stats.compare_pairs([[rng.randint(50, 150)] for _ in range(8)], [[rng.randint(50, 150)] for _ in range(8)])
    assert noisy.verdict == "inconclusive" and noisy.reason


@pytest.mark.parametrize(("a", "b"), [([], []), ([[1]], [[1], [1]])])
def test_sides_of_unequal_length_are_no_pairs(a: list[list[int]], b: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        stats.compare_pairs(a, b)


def stored(milliseconds: float, spread: float = 0.01) -> Stats:
    return Stats(
        num_samples=100,
        median=milliseconds,
        mean=milliseconds,
        min=milliseconds * 0.9,
        max=milliseconds * 1.2,
        ci95_low=milliseconds * (1 - spread),
        ci95_high=milliseconds * (1 + spread),
    )


@pytest.mark.parametrize(
    ("now", "limit", "verdict"),
    [
        (10.0, 0.05, "same"),
        (10.4, 0.05, "same"),
        (10.7, 0.05, "inconclusive"),
        (12.0, 0.05, "slower"),
        (12.0, 0.25, "same"),
        (8.0, 0.05, "faster"),
        (9.6, 0.05, "same"),
    ],
)
def test_a_stored_baseline_supports_a_wide_threshold_alone(now: float, limit: float, verdict: str) -> None:
    found = stats.slowdown_vs_baseline(stored(10.0), stored(now), limit)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(10.0 / now)
    assert bool(found.reason) == (verdict == "inconclusive")


def test_windows_agree_when_medians_do() -> None:
    rng = random.Random(5)
    steady = [int(rng.gauss(1e6, 1e4)) for _ in range(50)]
    assert stats.is_steady(steady, [int(rng.gauss(1e6, 1e4)) for _ in range(50)])
    assert not stats.is_steady(steady, [int(rng.gauss(1.06e6, 1e4)) for _ in range(50)])
    assert not stats.is_steady([2_000_000], [1_000_000])
    assert not stats.is_steady([], [1])


def test_noise_is_the_relative_width_of_the_interval() -> None:
    assert stats.relative_noise([100] * 5) is None
    assert stats.relative_noise([100] * 6) == 0
    samples = list(range(90, 111))
    low, high = stats.median_interval(samples) or (0, 0)
    assert stats.relative_noise(samples) == (high - low) / median(samples)
