"""What is asked: references, shapes, precisions, candidates and jobs, as plain values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from gpuopt.core.errors import UsageError
from gpuopt.core.generation import GenerateSpec
from gpuopt.core.search import SearchSpec
from gpuopt.core.streamed import StreamRequest


class Precision(StrEnum):
    """The number format a candidate is asked to compute in."""

    FP64 = "fp64"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    """Linear layers multiply in float8_e4m3fn: weights quantised once, activations in every call (dynamic), both with a scale a row."""
    INT8 = "int8"
    """The same in int8, with sums in int32."""
    W8 = "w8"
    """Weights alone in int8, a scale a row; they multiply in bf16. torchao and gpt-fast call it int8 weight-only, vLLM W8A16. It saves bytes, not FLOPs."""
    W4 = "w4"
    """Weights alone in four bits, a scale and a zero a group of 128 (64 or 32 where that does not divide); they multiply in bf16. torchao calls it int4 weight-only, vLLM W4A16."""

    @property
    def dtype(self) -> str:
        """Torch's name of the storage type (of weights, where those are quantised): fp32 and tf32 are both `float32`."""
        return _STORAGE[self]

    @property
    def carrier(self) -> Precision:
        """What values between products are kept in, inputs and outputs of a model included: bf16 where products are quantised, else the precision itself.

        bf16 and not fp16: the row-wise fp8 product of an H100 gives no fp16 (torch 2.11, ScaledBlas.cpp), eight bits of mantissa are four more than fp8 has, and
        activations worth quantising have outliers that leave fp16's range.
        """
        return _CARRIER.get(self, self)

    @property
    def is_quantised(self) -> bool:
        """Whether it needs scales: a cast cannot make it."""
        return self in _CARRIER


