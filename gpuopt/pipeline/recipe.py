"""YAML -> Job: a whole command as a file, read strictly. docs/recipes.md describes every key.

Also `expand`, which makes candidates of lists: the same cross product serves recipes, the command line and the library.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gpuopt.converters import rewrites
from gpuopt.core import units
from gpuopt.core.errors import GpuoptError, ResourceError, UsageError
from gpuopt.core.generation import GenerateSpec
from gpuopt.core.search import SearchSpec
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
    Precision,
    TensorSpec,
    Tolerance,
    Transforms,
)
from gpuopt.pipeline.streamed import command as streaming
from gpuopt.pipeline.streamed import recipe as stream_recipe
from gpuopt.trust.policy import Format, classify, printable

VERBS = ("profile", "bench", "optimize", "stream", "convert", "compile", "backends", "device")
INPUT_MODES = ("device", "host", "overlapped")
MAX_RECIPE_BYTES = 1 << 20
MAX_NAME = 4096
"""Characters: the longest path there is."""
MAX_CANDIDATES = 1000
"""A cross product beyond this is a slip of the pen: weeks of measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendEntry:
    """A backend with options that do not fit on one line."""

    name: str
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateEntry:
    """What one entry of `candidates` says differently from the top of the recipe. Every key may be one value or a list."""

    model: str | tuple[str, ...] | None = None
    arch: str | None = None
    input: str | tuple[str, ...] | None = None
    inputs: str | None = None
    batch: int | tuple[int, ...] | None = None
    dims: dict[str, int | tuple[int, ...] | str] | None = None
    backend: str | BackendEntry | tuple[str | BackendEntry, ...] | None = None
    precision: str | tuple[str, ...] | None = None
    channels_last: bool | None = None
    fold_bn: bool | None = None
    rewrites: str | tuple[str, ...] | None = None
    keep_fp32: str | tuple[str, ...] | None = None
    input_mode: str | tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatesEntry:
    """Limits with units, as on the command line."""

    min_tflops: float | None = None
    max_latency: str | None = None
    """`15ms`."""
    max_error: float | None = None
    baseline: str | None = None
    max_slowdown: str | None = None
    """`5%`."""
    allow_inconclusive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The keys of a recipe."""

    verb: str = "bench"
    model: str | tuple[str, ...] | None = None
    arch: str | None = None
    trust: str | tuple[str, ...] | None = None
    trust_remote_code: bool = False
    cast: bool = False
    allow_nonfinite: bool = False
    input: str | tuple[str, ...] | None = None
    inputs: str | None = None
    batch: int | tuple[int, ...] | None = None
    dims: dict[str, int | tuple[int, ...] | str] | None = None
    seed: int = 0
    backend: str | BackendEntry | tuple[str | BackendEntry, ...] | None = None
    precision: str | tuple[str, ...] | None = None
    channels_last: bool | None = None
    fold_bn: bool | None = None
    rewrites: str | tuple[str, ...] | None = None
    keep_fp32: str | tuple[str, ...] | None = None
    input_mode: str | tuple[str, ...] | None = None
    device: str = "auto"
    generate: int | None = None
    """Tokens after each prompt; None times single calls."""
    candidates: tuple[CandidateEntry, ...] = ()
    bench: BenchSpec = field(default_factory=BenchSpec)
    tolerance: Tolerance = field(default_factory=Tolerance)
    evaluation: EvalSpec = field(default_factory=EvalSpec)
    gates: GatesEntry = field(default_factory=GatesEntry)
    output: str | None = None
    to: str | None = None
    force: bool = False
    strict: bool = False
    allow_inaccurate: bool = False
    build_only: bool = False
    refresh: bool = False
    depth: int = 3
    search: SearchSpec = field(default_factory=SearchSpec)
    """Of `optimize`."""
    stream: stream_recipe.StreamEntry | None = None
    """Of `stream`."""


def read(path: Path, *, device: str | None = None, output: str | None = None, force: bool = False, command: str = "") -> Job:
    """A recipe file -> its Job; the keywords replace what the recipe says. Raises UsageError naming the key and its line."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes is no recipe", fix="name a recipe")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text", fix="name a recipe") from error
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file", fix="gpuopt run RECIPE.yaml") from error
    except OSError as error:
        raise ResourceError(f"{path}: {error.strerror or error}", fix="name a recipe that can be read") from error
    return parse(text, what=path.name, device=device, output=output, force=force, command=command)


