"""What was typed -> Job: units parsed, lists expanded, every number checked."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpuopt.converters import rewrites
from gpuopt.core import units
from gpuopt.core.errors import UsageError
from gpuopt.core.spec import (
    BackendSpec,
    BenchSpec,
    Candidate,
    DimSpec,
    EvalSpec,
    Gates,
    InputSpec,
    Job,
    ModelRef,
    TensorSpec,
    Tolerance,
    Transforms,
)
from gpuopt.pipeline import recipe
from gpuopt.reports.figures import clean


def command_line() -> str:
    """The line that was typed, as it can be typed again."""
    return shlex.join(["gpuopt", *(clean(word, 4096) for word in sys.argv[1:])])


def candidates(texts: Sequence[str], typed: Mapping[str, Any], *, device: str | None = None) -> tuple[Candidate, ...]:
    """Every combination of what was typed. `typed` is a command's locals(): options.py declares each option once, so its name says what it is."""
    return recipe.expand(
        models=models(
            texts,
            arch=typed["arch"],
            trust=typed["trust"],
            trust_remote_code=typed["trust_remote_code"],
            cast=typed["cast"],
            allow_nonfinite=typed["allow_nonfinite"],
        ),
        inputs=inputs(input=typed["input"], inputs=typed["inputs"], batch=typed["batch"], dim=typed["dim"], seed=typed["seed"]),
        backends=backends(_several(typed.get("backend")), preset=typed.get("preset"), option=typed.get("option")),
        precisions=precisions(_several(typed["precision"])),
        transforms=transforms(
            channels_last=typed["channels_last"], fold_bn=typed["fold_bn"], keep_fp32=typed["keep_fp32"], rewrite=typed["rewrite"]
        ),
        input_modes=input_modes(typed.get("input_mode", "device")),
        device=typed["device"] if device is None else device,
        evaluation=evaluation(
            eval_data=typed.get("eval_data"),
            metric=typed.get("metric"),
            min_metric_ratio=typed.get("min_metric_ratio"),
            metric_lower_is_better=typed.get("metric_lower_is_better", False),
            calib=typed.get("calib"),
        ),
    )


def _several(value: str | Sequence[str] | None) -> Sequence[str] | None:
    """An option that is typed once, or one that may be repeated -> all its values; an empty one is none."""
    return ([value] if value else None) if isinstance(value, str) else value


def models(
    texts: Sequence[str], *, arch: str | None, trust: Sequence[str] | None, trust_remote_code: bool, cast: bool, allow_nonfinite: bool
) -> tuple[ModelRef, ...]:
    """One reference a text; the rest holds for each."""
    return tuple(
        ModelRef(
            text=text,
            arch=arch,
            trust=tuple(trust or ()),
            trust_remote_code=trust_remote_code,
            cast=cast,
            allow_nonfinite=allow_nonfinite,
        )
        for text in texts
    )


def inputs(*, input: Sequence[str] | None, inputs: str | None, batch: str | None, dim: Sequence[str] | None, seed: int) -> InputSpec:
    """`--input`, `--inputs`, `--batch`, `--dim`, `--seed` -> InputSpec."""
    if input and inputs:
        raise UsageError("--input describes random data, --inputs is a file", fix="give one of the two")
    return InputSpec(
        tensors=tuple(TensorSpec.parse(text) for text in input or ()),
        file=inputs,
        dims=recipe.dims_of(batches(batch), (DimSpec.parse(text) for text in dim or ())),
        seed=seed,
    )


def batches(text: str | None) -> tuple[int, ...]:
    """`1,8,64` -> (1, 8, 64)."""
    if text is None:
        return ()
    if re.fullmatch(r"\s*\d{1,12}\s*(,\s*\d{1,12}\s*)*", text) is None or any(int(part) < 1 for part in text.split(",")):
        raise UsageError(f"--batch {clean(text, 60)!r} is not a list of whole numbers from 1", fix="--batch 1,8,64")
    return tuple(int(part) for part in text.split(","))


def backends(texts: Sequence[str] | None, *, preset: str | None, option: Sequence[str] | None) -> tuple[BackendSpec, ...]:
    """`--backend` with its `--preset` and `--option`s; those two need a single backend to belong to."""
    specs = tuple(BackendSpec.parse(text) for text in texts or ())
    if any(not spec.name for spec in specs):
        raise UsageError("--backend names no backend", fix="gpuopt backends lists them")
    if preset is None and not option:
        return specs
    if len(specs) > 1:
        raise UsageError(
            "--preset and --option belong to one backend, and there are several", fix="--backend inductor:max-autotune,key=value"
        )
    spec = specs[0] if specs else BackendSpec(name="")  # the model's own: recipe.expand knows it
    return (replace(spec, preset=preset or spec.preset, options={**spec.options, **dict(_option(text) for text in option or ())}),)


