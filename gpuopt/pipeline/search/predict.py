"""Candidates + what was measured so far -> the time each of the others is expected to take, how sure that is, and whether it is likely to work. Pure.

A Gaussian process over the logarithm of time: the mean is the prior of `tune.prior_ms`, and two candidates are correlated by the settings they share
(`tune.features`). One measurement of `fp16 inductor` so corrects everything in fp16 and everything through Inductor, the former less than the latter
if they share less. How far settings move times at all on this model, and how much of a candidate no setting explains, is itself learnt from what was
measured. With a few dozen candidates the algebra is a page of plain Python.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import tune

NOISE = 0.01
"""Of one screening, in log time: the median of blocks of some milliseconds on a machine that does other things."""
OWN = 0.05
"""What no shared setting explains of a candidate, before anything was measured."""
SCALES = (0.25, 0.4, 0.65, 1.0, 1.5)
"""Factors by which all settings together may matter less or more than `tune.features` says."""
OWNS = (0.01, 0.02, 0.035, OWN, 0.08, 0.13)
SPREAD = 0.7
"""How surprising a factor of e on either is, in standard deviations of a normal: a few measurements do not overrule the table."""
Z90 = 1.645


@dataclass(frozen=True, slots=True)
class Expected:
    """One candidate's time, log-normal."""

    log_ms: float
    sd: float

    @property
    def ms(self) -> float:
        """Its median."""
        return math.exp(self.log_ms)

    @property
    def low_ms(self) -> float:
        """With `high_ms`, 90% of the belief."""
        return math.exp(self.log_ms - Z90 * self.sd)

    @property
    def high_ms(self) -> float:
        """See `low_ms`."""
        return math.exp(self.log_ms + Z90 * self.sd)

    def chance_below(self, ms: float) -> float:
        """Probability that it takes less than `ms`."""
        return _normal((math.log(ms) - self.log_ms) / self.sd) if ms > 0 else 0.0

    def expected_gain(self, best_ms: float) -> float:
        """Expected improvement on `best_ms`, as a share in log time; next to 0 for one that cannot be better."""
        if best_ms <= 0:
            return 0.0
        z = (math.log(best_ms) - self.log_ms) / self.sd
        return max(0.0, self.sd * (z * _normal(z) + math.exp(-z * z / 2) / math.sqrt(2 * math.pi)))


@dataclass(slots=True)
class _Known:
    """A candidate as the algebra sees it."""

    candidate: Candidate
    key: str
    features: dict[str, float]
    """Name -> variance."""
    log_prior: float