def parse(
    text: str, *, what: str = "recipe", device: str | None = None, output: str | None = None, force: bool = False, command: str = ""
) -> Job:
    """The text of a recipe -> its Job. Raises UsageError naming the key and its line."""
    from gpuopt.core import codec  # brings pydantic, which --help does without

    recipe = codec.from_yaml(Recipe, text, what=what)
    try:
        return to_job(
            replace(recipe, device=device or recipe.device, output=output or recipe.output, force=force or recipe.force), command=command
        )
    except UsageError as error:
        line = _line_of(error.message, codec.yaml_lines(text))
        raise UsageError(f"{what}{line}: {error.message}", fix=error.fix) from error


def _line_of(message: str, lines: dict[tuple[Any, ...], int]) -> str:
    """A message that begins with a key path -> ` line 3`, as far as the path is in the file."""
    path = tuple(int(part) if part.isdigit() else part for part in message.partition(" ")[0].rstrip(":").split("."))
    while path and path not in lines:
        path = path[:-1]
    return f" line {lines[path]}" if path else ""


def to_job(recipe: Recipe, *, command: str = "") -> Job:
    """Expand the lists of a recipe into candidates, and check every number."""
    if recipe.verb not in VERBS:
        raise UsageError(f"verb {recipe.verb!r} is not one of the recipe's", fix="one of: " + ", ".join(VERBS))
    entries = recipe.candidates or (CandidateEntry(),)
    candidates: list[Candidate] = []
    if recipe.verb != "device" and not (recipe.verb == "backends" and recipe.model is None):
        for index, entry in enumerate(entries):
            try:
                candidates += _candidates(recipe, entry)
            except UsageError as error:
                if not recipe.candidates:
                    raise
                raise UsageError(f"candidates.{index}: {error.message}", fix=error.fix) from error
    if recipe.generate is not None and (recipe.verb not in ("bench", "stream") or recipe.generate < 1):
        raise UsageError(
            f"generate is {recipe.generate} in a recipe of {recipe.verb}", fix="verb: bench or stream, and a whole number from 1"
        )
    if (recipe.stream is not None) != (recipe.verb == "stream"):
        raise UsageError(
            f"stream: is what verb: stream takes, and this is verb: {recipe.verb}",
            fix="verb: stream with stream: {action: plan, budget: 50%}",
        )
    gates = recipe.gates
    job = Job(
        verb=recipe.verb,
        candidates=tuple(candidates),
        bench=recipe.bench,
        tolerance=recipe.tolerance,
        gates=Gates(
            min_tflops=gates.min_tflops,
            max_latency_ms=None if gates.max_latency is None else units.parse_seconds(gates.max_latency, default="ms") * 1e3,
            max_error=gates.max_error,
            baseline=gates.baseline,
            max_slowdown=None if gates.max_slowdown is None else units.parse_fraction(gates.max_slowdown),
            allow_inconclusive=gates.allow_inconclusive,
        ),
        output=recipe.output,
        to=recipe.to,
        device=recipe.device,
        force=recipe.force,
        strict=recipe.strict,
        allow_inaccurate=recipe.allow_inaccurate,
        build_only=recipe.build_only,
        refresh=recipe.refresh,
        depth=recipe.depth,
        generate=None
        if recipe.generate is None or recipe.verb == "stream"
        else GenerateSpec(
            new_tokens=recipe.generate,
            backends_named=recipe.backend is not None or any(entry.backend is not None for entry in recipe.candidates),
        ),
        search=recipe.search,
        stream=stream_recipe.request_of(recipe.stream, recipe.generate) if recipe.stream is not None else None,
        command=command,
    )
    check(job)
    return job


