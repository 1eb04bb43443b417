"""Nanosecond samples -> medians, intervals and verdicts. Pure.

One interval serves everything: the order-statistic interval of a median. Of n independent samples the number below the true median is
Binomial(n, 1/2), so [x(k), x(n+1-k)] covers it with at least 95% for the largest k whose tail stays under 2.5%. It is exact for any
distribution, needs no random numbers, and costs one sort (Hahn and Meeker, Statistical Intervals, 5.2). A bootstrap of the median
resamples the same order statistics, only slower.

Iterations of one run are not independent (clock, heat, neighbours), so an interval from them says how well *this run's* median is known and
nothing about another run. Verdicts therefore come from interleaved pairs of blocks, where a slow machine state hits both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

from gpuopt.core.result import Relative, Stats

NS_PER_MS = 1e6
CONFIDENCE = 0.95
PERCENTILE_CONFIDENCE = 0.99
"""Of a printed percentile's upper bound, as in MLPerf loadgen's early stopping."""
OUTLIER_SIGMAS = 10.0
"""Robust standard deviations, as hyperfine: run times have long right tails, 3.5 would flag every run."""
PRACTICAL = 0.02
"""Differences below 2% are called `same`: simulated machine drift alone makes 2% (measuring.md C.2)."""
DRIFT = 0.05
"""What another day, boot or neighbour may change in a median on the same machine; a stored baseline cannot see below it."""
MIN_PAIRS = 6
"""Fewest pairs with a 95% interval: 1 - 2 / 2^6 = 96.9%, five give 93.8%."""
STEADY = 0.02
"""Two warm-up windows agree when their medians differ by less."""


def required_for_percentile(percent: float) -> int:
    """Samples needed before the largest of them bounds this percentile with 99% confidence: 44 for p90, 90 for p95, 459 for p99."""
    if not 0 < percent < 100:
        raise ValueError(f"percentile {percent} is not between 0 and 100")
    return math.ceil(math.log(1 - PERCENTILE_CONFIDENCE) / math.log(percent / 100))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics (numpy's default, type 7). `ordered` is sorted and not empty; `share` is 0..1."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    """At least 95% interval of the median of sorted samples; None below six, where no interval has that coverage."""
    k = _rank(len(ordered))
    return None if k == 0 else (ordered[k - 1], ordered[len(ordered) - k])


def count_outliers(samples: Sequence[float]) -> int:
    """Samples more than ten robust standard deviations from the median, by modified z-score."""
    middle = median(samples)
    distances = [abs(x - middle) for x in samples]
    # 1.4826 and 1.2533 turn a median and a mean absolute deviation into a normal's sigma. The second is for coarse clocks, where more than
    # half of the samples are equal and the first is zero (Iglewicz and Hoaglin 1993).
    sigma = 1.4826 * median(distances) or 1.2533 * fmean(distances)
    return sum(d > OUTLIER_SIGMAS * sigma for d in distances) if sigma else 0


def summarize(samples_ns: Sequence[int]) -> Stats:
    """Nanoseconds -> milliseconds. A percentile the sample count cannot support is None. Raises ValueError on no samples or one that is not positive."""
    if not samples_ns:
        raise ValueError("no samples: there is nothing to summarize")
    ordered = sorted(samples_ns)
    if ordered[0] <= 0:
        raise ValueError(f"a sample of {ordered[0]} ns: time did not pass")
    interval = median_interval(ordered)

    def percentile(percent: int) -> float | None:
        return quantile(ordered, percent / 100) / NS_PER_MS if len(ordered) >= required_for_percentile(percent) else None

    return Stats(
        num_samples=len(ordered),
        median=median(ordered) / NS_PER_MS,
        # Rounding may put a mean of equal samples one ulp outside them.
        mean=min(max(fmean(ordered), ordered[0]), ordered[-1]) / NS_PER_MS,
        min=ordered[0] / NS_PER_MS,
        max=ordered[-1] / NS_PER_MS,
        stdev=stdev(ordered) / NS_PER_MS if len(ordered) > 1 else None,
        ci95_low=interval[0] / NS_PER_MS if interval else None,
        ci95_high=interval[1] / NS_PER_MS if interval else None,
        p90=percentile(90),
        p95=percentile(95),
        p99=percentile(99),
        num_outliers=count_outliers(ordered),
    )


def relative_noise(samples_ns: Sequence[int]) -> float | None:
    """Width of the median's 95% interval over the median; None below six samples."""
    ordered = sorted(samples_ns)
    interval = median_interval(ordered)
    return None if interval is None else (interval[1] - interval[0]) / median(ordered)


