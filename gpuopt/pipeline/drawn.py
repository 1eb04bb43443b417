"""A candidate's inputs -> the same at any precision and on any device, and others of other seeds and sizes, drawn when they are asked for."""

from __future__ import annotations

from dataclasses import replace

import torch

from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, Precision
from gpuopt.loaders import inputs as input_maker
from gpuopt.pipeline import verification

SEEDS = 2
"""Different random inputs a candidate is verified on."""


class Drawn:
    """The inputs of one candidate; its dimensions are bound by now."""

    def __init__(self, candidate: Candidate, model: Model, first: Inputs, num_positional: int | None = None) -> None:
        """`first`: of the candidate's own seed, on the CPU, as they were made. `num_positional`: by position, in what was built for another call; None leaves them."""
        self.first = first
        self._candidate, self._model, self._num_positional = candidate, model, num_positional
        self._key: tuple[str, str] | None = None
        self._value = first

    @property
    def is_given(self) -> bool:
        """Whether they are the user's own tensors, which no seed can draw again: from a file, or beside a live module."""
        return self._candidate.inputs.file is not None or self._candidate.model.text == ""

    def sample(self, precision: Precision, device: str) -> Inputs:
        """The first ones; the copy that was asked for last is kept."""
        key = (precision.carrier.dtype, device)
        if self._key != key:
            dtype = getattr(torch, precision.carrier.dtype)
            self._key, self._value = key, self.first.map(lambda t: verification.cast(t, dtype, device))
        return self._value

    def of_size(self, dims: dict[str, int], precision: Precision, device: str) -> Inputs:
        """The first seed's at other sizes."""
        dtype = getattr(torch, precision.carrier.dtype)
        return self.batch(self._candidate.inputs.seed, dims).map(lambda t: verification.cast(t, dtype, device))

    def batches(self) -> tuple[list[Inputs], tuple[int, ...]]:
        """Inputs to verify on: SEEDS draws of random data, or the one set that was given."""
        first = self._candidate.inputs.seed
        if self.is_given:
            return [self.first], (first,)
        seeds = tuple(first + i for i in range(SEEDS))
        return [self.first, *(self.batch(seed) for seed in seeds[1:])], seeds

    def batch(self, seed: int, dims: dict[str, int] | None = None) -> Inputs:
        """One more draw, on the CPU."""
        made = input_maker.make(self._model, replace(self._candidate.inputs, seed=seed), dims or dict(self._candidate.dims), "cpu", None)
        return positional(made, self._num_positional) if self._num_positional is not None else made


def positional(inputs: Inputs, num: int) -> Inputs:
    """The same tensors with the first `num` by position: the call an artifact was built for."""
    values = [*inputs.args, *inputs.kwargs.values()]
    names = [spec.name for spec in inputs.specs]
    return replace(inputs, args=tuple(values[:num]), kwargs=dict(zip(names[num:], values[num:], strict=True)))
