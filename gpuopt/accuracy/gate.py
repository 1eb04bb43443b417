"""Errors x tolerance -> Stage, stages -> Accuracy: the verdict of measuring.md D.3.

An output passes when RMSE(candidate) <= ratio x RMSE(eager at the same dtype) + floor x RMS(reference), both against the same reference. Cosine is shown
and never judged by. Integers, booleans, NaN and Inf must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gpuopt.accuracy import compare as measure
from gpuopt.accuracy.compare import Named
from gpuopt.core.live import Inputs
from gpuopt.core.result import Accuracy, MetricResult, OutputError, Stage
from gpuopt.core.spec import Tolerance

WARN_RATIO = 1.5
"""A correct candidate is rarely this much worse than eager; worth a note, no failure."""
FEW_ELEMENTS = 10
FEW_RATIO = 10.0
"""An output of under ten elements is too short a sample of either error for a ratio of 3: for two independent errors of 4 elements, 3% exceed it
(F distribution), 0.03% exceed 10. torch._dynamo.utils.same widens likewise."""
LOST = 0.5
"""Relative error from which a cast has lost the answer, however well it agrees with eager at the same dtype: an fp16 sum that overflowed to Inf and was divided by
gives zeros in both. bf16 costs a deep transformer 0.036 (measuring.md D.2); no format that fits a model comes near."""
NO_YARDSTICK = 25.0
"""Times the precision's floor (its unit roundoff) allowed where eager shows no error: there is no eager (an ONNX file), or the reference was computed
just as eager is (`reference: fp32`). Eager's own error on the transformer of measuring.md D.2 was 8 unit roundoffs in fp16, 9 in bf16; three times that."""


def judge_stage(
    name: str,
    reference: Sequence[Named],
    candidate: Sequence[Named],
    twin: Sequence[Named] | None,
    tolerance: Tolerance,
    seeds: Sequence[int] = (),
    *,
    spread: Mapping[str, float] | None = None,
) -> Stage:
    """Flattened outputs, one list a seed -> a stage's verdict, with the worst seed of each output.

    `name` is `structure`, or says what else was compared: that is held to the limits of the candidate's precision. `spread` is what two calls of
    the candidate on one input differ by (compare.spread); it joins the floor, never beyond doubling the limit, or noise would excuse anything.
    """
    numbers = tuple(seeds) or tuple(range(len(reference)))
    by_seed = {
        seed: measure.compare(reference[i], candidate[i], twin[i] if twin is not None else None)
        for i, seed in enumerate(numbers[: len(reference)])
    }
    return judge_rows(name, by_seed, tolerance, spread=spread)


def judge_rows(
    name: str, outputs_by_seed: Mapping[int, Sequence[OutputError]], tolerance: Tolerance, *, spread: Mapping[str, float] | None = None
) -> Stage:
    """The same from rows that compare.compare made."""
    if not outputs_by_seed or not all(outputs_by_seed.values()):
        return Stage(name=name, passed=False, outputs=(), seeds=tuple(outputs_by_seed), reason="there is no output to compare")
    judged: dict[str, list[OutputError]] = {}
    for rows in outputs_by_seed.values():
        for row in rows:
            judged.setdefault(row.name, []).append(row)
    worst_rows = []
    for output, rows_of in judged.items():
        # One seed's twin may be lucky; all seeds together are the better sample of what eager costs.
        yardstick = _pooled([row.twin_rmse for row in rows_of])
        limited = [_judge(name, row, tolerance, yardstick, (spread or {}).get(output, 0.0)) for row in rows_of]
        worst_rows.append(max(limited, key=_badness))
    worst = max(worst_rows, key=_badness)
    passed = all(row.passed for row in worst_rows)
    return Stage(
        name=name,
        passed=passed,
        outputs=tuple(worst_rows),
        worst=worst.name,
        seeds=tuple(outputs_by_seed),
        reason="" if passed else f"{name}: {worst.name}: {worst.reason}",
    )


def without_lost(stage: Stage) -> Stage:
    """For a candidate that was cast: outputs that are mostly error fail, whatever eager at the same dtype makes of them."""
    rows = tuple(_found_lost(row) for row in stage.outputs)
    if rows == stage.outputs:
        return stage
    worst = max(rows, key=_badness)
    return replace(stage, outputs=rows, passed=False, worst=worst.name, reason=f"{stage.name}: {worst.name}: {worst.reason}")


def _found_lost(row: OutputError) -> OutputError:
    if not row.passed or row.relative_rmse is None or row.rms_reference is None or row.relative_rmse <= LOST:
        return row
    reason = f"error {_relative(row)} of the reference: the precision is too narrow for this model, eager in it loses as much"
    return replace(row, passed=False, limit_rmse=LOST * row.rms_reference, reason=reason)