def _option(text: str) -> tuple[str, Any]:
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise UsageError(f"--option {clean(text, 60)!r} is not of the form KEY=VALUE", fix="--option workspace_mib=512")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def precisions(texts: Sequence[str] | None) -> tuple[Any, ...]:
    """`fp32`, `fp16,bf16` -> Precisions; none keeps the model's own."""
    return tuple(recipe.precision(part.strip()) for text in texts or () for part in text.split(","))


def input_modes(text: str) -> tuple[str, ...]:
    """`host,overlapped` for several; `both` is device, then host."""
    return tuple(part.strip() for part in ("device,host" if text == "both" else text).split(","))


def transforms(*, channels_last: bool, fold_bn: bool, keep_fp32: Sequence[str] | None, rewrite: Sequence[str] | None = None) -> Transforms:
    """Changes to the module before a backend sees it. Raises UsageError for a rewrite that there is none of."""
    return Transforms(
        channels_last=channels_last, fold_batch_norm=fold_bn, keep_fp32=tuple(keep_fp32 or ()), rewrites=rewrites.checked(rewrite or ())
    )


def evaluation(
    *,
    eval_data: str | None = None,
    metric: str | None = None,
    min_metric_ratio: float | None = None,
    metric_lower_is_better: bool = False,
    calib: str | None = None,
) -> EvalSpec:
    """Real data for the accuracy gate and the user's own metric."""
    spec = EvalSpec(data=eval_data, metric=metric, lower_is_better=metric_lower_is_better, calib=calib)
    if metric is None and (min_metric_ratio is not None or metric_lower_is_better):
        which = "--min-metric-ratio" if min_metric_ratio is not None else "--metric-lower-is-better"
        raise UsageError(f"{which} is about a metric, and none is given", fix="--metric file.py:function")
    return spec if min_metric_ratio is None else replace(spec, min_ratio=min_metric_ratio)


def bench(
    *,
    min_time: str | None = None,
    max_time: str | None = None,
    pairs: int | None = None,
    timeout: str | None = None,
    verify: str = "full",
    sustained: str = "auto",
    build_jobs: int | None = None,
) -> BenchSpec:
    """How long to measure."""
    spec = BenchSpec(verify=verify, sustained=sustained, build_jobs=build_jobs)
    if min_time is not None:
        seconds = units.parse_seconds(min_time)
        spec = replace(spec, min_time_s=seconds, max_time_s=max(spec.max_time_s, seconds))
    if max_time is not None:
        seconds = units.parse_seconds(max_time)
        # Who has a second to measure has no ten to warm up.
        spec = replace(spec, max_time_s=seconds, max_warmup_s=min(spec.max_warmup_s, max(seconds, spec.warmup_s)))
        if min_time is None:
            spec = replace(spec, min_time_s=min(spec.min_time_s, spec.max_time_s))
    if pairs is not None:
        spec = replace(spec, num_pairs=pairs)
    if timeout is not None:
        spec = replace(spec, timeout_s=units.parse_seconds(timeout))
    return spec


def tolerance(*, tolerance: float | None = None, max_error: float | None = None) -> Tolerance:
    """Limits of the accuracy gate."""
    spec = Tolerance(max_error=max_error)
    return spec if tolerance is None else replace(spec, structure_ratio=tolerance, precision_ratio=tolerance)


def gates(
    *,
    min_tflops: float | None = None,
    max_latency: str | None = None,
    max_error: float | None = None,
    baseline: str | None = None,
    max_slowdown: str | None = None,
    allow_inconclusive: bool = False,
) -> Gates:
    """Limits with their units read."""
    return Gates(
        min_tflops=min_tflops,
        max_latency_ms=None if max_latency is None else units.parse_seconds(max_latency, default="ms") * 1e3,
        max_error=max_error,
        baseline=baseline,
        max_slowdown=None if max_slowdown is None else units.parse_fraction(max_slowdown),
        allow_inconclusive=allow_inconclusive,
    )


def checked(job: Job) -> Job:
    """The job, if every number in it can be meant."""
    recipe.check(job)
    return job
