"""One call's inputs -> the same call at scales that random data never has, and the verdict on them.

Candidates that were built, calibrated or fused for numbers around 1 go wrong elsewhere: a kernel that sums in fp16 overflows at ten times the input, exported code
keeps the branch it was traced with, a compiled embedding reads past its table at the last id. Eager at the same precision shows what the model itself makes of
such inputs; where even that overflows, or the model refuses them, nothing is judged and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpuopt.accuracy import compare, gate
from gpuopt.core.live import Inputs
from gpuopt.core.result import Stage
from gpuopt.core.spec import TensorSpec, Tolerance
from gpuopt.pipeline.verification import Named

SCALES = (0.1, 10.0)
RATIO = 10.0
"""Errors of two correct implementations differ more at the edge of a format, where an error is a few rare flips (a saturated softmax, a rounded argmax), and there
is one draw to judge by. What is looked for here is not rounding but overflow, clipping and wrong branches, which are beyond any ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Verdicts on what could be judged, and what could not."""

    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()


def batches(inputs: Inputs) -> list[tuple[str, Inputs]]:
    """(what it is, the inputs): floating inputs a tenth and ten times as large, ids all the same and all the largest. Empty where there is nothing to scale."""
    values = [*inputs.args, *inputs.kwargs.values()]
    specs = list(inputs.specs)
    if len(specs) != len(values):
        return []
    scaled = [_is_scaled(spec, value) for spec, value in zip(specs, values, strict=True)]
    chosen = [_is_id(spec, value) for spec, value in zip(specs, values, strict=True)]
    found = []
    for scale in SCALES:
        words = [f"inputs x{scale:g}"] * any(scaled) + [("one id" if scale < 1 else "the largest id")] * any(chosen)
        if not words:
            return []
        changed = [
            value * scale if is_scaled else _of_one_id(spec, value, largest=scale > 1) if is_id else value
            for spec, value, is_scaled, is_id in zip(specs, values, scaled, chosen, strict=True)
        ]
        count = len(inputs.args)
        made = replace(
            inputs, args=tuple(changed[:count]), kwargs=dict(zip(inputs.kwargs, changed[count:], strict=True)), source=", ".join(words)
        )
        found.append((", ".join(words), made))
    return found


def judge(
    names: Sequence[str],
    *,
    reference: Sequence[Named],
    twins: Sequence[Named],
    refused: Sequence[str],
    candidate: Sequence[Named],
    raised: Sequence[str],
    limits: Tolerance,
) -> Judged:
    """One stage, `scales`, if any of them can be judged. `refused`: why the model itself could not be run there, `raised`: why the candidate could not; "" where it could."""
    stages, notes = [], []
    # A scale that was made from calibration data fits that data: beyond it, a quantised candidate clips. That is worth knowing, and no defect; NaN is.
    is_quantised = limits.min_snr_db is not None
    loose = replace(limits, precision_ratio=max(limits.precision_ratio, RATIO), max_error=None)
    for name, ours, theirs, why, found, error in zip(names, reference, twins, refused, candidate, raised, strict=True):
        if why:
            notes.append(f"{name}: not judged, the model itself does not run there: {why}")
            continue
        eager = [row for row in compare.compare(ours, theirs) if not row.passed]
        if eager:
            does = "overflows" if any(row.num_nonfinite > row.num_nonfinite_reference for row in eager) else "gives another answer"
            notes.append(f"{name}: not judged, eager at the same precision {does} there itself")
            continue
        if error:
            stage = Stage(name=name, passed=False, outputs=(), reason=f"{name}: {error}, where eager runs")
        else:
            stage = gate.judge_stage(name, [ours], [found], [theirs], loose)
        has_nonfinite = any(row.num_nonfinite > row.num_nonfinite_reference for row in stage.outputs)
        if not stage.passed and is_quantised and not error and not has_nonfinite:
            notes.append(f"beyond the data it was scaled for: {stage.reason}")
        else:
            stages.append(stage)
    if not stages:
        return Judged(notes=tuple(notes))
    telling = next((stage for stage in stages if not stage.passed), stages[-1])
    return Judged(stages=(replace(telling, name="scales", seeds=()),), notes=tuple(notes))


def _is_scaled(spec: TensorSpec, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and spec.fill is None


def _is_id(spec: TensorSpec, value: Any) -> bool:
    """Whole numbers out of a known range: token ids, not masks."""
    if (
        not isinstance(value, torch.Tensor)
        or not value.numel()
        or value.dtype is torch.bool
        or value.is_floating_point()
        or value.is_complex()
    ):
        return False
    return spec.fill is None and spec.high is not None and spec.high > 2


def _of_one_id(spec: TensorSpec, value: torch.Tensor, *, largest: bool) -> torch.Tensor:
    assert spec.high is not None
    top = min(spec.high - 1, torch.iinfo(value.dtype).max)
    return torch.full_like(value, top if largest else int(value.reshape(-1)[0]))