def verdict(
    stages: Sequence[Stage],
    reference: str,
    deterministic: bool | None,
    *,
    mutates_inputs: bool = False,
    reference_mutates_inputs: bool = False,
    unstable: str = "",
    metric: MetricResult | None = None,
    notes: Sequence[str] = (),
) -> Accuracy:
    """All stages -> one Accuracy. No stage at all is a failure: nothing was verified.

    `reference` says what the yardstick was (`fp64`, or `fp32: why`). A candidate that changes its inputs fails unless the model itself does. `unstable` says why the
    model cannot even be held against itself: then nothing can be held against it.
    """
    # The first stage that failed explains the others; where none did, `precision` is what the candidate really runs.
    usual = next((stage for stage in stages if stage.name == "precision"), stages[-1] if stages else None)
    shown = next((stage for stage in stages if not stage.passed), usual)
    worst = next((row for row in shown.outputs if row.name == shown.worst), None) if shown else None
    reason = unstable or (shown.reason if shown else "")
    if not stages:
        reason = "no stage was run, so nothing is verified"
    if mutates_inputs and not reference_mutates_inputs:
        reason = reason or "the candidate writes into its inputs, which the model does not"
    if metric is not None and not metric.passed:
        reason = reason or metric.reason
    said = list(notes)
    if metric is not None and metric.value is not None:
        said.append(f"metric {metric.name}: {metric.value:.6g} where eager has {metric.reference:.6g}, over {metric.num_samples} samples")
    if deterministic is False:
        said.append("two calls on the same input gave different bits; their spread is part of the limit")
    if not reference.startswith("fp64"):
        said.append(f"reference: {reference}")
    for stage in stages:
        for row in stage.outputs:
            if row.passed and stage.name == "precision" and row.ratio is not None and row.ratio > WARN_RATIO:
                said.append(f"{stage.name}: {row.name} has {row.ratio:.2f} times the error of eager at the same dtype")
    return Accuracy(
        passed=not reason,
        reference=reference,
        stages=tuple(stages),
        worst_output=shown.worst if shown else None,
        relative_rmse=worst.relative_rmse if worst else None,
        deterministic=deterministic,
        mutates_inputs=mutates_inputs,
        reason=reason,
        notes=tuple(said),
        metric=metric,
    )


def spread_of(
    call: Callable[..., Any], batches: Sequence[Inputs], dtype: torch.dtype, device: str, outputs: Sequence[Named]
) -> dict[str, float]:
    """Call a candidate once more on every batch: the largest RMS difference from `outputs`, by output."""
    largest: dict[str, float] = {}
    for batch, first in zip(batches, outputs, strict=True):
        given = batch.map(
            lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None, copy=True) if isinstance(t, torch.Tensor) else t
        )
        again = measure.flatten(call(*given.args, **given.kwargs))
        for name, value in measure.spread(first, again).items():
            largest[name] = max(value, largest.get(name, 0.0))
    return largest


def _judge(stage: str, row: OutputError, tolerance: Tolerance, pooled: float | None, spread: float) -> OutputError:
    """The row with its limit and verdict. Rows that already failed (shape, dtype, integers, NaN) stay failed."""
    if not row.passed or row.rmse is None or row.rms_reference is None:
        return row
    structure = stage == "structure"
    if not structure and tolerance.max_error is not None and row.rmse > tolerance.max_error * row.rms_reference:
        return replace(
            row,
            passed=False,
            limit_rmse=tolerance.max_error * row.rms_reference,
            reason=f"relative error {_relative(row)} is above the limit of {tolerance.max_error:g} that was asked for",
        )
    if not structure and tolerance.min_snr_db is not None:
        limit = row.rms_reference * 10 ** (-tolerance.min_snr_db / 20)
        shown = "-inf" if row.snr_db is None else f"{row.snr_db:.1f}"
        reason = f"signal to noise {shown} dB is under {tolerance.min_snr_db:g} dB"
        return replace(row, limit_rmse=limit, passed=row.rmse <= limit, reason="" if row.rmse <= limit else reason)
    ratio = tolerance.structure_ratio if structure else tolerance.precision_ratio
    floor = tolerance.structure_floor if structure else tolerance.precision_floor
    num_elements = 1
    for size in row.shape:
        num_elements *= size
    if num_elements < FEW_ELEMENTS:
        ratio = max(ratio, FEW_RATIO)
    yardstick = max(row.twin_rmse or 0.0, pooled or 0.0)
    if not yardstick:
        floor = tolerance.structure_floor if structure else max(NO_YARDSTICK * floor, tolerance.structure_floor)
    limit = ratio * yardstick + floor * row.rms_reference
    limit += min(spread, limit)
    passed = row.rmse <= limit
    reason = ""
    if not passed:
        against = f"{row.rmse / yardstick:.3g} times eager's" if yardstick else "where eager has none"
        reason = f"error {row.rmse:.3g} ({_relative(row)} of the reference, {against}) is above the limit {limit:.3g}"
    return replace(row, limit_rmse=limit, passed=passed, reason=reason)


def _pooled(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return (sum(value * value for value in known) / len(known)) ** 0.5 if known else None


def _relative(row: OutputError) -> str:
    return "infinite" if row.relative_rmse is None else f"{row.relative_rmse:.3g}"


def _badness(row: OutputError) -> tuple[bool, float]:
    """Orders rows: failed ones last, among equals by how far past its limit."""
    if row.rmse is None or row.limit_rmse is None:
        return (not row.passed, float("inf") if not row.passed else 0.0)
    return (not row.passed, row.rmse / row.limit_rmse if row.limit_rmse else (float("inf") if row.rmse else 0.0))