_STORAGE = {
    Precision.FP64: "float64",
    Precision.FP32: "float32",
    Precision.TF32: "float32",
    Precision.BF16: "bfloat16",
    Precision.FP16: "float16",
    Precision.FP8: "float8_e4m3fn",
    Precision.INT8: "int8",
    Precision.W8: "int8",
    Precision.W4: "int32",  # eight weights a word
}
_CARRIER = dict.fromkeys((Precision.FP8, Precision.INT8, Precision.W8, Precision.W4), Precision.BF16)

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes an element of every dtype a TensorSpec may name."""

_SPEC = re.compile(r"^(?:(?P<name>[^:\[\]\s]+):)?(?P<dtype>[a-z0-9_]+)\[(?P<shape>[^\]]*)\](?:<(?P<high>\d+)|=(?P<fill>-?\d+(?:\.\d+)?))?$")
_SHORT_DTYPES = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "float": "float32",
    "bf16": "bfloat16",
    "long": "int64",
    "int": "int32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input: `x:float16[N,3,224,224]`. A letter in the shape is a free dimension.

    Two endings say what random data must look like: `ids:int64[N,S]<30522` draws whole numbers below 30522, `mask:int64[N,S]=1` is all ones.
    """

    name: str
    dtype: str
    """Torch's name without the `torch.` prefix."""
    shape: tuple[int | str, ...]
    high: int | None = None
    """Integer inputs are drawn from [0, high); None draws from [0, 2)."""
    fill: float | None = None
    """A constant instead of random data (an all-ones attention mask, say)."""

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """`[name:]dtype[dims]` -> TensorSpec. Raises UsageError with the form wanted."""
        match = _SPEC.match(text.strip())
        if match is None:
            raise UsageError(f"input {text!r} is not of the form name:dtype[dims]", fix="--input 'x:float32[N,3,224,224]'")
        dtype = _SHORT_DTYPES.get(match["dtype"], match["dtype"])
        if dtype not in DTYPE_BYTES:
            raise UsageError(f"input {text!r} names an unknown dtype {match['dtype']!r}", fix="one of " + ", ".join(DTYPE_BYTES))
        shape: list[int | str] = []
        for part in (p.strip() for p in match["shape"].split(",") if p.strip()):
            if re.fullmatch(r"\d+", part):
                shape.append(int(part))
            elif re.fullmatch(r"[A-Za-z_]\w*", part):
                shape.append(part)
            else:
                raise UsageError(
                    f"input {text!r} has the dimension {part!r}", fix="a dimension is a whole number from 0, or a letter for a free one"
                )
        high = int(match["high"]) if match["high"] else None
        fill = float(match["fill"]) if match["fill"] else None
        return cls(name=match["name"] or "", dtype=dtype, shape=tuple(shape), high=high, fill=fill)

    def bind(self, dims: dict[str, int]) -> TensorSpec:
        """Replace free dimensions by `dims`. Raises UsageError naming one that is not given."""
        for part in self.shape:
            if isinstance(part, str) and part not in dims:
                raise UsageError(f"input {self.name or self.dtype!r} has the free dimension {part}", fix=f"--dim {part}=8")
        return replace(self, shape=tuple(dims[p] if isinstance(p, str) else p for p in self.shape))

    @property
    def free_dims(self) -> tuple[str, ...]:
        """Letters of the shape, in order, without repeats."""
        return tuple(dict.fromkeys(p for p in self.shape if isinstance(p, str)))

    def __str__(self) -> str:
        data = f"<{self.high}" if self.high is not None else f"={self.fill:g}" if self.fill is not None else ""
        return f"{self.name + ':' if self.name else ''}{self.dtype}[{','.join(str(p) for p in self.shape)}]{data}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DimSpec:
    """Values of one free dimension: `N=1,8,64`, or `S=1:128:512` for min, usual, max."""

    name: str
    values: tuple[int, ...]
    """What is measured, in this order."""
    low: int | None = None
    high: int | None = None
    """A range a dynamic build must accept; None builds for the measured values alone."""

    @classmethod
    def parse(cls, text: str) -> DimSpec:
        """Raises UsageError with the form wanted."""
        match = re.fullmatch(r"([A-Za-z_]\w*)=(\d+(?:,\d+)*|\d+:\d+:\d+)", text.strip())
        if match is None:
            raise UsageError(f"dimension {text!r} is not of the form NAME=V,V… or NAME=MIN:USUAL:MAX", fix="--dim N=1,8,64")
        name, body = match[1], match[2]
        if ":" in body:
            low, usual, high = (int(v) for v in body.split(":"))
            if not low <= usual <= high:
                raise UsageError(f"dimension {text!r} is not ordered min <= usual <= max", fix=f"--dim {name}=1:128:512")
            return cls(name=name, values=(usual,), low=low, high=high)
        return cls(name=name, values=tuple(int(v) for v in body.split(",")))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Where a model comes from, as typed: nothing is opened yet."""

    text: str
    """A path, `hf:ID@REVISION`, `package.module:factory`, `file.py:factory`, or a bundle."""
    arch: str | None = None
    """`package.module:factory` that builds the module for a file of bare tensors."""
    trust: tuple[str, ...] = ()
    """sha256 hashes (or paths, hashed on use) whose code may run."""
    trust_remote_code: bool = False
    cast: bool = False
    """Allow weights of another dtype than the parameters they go into."""
    allow_nonfinite: bool = False
    """Allow NaN or Inf in the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """Where inputs come from; empty means the file's own signature, its configuration, or a guess."""

    tensors: tuple[TensorSpec, ...] = ()
    file: str | None = None
    """.npz or .safetensors with one array an input."""
    dims: tuple[DimSpec, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A row of the backend table with a preset and options."""

    name: str = "eager"
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> BackendSpec:
        """`inductor`, `inductor:max-autotune`, `ort:cuda`, `null:sleep_ms=5,fail=oom`.

        A part after the colon without `=` is the preset; `key=value` parts are options, their values read as JSON where they can be.
        """
        import json

        name, _, rest = text.partition(":")
        preset: str | None = None
        options: dict[str, Any] = {}
        for part in (p for p in rest.split(",") if p):
            key, eq, value = part.partition("=")
            if not eq:
                preset = part
                continue
            try:
                options[key] = json.loads(value)
            except ValueError:
                options[key] = value
        return cls(name=name, preset=preset, options=options)

    def __str__(self) -> str:
        return self.name + (f":{self.preset}" if self.preset else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """Changes to the module before a backend sees it; each is verified like a backend is."""

    channels_last: bool = False
    fold_batch_norm: bool = False
    keep_fp32: tuple[str, ...] = ()
    """Qualified names of modules left in fp32 when the rest is cast."""
    rewrites: tuple[str, ...] = ()
    """Changes to the module's own code, in this order, each with a setting after a colon where it has one: `no_mask`, `attention:cudnn`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Limits of the accuracy gate; see accuracy/tolerance.py for the reasons behind the defaults."""

    structure_ratio: float = 3.0
    """Stage 1, in fp32: RMSE(candidate) <= ratio x RMSE(eager fp32) + floor x RMS(reference)."""
    structure_floor: float = 1e-4
    precision_ratio: float = 3.0
    """Stage 2, at the candidate's dtype: RMSE(candidate) <= ratio x RMSE(eager, same dtype) + floor x RMS."""
    precision_floor: float = 1e-6
    min_snr_db: float | None = None
    """Quantised candidates have no eager twin: signal to noise against the reference instead."""
    max_error: float | None = None
    """The user's own limit on relative RMSE against the reference (--max-error)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSpec:
    """Real data for the accuracy gate, and the user's own measure of what comes out; empty adds nothing to the gate."""

    data: str | None = None
    """.npz or .safetensors with samples along the batch dimension, one array an input; other arrays are targets for the metric."""
    metric: str | None = None
    """`package.module:function` or `file.py:function`, called as `fn(outputs, batch)` or `fn(outputs, targets)`, a number back."""
    min_ratio: float = 0.99
    """Share of plain eager's score that a candidate must keep (MLPerf's 99%)."""
    lower_is_better: bool = False
    """The metric is a loss or an error rate; a function can say so itself by an attribute of this name."""
    calib: str | None = None
    """More real inputs, in the same form as `data`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One thing to build, verify and time. Everything a child process needs, as data."""

    model: ModelRef
    inputs: InputSpec = field(default_factory=InputSpec)
    backend: BackendSpec = field(default_factory=BackendSpec)
    precision: Precision | None = None
    """None keeps the model's own dtype."""
    transforms: Transforms = field(default_factory=Transforms)
    dims: dict[str, int] = field(default_factory=dict)
    """One value for each free dimension, N among them."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1` or `null`."""
    input_mode: str = "device"
    """`device`: inputs already there. `host`: each call copies inputs in and outputs out. `overlapped`: while a call computes, the next one's inputs are copied."""
    evaluation: EvalSpec = field(default_factory=EvalSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a finding would change in a candidate; None and empty keep what is there."""

    precision: Precision | None = None
    backend: BackendSpec | None = None
    channels_last: bool = False
    fold_batch_norm: bool = False
    rewrites: tuple[str, ...] = ()
    """Made besides those that are there; one of the same name with another setting takes its place."""
    input_mode: str | None = None
    inputs: tuple[str, ...] = ()
    """Tensor specs to give besides (an all-ones mask), as text."""
    dims: dict[str, int] = field(default_factory=dict)

    def applied(self, candidate: Candidate) -> Candidate:
        """The candidate with this change made."""
        transforms = replace(
            candidate.transforms,
            channels_last=candidate.transforms.channels_last or self.channels_last,
            fold_batch_norm=candidate.transforms.fold_batch_norm or self.fold_batch_norm,
            rewrites=_joined(candidate.transforms.rewrites, self.rewrites),
        )
        return replace(
            candidate,
            precision=self.precision or candidate.precision,
            backend=self.backend or candidate.backend,
            transforms=transforms,
            input_mode=self.input_mode or candidate.input_mode,
            inputs=replace(candidate.inputs, tensors=(*candidate.inputs.tensors, *(TensorSpec.parse(text) for text in self.inputs))),
            dims={**candidate.dims, **self.dims},
        )


def _joined(before: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """Each rewrite once, in the place it first had, with the setting it was given last."""
    return tuple({text.partition(":")[0]: text for text in (*before, *more)}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """How long to measure and when to stop."""

    min_time_s: float = 1.0
    max_time_s: float = 20.0
    min_iterations: int = 10
    warmup_s: float = 0.3
    max_warmup_s: float = 10.0
    block_ms: float = 50.0
    """A block is at least this long and `min_iterations` calls."""
    num_pairs: int = 20
    """Interleaved blocks a side when two or more candidates are compared."""
    target_noise: float = 0.005
    """Stop early once the median's 95% interval is this narrow, relative."""
    verify: str = "full"
    """`full` (both stages), `precision` (stage 2 alone) or `off`."""
    energy_s: float = 1.5
    """Length of the loop over which NVML's energy counter is read; 0 skips it."""
    timeout_s: float = 1800.0
    """For a child's slowest single step."""
    build_jobs: int | None = None
    """Candidates built at once; nobody builds while one is timed. None: one, and where a search tries candidates on a GPU as many as the host has cores for."""
    sustained: str = "auto"
    """Whether products are timed between the candidates' blocks, as the ceiling under the same load: `on`, `off`, or `auto` for GPUs alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Limits that make a run exit 1."""

    min_tflops: float | None = None
    max_latency_ms: float | None = None
    max_error: float | None = None
    baseline: str | None = None
    """A report written earlier."""
    max_slowdown: float | None = None
    """Relative: 0.05 is 5%."""
    allow_inconclusive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A whole command as data: what a recipe holds and what every job function takes."""

    verb: str
    candidates: tuple[Candidate, ...] = ()
    bench: BenchSpec = field(default_factory=BenchSpec)
    tolerance: Tolerance = field(default_factory=Tolerance)
    gates: Gates = field(default_factory=Gates)
    output: str | None = None
    force: bool = False
    strict: bool = False
    """Any failed candidate makes the exit code 1."""
    allow_inaccurate: bool = False
    build_only: bool = False
    to: str | None = None
    """`convert`: the file form to write, `onnx`, `pt2` or `safetensors`."""
    ignore: tuple[str, ...] = ()
    """Codes or names of doctor's rules that stay silent."""
    fix: bool = False
    """`doctor`: make the safe changes and measure them."""
    unsafe_fixes: bool = False
    """Those too that may change results; verified all the same."""
    fail_on: str | None = None
    """`doctor`: the mildest severity that makes the exit code 1."""
    device: str | None = None
    """For verbs without a candidate (`device`, `backends`); None is the default device."""
    refresh: bool = False
    """`device`: measure the ceilings again instead of reading the cache."""
    depth: int = 3
    """Levels of the module tree shown."""
    search: SearchSpec = field(default_factory=SearchSpec)
    """`optimize`: what is looked for, and how far it may go."""
    generate: GenerateSpec | None = None
    """`bench`: tokens to generate, instead of single calls."""
    stream: StreamRequest | None = None
    """`stream`: budgets, and what is done with them."""
    command: str = ""
    """The line that was typed, kept in the report."""