def compare_pairs(a_blocks_ns: Sequence[Sequence[int]], b_blocks_ns: Sequence[Sequence[int]], threshold: float = PRACTICAL) -> Relative:
    """Interleaved blocks of A and B, pair by pair -> whether B is faster than A.

    `faster` or `slower` wants both: the interval of the median log-ratio excludes no change, and the median exceeds `threshold` (0.02 is 2%).
    `same` wants the whole interval within the threshold. Anything else is `inconclusive`. Raises ValueError on unequal or empty sides.
    """
    if len(a_blocks_ns) != len(b_blocks_ns) or not a_blocks_ns:
        raise ValueError(f"{len(a_blocks_ns)} blocks against {len(b_blocks_ns)} are not pairs")
    logs = sorted(math.log(median(a) / median(b)) for a, b in zip(a_blocks_ns, b_blocks_ns, strict=True))
    centre = median(logs)
    interval = median_interval(logs)
    low, high = interval or (logs[0], logs[-1])
    limit = math.log1p(threshold)
    if interval is None:
        verdict, reason = "inconclusive", f"{len(logs)} pairs are too few, {MIN_PAIRS} give a 95% interval"
    elif low > 0 and centre > limit:
        verdict, reason = "faster", ""
    elif high < 0 and centre < -limit:
        verdict, reason = "slower", ""
    elif -limit <= low and high <= limit:
        verdict, reason = "same", ""
    else:
        verdict, reason = "inconclusive", f"the 95% interval neither stays within {threshold:.1%} nor leaves it"
    return Relative(
        ratio=math.exp(centre),
        ci95_low=math.exp(low),
        ci95_high=math.exp(high),
        num_pairs=len(logs),
        verdict=verdict,
        threshold=threshold,
        reason=reason,
    )


def slowdown_vs_baseline(baseline: Stats, now: Stats, max_slowdown: float = 0.10, drift: float = DRIFT) -> Relative:
    """A stored run against a new one: `slower` only when it exceeds `max_slowdown` by more than drift between sessions can explain.

    Nothing was interleaved, so both medians' intervals are widened by `drift`. A slowdown within the limit is `same`, one beyond it but within the
    drift is `inconclusive`: measure both in one command. `faster` needs a gain beyond limit and drift. The ratio is baseline / now, above 1 faster.
    """
    ratio = baseline.median / now.median
    low = (baseline.ci95_low or baseline.min) / (now.ci95_high or now.max) / (1 + drift)
    high = (baseline.ci95_high or baseline.max) / (now.ci95_low or now.min) * (1 + drift)
    reason = ""
    if ratio >= 1 / (1 + max_slowdown):
        verdict = "faster" if low > 1 + max_slowdown else "same"
    elif high < 1 / (1 + max_slowdown):
        verdict = "slower"
    else:
        verdict = "inconclusive"
        reason = f"{1 / ratio - 1:+.1%} against a stored run, which cannot be told from {drift:.0%} of drift between sessions: measure both in one command"
    return Relative(ratio=ratio, ci95_low=low, ci95_high=high, num_pairs=0, verdict=verdict, threshold=max_slowdown, reason=reason)


def is_steady(earlier_ns: Sequence[int], later_ns: Sequence[int]) -> bool:
    """Whether two consecutive warm-up windows agree: medians within 2%, or within 10% and with overlapping intervals on a noisy machine."""
    if not earlier_ns or not later_ns:
        return False
    first, second = sorted(earlier_ns), sorted(later_ns)
    change = abs(median(second) - median(first)) / max(median(first), 1)
    if change <= STEADY:
        return True
    one, two = median_interval(first), median_interval(second)
    if one is None or two is None or change > 5 * STEADY:
        return False
    return one[0] <= two[1] and two[0] <= one[1]


def _rank(n: int) -> int:
    """Largest k with P(Binomial(n, 1/2) < k) <= 2.5%; 0 when there is none."""
    tail, target = 0.0, (1 - CONFIDENCE) / 2
    # In logarithms: 2^-n underflows from n = 1075 on. The walk starts 12 standard deviations out, where the tail left behind is below 1e-30.
    start = max(0, int(n / 2 - 6 * math.sqrt(n)))
    for k in range(start, n // 2 + 1):
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if tail > target:
            return k
    return 0
