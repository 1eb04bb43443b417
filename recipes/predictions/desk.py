"""A pair -> its times, then its findings. Lives in a child of its own; run.py decides which pairs, and when to stop.

All pairs of a process are timed before any of them is traced: once torch.profiler has run, CUPTI stays attached and slows every launch after it by a tenth and more
(pytorch/pytorch issue 144455), and a pair that is launch-bound would show that instead of its defect.
"""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from gpuopt.converters import precision as precisions
from gpuopt.core import stats
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import Device, Samples
from gpuopt.core.spec import BenchSpec, Candidate, ModelRef, Precision, TensorSpec
from gpuopt.pipeline import facts, pairs, verification
from gpuopt.pipeline.session import Session
from recipes.predictions.defects import DEFECTS
from recipes.predictions.pairs import Side
from recipes.predictions.rows import Fired, Timed, Told

SPEC = BenchSpec(
    min_time_s=0.3, max_time_s=2.0, min_iterations=5, warmup_s=0.2, max_warmup_s=1.0, block_ms=50.0, num_pairs=10, verify="off", energy_s=0.0,
    sustained="off",
)  # fmt: skip
SMALL = BenchSpec(
    min_time_s=0.01, max_time_s=0.05, min_iterations=3, warmup_s=0.01, max_warmup_s=0.05, block_ms=2.0, num_pairs=6, verify="off", energy_s=0.0,
    sustained="off",
)  # fmt: skip


@dataclass(slots=True)
class Live:
    """One side, built."""

    session: Session
    precision: Precision
    inputs: Inputs

    @property
    def dtype(self) -> torch.dtype:
        """What its floating inputs are cast to."""
        dtype: torch.dtype = getattr(torch, self.precision.dtype)
        return dtype


class Desk:
    """The pairs of one process. `survey`, then `time` for each, then `explain` for each that was timed."""

    def __init__(self, *, small: bool = False) -> None:
        self._small = small
        self._spec = SMALL if small else SPEC
        self._open: dict[str, tuple[Live, Live, Timed]] = {}

    def survey(self, device: str, small: bool, ceilings: bool) -> facts.Survey:
        """The machine, with its ceilings or without. `small`: the tiny siblings from here on."""
        self._small, self._spec = small, SMALL if small else SPEC
        session = Session()
        try:
            return session.survey(device, refresh=False, ceilings=ceilings)
        finally:
            session.close()

    def time(self, name: str, device: str) -> Timed:
        """Both sides built, compared and timed in interleaved blocks. Raises GpuoptError where one of them cannot be."""
        defect = DEFECTS[name]
        sides: list[Live] = []
        try:
            for make in (defect.bad, defect.fixed):
                sides.append(_built(make(self._small), device, name))
            difference = _difference(*(self._outputs(side, device) for side in sides))
            for side in sides:
                with precisions.flags(side.precision):
                    side.session.warm(self._spec)
            blocks = pairs.interleave({i: partial(self._block, side) for i, side in enumerate(sides)}, self._spec)
        except BaseException:
            _close(*sides)
            raise
        timed = _timed(blocks[0], blocks[1], difference)
        self._open[name] = (sides[0], sides[1], timed)
        return timed

    def explain(self, name: str, device: Device) -> Told:
        """Both sides traced and looked at, the bad one knowing nothing of the other; then they are let go."""
        bad, fixed, timed = self._open.pop(name)
        try:
            return Told(bad=self._findings(bad, device, timed.bad_ms), fixed=self._findings(fixed, device, timed.fixed_ms))
        finally:
            _close(bad, fixed)

    def close(self) -> None:
        """Let go of what was never explained."""
        for bad, fixed, _ in self._open.values():
            _close(bad, fixed)
        self._open = {}

    # Every step with its side's own TF32 switches: they belong to the process, and the side that was built last has left its own.

    def _block(self, side: Live) -> Samples:
        with precisions.flags(side.precision):
            return side.session.block(self._spec).samples

    def _outputs(self, side: Live, device: str) -> verification.Named:
        with precisions.flags(side.precision):
            return verification.runner_outputs(side.session.runner(), [side.inputs], side.dtype, device).outputs[0]

    def _findings(self, side: Live, device: Device, wall_ms: float) -> tuple[Fired, ...]:
        with precisions.flags(side.precision):
            side.session.profile(device, wall_ms, 3)
            return tuple(Fired.of(finding) for finding in side.session.diagnose(device, []).findings)


def model_of(side: Side, name: str) -> tuple[Model, Inputs]:
    """A side as the handles a session takes."""
    floats = Counter(p.dtype for p in side.module.parameters() if p.is_floating_point())
    dtype = str(floats.most_common(1)[0][0]) if floats else "torch.float32"
    model = Model(
        form="module", name=name, module=side.module.eval(), dtype=dtype.removeprefix("torch."),
        num_parameters=sum(p.numel() for p in side.module.parameters()),
    )  # fmt: skip
    specs = tuple(TensorSpec(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape)) for n, t in side.inputs.items())
    batch = next(iter(side.inputs.values())).shape[0]
    return model, Inputs(kwargs=dict(side.inputs), specs=specs, dims={"N": batch}, source="drawn for this pair")


def _built(side: Side, device: str, name: str) -> Live:
    session = Session()
    candidate = Candidate(model=ModelRef(text=""), backend=side.spec, precision=side.precision, transforms=side.transforms, device=device)
    try:
        model, inputs = model_of(side, name)
        loaded = session.adopt(candidate, model, inputs)
        session.build()
    except BaseException:
        session.close()
        raise
    return Live(session, Precision(loaded.precision), inputs)


def _difference(first: verification.Named, second: verification.Named) -> float | None:
    """Relative RMSE over all floating outputs that both have, the shapes alike; None where there are none."""
    others = dict(second)
    errors = squares = 0.0
    for name, value in first:
        other = others.get(name)
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and value.is_floating_point() and value.shape == other.shape:
            errors += float((value.float() - other.float()).square().sum(dtype=torch.float64))
            squares += float(value.float().square().sum(dtype=torch.float64))
    return (errors / squares) ** 0.5 if squares else None


def _timed(bad: list[Samples], fixed: list[Samples], difference: float | None) -> Timed:
    """Blocks of both sides, in the order of the rounds -> the gain by pairs, so that a slow moment of the machine meets both."""
    before, after = ([median(block.samples_ns) / 1e6 for block in blocks] for blocks in (bad, fixed))
    gains = sorted(b - a for b, a in zip(before, after, strict=True))
    interval = stats.median_interval(gains)
    return Timed(
        bad_ms=median(before), fixed_ms=median(after), gain_ms=median(gains), num_pairs=len(gains), difference=difference,
        gain_low_ms=interval[0] if interval else None, gain_high_ms=interval[1] if interval else None,
    )  # fmt: skip


def _close(*sides: Live) -> None:
    for side in reversed(sides):  # each puts back the switches it found
        side.session.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