@dataclass(slots=True)
class Predictor:
    """What was seen, and what it says of the rest."""

    facts: tune.Facts
    _seen: list[_Known] = field(default_factory=list)
    _residuals: list[float] = field(default_factory=list)
    _gram: list[list[float]] = field(default_factory=list)
    """Covariances by shared settings alone, one row a measurement."""
    _weights: list[float] = field(default_factory=list)
    _factor: list[list[float]] = field(default_factory=list)
    _scale: float = 1.0
    _own: float = OWN
    _cache: dict[int, _Known] = field(default_factory=dict)
    _worked: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _failed: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def tell(self, candidate: Candidate, ms: float) -> None:
        """One measured time."""
        known = self._of(candidate)
        self._gram.append([_shared(known, seen) for seen in self._seen] + [sum(known.features.values())])
        self._seen.append(known)
        self._residuals.append(math.log(ms) - known.log_prior)
        self._scale, self._own = max(((s, o) for s in SCALES for o in OWNS), key=lambda pair: self._likelihood(*pair))
        self._factor = _cholesky(self._covariances(self._scale, self._own))
        self._weights = _backward(self._factor, _forward(self._factor, self._residuals))

    def worked(self, candidate: Candidate) -> None:
        """It was built and passed the gates."""
        for cause in tune.causes(candidate, self.facts.own):
            self._worked[cause] += 1

    def failed(self, candidate: Candidate) -> None:
        """It broke or was wrong. The blame is shared by those of its settings that never worked, most of it by those that failed before."""
        causes = tune.causes(candidate, self.facts.own)
        suspects = [c for c in causes if not self._worked[c]] or list(causes)
        whole = sum(1 + self._failed[c] for c in suspects)
        for cause, share in [(c, (1 + self._failed[c]) / whole) for c in suspects]:
            self._failed[cause] += share

    def chance_ok(self, candidate: Candidate) -> float:
        """How likely it is to work: 1 where none of its settings ever failed, next to 0 where those that failed never worked."""
        worked, failed = self._worked, self._failed
        return math.prod(((worked[c] + 0.5) / (worked[c] + 0.5 + failed[c])) ** 2 for c in tune.causes(candidate, self.facts.own))

    def expect(self, candidate: Candidate) -> Expected:
        """By the prior alone where nothing was measured yet."""
        known = self._of(candidate)
        factor = self._scale**2
        own = factor * sum(known.features.values()) + self._own**2
        if not self._seen:
            return Expected(known.log_prior, math.sqrt(own))
        across = [factor * _shared(known, seen) + (self._own**2 if known.key == seen.key else 0.0) for seen in self._seen]
        mean = known.log_prior + sum(w * k for w, k in zip(self._weights, across))
        half = _forward(self._factor, across)
        return Expected(mean, math.sqrt(max(own - sum(h * h for h in half), 1e-6)))

    def _of(self, candidate: Candidate) -> _Known:
        found = self._cache.get(id(candidate))
        if found is None or found.candidate is not candidate:
            variances = {name: sd * sd for name, sd in tune.features(candidate, self.facts.own).items()}
            found = _Known(candidate, tune.key(candidate), variances, math.log(tune.prior_ms(candidate, self.facts)))
            self._cache[id(candidate)] = found
        return found

    def _covariances(self, scale: float, own: float) -> list[list[float]]:
        repeated = [[one.key == other.key for other in self._seen[: i + 1]] for i, one in enumerate(self._seen)]
        return [
            [
                scale**2 * value + (own**2 if repeated[i][j] else 0.0) + (NOISE**2 if i == j else 0.0)
                for j, value in enumerate(self._gram[i])
            ]
            for i in range(len(self._seen))
        ]

    def _likelihood(self, scale: float, own: float) -> float:
        """Of all that was measured, under these two and what is believed of them beforehand; in logarithms."""
        factor = _cholesky(self._covariances(scale, own))
        half = _forward(factor, self._residuals)
        data = -0.5 * sum(h * h for h in half) - sum(math.log(row[-1]) for row in factor)
        return data - 0.5 * (math.log(scale) ** 2 + math.log(own / OWN) ** 2) / SPREAD**2


def _shared(a: _Known, b: _Known) -> float:
    """Covariance by the settings that both have."""
    other = b.features
    return sum(variance for name, variance in a.features.items() if name in other)


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _cholesky(low: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of a symmetric matrix given by its lower triangle; rows are as long as their number."""
    found: list[list[float]] = []
    for i, row in enumerate(low):
        mine: list[float] = []
        for j in range(i):
            upper = found[j]
            mine.append((row[j] - sum(x * y for x, y in zip(mine, upper))) / upper[j])
        mine.append(math.sqrt(max(row[i] - sum(x * x for x in mine), 1e-12)))
        found.append(mine)
    return found


def _forward(low: Sequence[Sequence[float]], b: Sequence[float]) -> list[float]:
    x: list[float] = []
    for i, row in enumerate(low):
        x.append((b[i] - sum(r * done for r, done in zip(row, x))) / row[i])
    return x


def _backward(low: Sequence[Sequence[float]], b: Sequence[float]) -> list[float]:
    """Solves the transposed system."""
    x = list(b)
    for i in reversed(range(len(low))):
        x[i] = (x[i] - sum(low[k][i] * x[k] for k in range(i + 1, len(low)))) / low[i][i]
    return x