def _candidates(recipe: Recipe, entry: CandidateEntry) -> tuple[Candidate, ...]:
    said = {f.name: value for f in fields(CandidateEntry) if (value := getattr(entry, f.name)) is not None}
    whole = {f.name: getattr(recipe, f.name) for f in fields(CandidateEntry)} | said
    for size in _several(whole["batch"]):
        if size < 1:
            raise UsageError(f"batch is {size}", fix="a whole number from 1")
    models = _several(whole["model"])
    if not models:
        raise UsageError("no model is named", fix="model: gpuopt.models:resnet101")
    if recipe.verb == "stream":
        streaming.require_known(recipe.device)  # whose text may hold commas, which are several devices elsewhere
        return tuple(streaming.on(one, recipe.device) for one in _candidates(replace(recipe, verb="bench", device="auto"), entry))
    return expand(
        models=[
            ModelRef(
                text=text,
                arch=whole["arch"],
                trust=_several(recipe.trust),
                trust_remote_code=recipe.trust_remote_code,
                cast=recipe.cast,
                allow_nonfinite=recipe.allow_nonfinite,
            )
            for text in models
        ],
        inputs=InputSpec(
            tensors=tuple(TensorSpec.parse(text) for text in _several(whole["input"])),
            file=whole["inputs"],
            dims=dims_of(_several(whole["batch"]), [_dim(name, value) for name, value in (whole["dims"] or {}).items()]),
            seed=recipe.seed,
        ),
        backends=[_backend(one) for one in _several(whole["backend"])],
        precisions=[precision(text) for text in _several(whole["precision"])],
        transforms=Transforms(
            channels_last=whole["channels_last"] or False,
            fold_batch_norm=whole["fold_bn"] or False,
            keep_fp32=_several(whole["keep_fp32"]),
            rewrites=_rewrites(_several(whole["rewrites"])),
        ),
        input_modes=_several(whole["input_mode"]),
        device=recipe.device,
        evaluation=recipe.evaluation,
    )


def expand(
    *,
    models: Sequence[ModelRef],
    inputs: InputSpec | None = None,
    backends: Sequence[BackendSpec] = (),
    precisions: Sequence[Precision | None] = (),
    transforms: Transforms | None = None,
    input_modes: Sequence[str] = (),
    device: str = "auto",
    evaluation: EvalSpec | None = None,
) -> tuple[Candidate, ...]:
    """Every combination, each once; `device` may name several with commas between them. What is compared with each other lies together: sizes and input mode vary slowest, then model, precision, backend."""
    inputs = inputs or InputSpec()
    for model in models:
        if not model.text.isprintable() or len(model.text) > MAX_NAME:
            raise UsageError(
                f"model {printable(model.text)!r} is no name", fix="a path or package.module:factory, without control characters"
            )
    for mode in input_modes:
        if mode not in INPUT_MODES:
            raise UsageError(f"input mode {mode!r} is unknown", fix="one of: " + ", ".join(INPUT_MODES))
    sizes = [
        dict(zip((dim.name for dim in inputs.dims), values, strict=True))
        for values in itertools.product(*(dim.values for dim in inputs.dims))
    ]
    devices = tuple(part.strip() for part in device.split(","))
    if not all(devices):
        raise UsageError(f"device {device!r} names none", fix="--device cpu, cuda, or cpu,cuda to compare the two")
    axes: tuple[Sequence[Any], ...] = (sizes, input_modes or ("device",), models, devices, precisions or (None,), backends or (None,))
    # An ONNX file has no eager form: unasked, it runs in ONNX Runtime.
    own = {model.text: "ort" if _is_onnx(model.text) else "eager" for model in models}
    total = 1
    for axis in axes:
        total *= len(axis)
    if total > MAX_CANDIDATES:
        raise UsageError(f"{total} candidates are more than {MAX_CANDIDATES}", fix="fewer batches, backends or precisions")
    found = [
        Candidate(
            model=model,
            inputs=inputs,
            backend=replace(backend, name=backend.name or own[model.text]) if backend else BackendSpec(name=own[model.text]),
            precision=chosen,
            transforms=transforms or Transforms(),
            dims=dims,
            device=where,
            input_mode=mode,
            evaluation=evaluation or EvalSpec(),
        )
        for dims, mode, model, where, chosen, backend in itertools.product(*axes)
    ]
    unique: list[Candidate] = []
    for candidate in found:  # a candidate holds dicts, so it has no hash
        if candidate not in unique:
            unique.append(candidate)
    return tuple(unique)


def _is_onnx(text: str) -> bool:
    try:
        return classify(text) is Format.ONNX
    except GpuoptError:  # a factory, hf:ID, or what its loader will refuse with the reason
        return False


def dims_of(batches: Iterable[int], dims: Iterable[DimSpec]) -> tuple[DimSpec, ...]:
    """`batch` is the dimension N; naming a dimension twice is refused."""
    sizes = tuple(batches)
    found = ([DimSpec(name="N", values=sizes)] if sizes else []) + list(dims)
    for index, dim in enumerate(found):
        if any(dim.name == other.name for other in found[:index]):
            raise UsageError(f"dimension {dim.name} is given twice", fix="batch is the dimension N; give each dimension once")
        for value in (*dim.values, *(v for v in (dim.low, dim.high) if v is not None)):
            if value < 1:
                raise UsageError(f"dimension {dim.name} is {value}", fix="a whole number from 1")
    return tuple(found)


