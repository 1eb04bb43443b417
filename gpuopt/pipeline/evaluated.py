"""EvalSpec + a candidate's inputs -> real batches for the gate, and the user's metric of the model and of the candidate.

Files are read and the model's own score is computed before anything is built: nobody should wait for a compiler to hear that a metric has a typing error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpuopt.accuracy.metric import Metric, Nesting, has_nonfinite, judge, mean
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import MetricResult
from gpuopt.core.spec import EvalSpec
from gpuopt.loaders import factory, samples
from gpuopt.pipeline import verification
from gpuopt.pipeline.facts import ProgressCall

REAL_BATCHES = 2
"""Batches of each file that go through the numeric gate as well. The metric takes all of them."""


class Evaluation:
    """A candidate's real data, and its metric."""

    def __init__(self, spec: EvalSpec, like: Inputs) -> None:
        """Reads the files and imports the function. Raises UsageError, BadInput, Unavailable."""
        if spec.metric is not None and spec.data is None:
            raise UsageError(
                "--metric has no data to score", fix="--eval-data FILE: an .npz or .safetensors with one array an input, and the labels"
            )
        self.spec = spec
        self._data = samples.read(Path(spec.data), like, "--eval-data") if spec.data is not None else None
        self._calib = samples.read(Path(spec.calib), like, "--calib", with_targets=False) if spec.calib is not None else None
        self._metric: Metric | None = None
        if spec.metric is not None:
            function, _ = factory.named(spec.metric, "function", "metrics.py:accuracy, or package.module:accuracy", reuse=True)
            self._metric = Metric(spec.metric, function, lower_is_better=spec.lower_is_better)
        self._nesting: Nesting | None = None
        self._reference: float | None = None

    def batches(self) -> list[Inputs]:
        """Real inputs for the numeric gate."""
        return [s[i].inputs for s in (self._data, self._calib) if s is not None for i in range(min(REAL_BATCHES, len(s)))]

    def calibration(self) -> list[Inputs]:
        """Every batch of --calib."""
        return [self._calib[i].inputs for i in range(len(self._calib))] if self._calib is not None else []

    def score_reference(self, model: Model, device: str, progress: ProgressCall) -> None:
        """The score of the model as it is, in plain eager. Raises UsageError for a metric that does not work."""
        if self._metric is None or self._data is None:
            return
        progress(None, f"scoring the model with {self._metric.name}")
        with verification.as_it_is(model, device, self._data[0].inputs) as (call, dtype, where):
            self._reference = self._score(call, dtype, where)
        assert self._reference is not None
        # Judged against itself: what is no number is told now.
        judge(self._metric, self._reference, self._reference, min_ratio=1.0, num_samples=0, data_sha256=None)

    def known_reference(self, stored: MetricResult | None) -> None:
        """The model's own score as a bundle's evidence has it. Raises Unsupported where that is of another metric or other data."""
        if self._metric is None or self._data is None:
            return
        if stored is None or (stored.name, stored.data_sha256) != (self._metric.name, self._data.sha256):
            raise Unsupported(
                f"the bundle does not know what its model scores by {self._metric.name} on this data",
                fix="compile it with these --metric and --eval-data; its evidence then holds the score",
            )
        self._reference = stored.reference

    def judged(self, call: Callable[..., Any], dtype: torch.dtype, device: str, progress: ProgressCall) -> MetricResult | None:
        """The candidate's score against the model's. Raises UsageError for a metric that fails on finite outputs."""
        if self._metric is None or self._data is None:
            return None
        assert self._reference is not None, "score_reference comes first"
        progress(None, f"scoring the candidate with {self._metric.name}")
        value = self._score(call, dtype, device)
        return judge(
            self._metric,
            value,
            self._reference,
            min_ratio=self.spec.min_ratio,
            num_samples=self._data.num_samples,
            data_sha256=self._data.sha256,
        )

    def _score(self, call: Callable[..., Any], dtype: torch.dtype, device: str) -> float | None:
        """The mean over the samples. A score that is no finite number ends it: None where the candidate's outputs hold NaN or Inf, else the score itself."""
        assert self._metric is not None and self._data is not None
        scores: list[tuple[float, int]] = []
        for index in range(len(self._data)):
            batch = self._data[index]
            given = batch.inputs.map(lambda t: verification.cast(t, dtype, device))
            outputs = call(*given.args, **given.kwargs)
            if self._nesting is None:
                self._nesting = Nesting(outputs)
            value = self._metric.score(self._nesting.of(outputs), batch.arrays(), batch.targets)
            if not math.isfinite(value):
                return None if self._reference is not None and has_nonfinite(outputs) else value
            scores.append((value, batch.num_new))
        return mean(scores)