def precision(text: str) -> Precision:
    """Raises UsageError with the names there are."""
    try:
        return Precision(text.lower())
    except ValueError as error:
        raise UsageError(f"precision {text!r} is unknown", fix="one of: " + ", ".join(p.value for p in Precision)) from error


_ABOVE_ZERO = (
    ("bench", "min_time_s"),
    ("bench", "max_time_s"),
    ("bench", "block_ms"),
    ("bench", "target_noise"),
    ("bench", "timeout_s"),
    ("tolerance", "structure_ratio"),
    ("tolerance", "precision_ratio"),
    ("gates", "min_tflops"),
    ("gates", "max_latency_ms"),
)
_FROM_ZERO = (
    ("bench", "warmup_s"),
    ("bench", "max_warmup_s"),
    ("bench", "energy_s"),
    ("tolerance", "structure_floor"),
    ("tolerance", "precision_floor"),
    ("tolerance", "max_error"),
    ("gates", "max_error"),
    ("gates", "max_slowdown"),
)


def check(job: Job) -> None:
    """Every number of a job is one that can be meant. Raises UsageError naming the key."""
    for part, name in _ABOVE_ZERO:
        value = getattr(getattr(job, part), name)
        if value is not None and not value > 0:
            raise UsageError(f"{part}.{name} is {value}", fix="a number above 0")
    for part, name in _FROM_ZERO:
        value = getattr(getattr(job, part), name)
        if value is not None and not value >= 0:
            raise UsageError(f"{part}.{name} is {value}", fix="a number from 0")
    for name in ("min_iterations", "num_pairs", "build_jobs"):
        count = getattr(job.bench, name)
        if count is not None and count < 1:
            raise UsageError(f"bench.{name} is {count}", fix="a whole number from 1")
    if job.bench.max_time_s < job.bench.min_time_s:
        raise UsageError(
            f"bench.max_time_s ({job.bench.max_time_s:g}) is below bench.min_time_s ({job.bench.min_time_s:g})",
            fix="max_time_s from min_time_s up",
        )
    if job.bench.sustained not in ("auto", "on", "off"):
        raise UsageError(f"bench.sustained is {job.bench.sustained!r}", fix="one of: auto, on, off")
    if job.bench.verify not in ("full", "precision", "off"):
        raise UsageError(f"bench.verify is {job.bench.verify!r}", fix="one of: full, precision, off")
    for spec in {candidate.evaluation for candidate in job.candidates}:
        _check_evaluation(spec, job)
    if job.depth < 0:
        raise UsageError(f"depth is {job.depth}", fix="a whole number from 0")
    if job.to is not None and job.to not in ("onnx", "pt2", "safetensors"):
        raise UsageError(f"to is {job.to!r}", fix="one of: onnx, pt2, safetensors")
    if job.gates.max_slowdown is not None and job.gates.baseline is None:
        raise UsageError("max_slowdown has nothing to be slower than", fix="baseline: a report written earlier with --json")


def _check_evaluation(spec: EvalSpec, job: Job) -> None:
    if not 0 < spec.min_ratio <= 1:
        raise UsageError(f"evaluation.min_ratio is {spec.min_ratio:g}", fix="a share of eager's score above 0, at most 1, as in 0.99")
    if spec.metric is not None and spec.data is None:
        raise UsageError(
            f"evaluation.metric {printable(spec.metric)} has no data to score",
            fix="--eval-data FILE, an .npz or .safetensors with one array an input",
        )
    if spec != EvalSpec() and job.bench.verify == "off":
        raise UsageError("evaluation belongs to verification, which is off", fix="--verify full, or no --metric, --eval-data and --calib")


def _several(value: Any) -> tuple[Any, ...]:
    """One value or a list of them -> a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _rewrites(texts: Iterable[str]) -> tuple[str, ...]:
    try:
        return rewrites.checked(texts)
    except UsageError as error:
        raise UsageError(f"rewrites: {error.message}", fix=error.fix) from error


def _dim(name: str, value: int | tuple[int, ...] | str) -> DimSpec:
    text = value if isinstance(value, str) else ",".join(str(v) for v in _several(value))
    return DimSpec.parse(f"{name}={text}")


def _backend(entry: str | BackendEntry) -> BackendSpec:
    if isinstance(entry, str):
        return BackendSpec.parse(entry)
    return BackendSpec(name=entry.name, preset=entry.preset, options=entry.options)
