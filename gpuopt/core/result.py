"""What is found: samples, records, verdicts and reports, as plain values with units in their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gpuopt.core.generation import Generated
from gpuopt.core.search import Search
from gpuopt.core.spec import BackendSpec, Change, Precision
from gpuopt.core.streamed import StreamReport
from gpuopt.core.sweep import Sweep

SCHEMA_VERSION = 1


class Status(StrEnum):
    """How a candidate ended. `ok` alone is ranked."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    COMPILE_ERROR = "compile_error"
    ACCURACY_FAIL = "accuracy_fail"
    NAN = "nan"
    OOM_DEVICE = "oom_device"
    OOM_HOST = "oom_host"
    TIMEOUT = "timeout"
    CRASH = "crash"
    ENV_MISSING = "env_missing"
    BAD_INPUT = "bad_input"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"
    DISK_FULL = "disk_full"
    BUG = "bug"
    """An error of gpuopt's own: an impossible figure, an exception nobody classified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Raw times of single calls, in the order taken."""

    samples_ns: tuple[int, ...] = ()
    warmup_ns: tuple[int, ...] = ()
    """Runs before the stop rule called it steady; kept, never counted."""
    wall_ns: int | None = None
    """Host time over all counted calls, synchronised at both ends."""
    clock: str = ""
    """`cuda-event`, `perf_counter` or `fake`."""
    block_sizes: tuple[int, ...] = ()
    """How many consecutive samples belong to each interleaved block."""
    steady: bool = True
    """False when warm-up ran out of time before two windows agreed."""

    def __add__(self, other: Samples) -> Samples:
        """Samples of both, in order; blocks stay apart."""
        wall = None if self.wall_ns is None and other.wall_ns is None else (self.wall_ns or 0) + (other.wall_ns or 0)
        return Samples(
            samples_ns=self.samples_ns + other.samples_ns,
            warmup_ns=self.warmup_ns + other.warmup_ns,
            wall_ns=wall,
            clock=self.clock or other.clock,
            block_sizes=self.block_sizes + other.block_sizes,
            steady=self.steady and other.steady,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Milliseconds; a percentile the sample count does not support is None."""

    num_samples: int
    median: float
    mean: float
    min: float
    max: float
    stdev: float | None = None
    ci95_low: float | None = None
    ci95_high: float | None = None
    """95% interval of the median, by order statistics; None under six samples."""
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    num_outliers: int = 0
    """By modified z-score; reported, never dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """B against A from interleaved pairs; ratio above 1 means B is faster (time A / time B)."""

    ratio: float
    ci95_low: float
    ci95_high: float
    num_pairs: int
    verdict: str
    """`faster`, `slower`, `same` or `inconclusive`."""
    threshold: float
    """Practical significance the verdict was given at, relative."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """What one kernel (or copy) took of an op's time, a forward."""

    name: str
    """As the trace names it, in full."""
    time_ns: float
    count: float = 1.0
    """Launches a forward; no whole number where the traced calls differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRecord:
    """One ATen op (or kernel) summed over its calls in one forward."""

    op: str
    """`aten.mm`, or a kernel's name in rows nothing could be attributed to."""
    module: str
    """Qualified name; "" is the root, "?" unknown."""
    dtype: str | None = None
    """Dtype it computes in; `tf32` where fp32 products go through tensor cores."""
    count: int = 1
    time_ns: float | None = None
    """Device time on a GPU, self time on a CPU, a forward."""
    flops: float | None = None
    """2 a multiply-add; None is "no formula", never 0."""
    bytes: float | None = None
    """Compulsory traffic: each distinct input read once, each output written once."""
    kernels: tuple[str, ...] = ()
    module_class: str = ""
    shapes: str = ""
    """Commonest input shapes, for reading."""
    line: str | None = None
    """Innermost line of the model's own code that led to it, `modeling_bert.py:123`; several, joined by commas, where nothing tells their calls apart. None: unknown."""
    kernel_times: tuple[KernelTime, ...] = ()
    """The same kernels as `kernels`, with what each took; longest first. Empty on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """FLOPs and bytes of one forward, from the ATen graph; no times."""

    records: tuple[OpRecord, ...]
    flops: float
    """Sum of the known ones."""
    flops_by_dtype: dict[str, float]
    bytes: float
    """Sum over ops: traffic without any fusion."""
    coverage: float
    """0..1, share of estimated traffic in ops with a known count."""
    unknown_ops: tuple[str, ...] = ()
    """Ops that compute but have no formula, worst first."""
    num_parameters: int | None = None
    method: str = ""
    """How it was counted: `aten dispatch`, `onnx graph`."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """One limit of a device."""

    quantity: str
    """`fp16`, `bf16`, `tf32`, `fp32`, `fp64`, `fp8`, `int8` (compute); `memory`, `read`, `copy`, `inplace`, `h2d`, `d2h` (bytes)."""
    value: float
    unit: str
    """`FLOP/s` or `byte/s`."""
    kind: str
    """`measured` (what nothing on this device may pass), `sustained` (what products keep up between the blocks of a bench) or `spec`."""
    source: str
    """How it was measured, or which document says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """All limits known of one device."""

    rows: tuple[Ceiling, ...] = ()
    notes: tuple[str, ...] = ()
    """Why a row is missing, or why it was measured again."""

    def find(self, quantity: str, kind: str) -> Ceiling | None:
        """The row of this quantity and kind, or None: unknown stays unknown."""
        for row in self.rows:
            if row.quantity == quantity and row.kind == kind:
                return row
        return None

    def flops(self, dtype: str | None, kind: str) -> float | None:
        """FLOP/s for a torch dtype name or a precision name; None where unknown."""
        row = self.find(CEILING_OF_DTYPE.get(dtype or "", dtype or ""), kind)
        return row.value if row else None

    def bandwidth(self, kind: str, quantity: str = "memory") -> float | None:
        """Bytes a second; None where unknown."""
        row = self.find(quantity, kind)
        return row.value if row else None


CEILING_OF_DTYPE = {
    "float64": "fp64",
    "float32": "fp32",
    "tf32": "tf32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "int8": "int8",
    "uint8": "int8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the machine under the model is."""

    id: str
    """`cpu`, `cuda:0`, `null`."""
    name: str
    kind: str
    """`cuda`, `cpu` or `null`."""
    uuid: str | None = None
    capability: str | None = None
    """CUDA compute capability, `9.0`."""
    num_sms: int | None = None
    num_cores: int | None = None
    """CPU: cores this process may use."""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    """Of `memory_bytes`, when it was looked at; None where nothing says."""
    cache_bytes: int | None = None
    """Last-level cache: L2 of a GPU, L3 of a CPU."""
    driver: str | None = None
    clocks_mhz: dict[str, int] = field(default_factory=dict)
    power_limit_w: float | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    other_processes: int | None = None
    """Processes of others holding memory on this GPU; None where the driver does not say."""
    ceilings: Ceilings = field(default_factory=Ceilings)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflinePoint:
    """One op, kernel or module against the ceilings."""

    name: str
    module: str
    dtype: str | None
    count: int
    time_ns: float | None
    flops: float | None
    bytes: float | None
    intensity: float | None
    """FLOPs a byte."""
    bound: str
    """`compute`, `memory` or `unknown`."""
    pct_of_ceiling: float | None
    """Floor time over measured time, in percent; None without a time or a ceiling."""
    ceiling: str
    """Which ceiling and its kind, as printed: `fp16 measured`."""
    floor_ns: float | None = None
    """max(FLOPs / peak, bytes / bandwidth)."""
    note: str = ""
    """Why a point may lie above the measured ceiling: its working set fits a cache."""
    line: str | None = None
    """Line of the model's own code, `modeling_bert.py:123`; None: unknown."""
    kernels: tuple[KernelTime, ...] = ()
    """What ran on the device for it, longest first; empty on a CPU, and in reports of older versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """One module of the tree, with everything below it."""

    name: str
    """Qualified; "" is the root."""
    module_class: str
    depth: int
    time_ns: float | None
    flops: float | None
    bytes: float | None
    num_parameters: int | None = None
    pct_of_time: float | None = None
    pct_of_ceiling: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaterfallPart:
    """A slice of the wall time of one forward."""

    name: str
    ms: float
    detail: str = ""


WATERFALL_PARTS = (
    "host-to-device (pageable)",
    "host-to-device (pinned)",
    "copy calls",
    "launch gaps",
    "synchronisation",
    "python and framework",
    "tensor-core compute",
    "other compute",
    "memory-bound",
    "avoidable: layout",
    "avoidable: casts",
    "avoidable: unfused pointwise",
    "device-to-host",
    "idle",
    "unaccounted",
)
"""Every waterfall has all of them in this order, whatever ran, so that two can be set side by side. Reports of older versions have fewer, and other names."""
KERNELS_SCALED = "kernel times scaled by"
"""In a waterfall's method: its kernels took longer or shorter in the timed loop than in the trace."""
IDLE_PARTS = ("launch gaps", "synchronisation", "python and framework", "idle")
"""Parts in which the device waits, copies apart. In an older report `launch gaps` is all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """Where the untraced wall time of one forward went; parts sum to it, the rest is a part of its own."""

    wall_ms: float
    parts: tuple[WaterfallPart, ...]
    unaccounted_ms: float
    """Also present in `parts`, as `unaccounted`."""
    method: str = ""

    def ms(self, *names: str) -> float:
        """Sum of the named parts; 0 for a part it does not have."""
        return sum(part.ms for part in self.parts if part.name in names)

    @property
    def idle_ms(self) -> float:
        """How long the device waits for the host, for a launch or between kernels."""
        return self.ms(*IDLE_PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Least time of one call by the ceilings of the device; None where a ceiling is not known. Milliseconds."""

    precision: str
    """What most of its FLOPs run in: `fp16`."""
    unfused_ms: float | None
    """Every op by itself: sum over ops of max(FLOPs / peak of its dtype, bytes / bandwidth)."""
    fused_ms: float | None
    """All ops as one: max(all FLOPs, each buffer from outside moved once). No program of this precision is faster."""
    by_precision: dict[str, float] = field(default_factory=dict)
    """Other precision -> `unfused_ms` there: the same FLOPs at its peak, bytes at its width."""
    fused_by_precision: dict[str, float] = field(default_factory=dict)
    bytes_fused: float | None = None
    """Inputs, parameters and outputs, each once."""
    kind: str = "measured"
    """Of the ceilings: `measured` or `spec`."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Useful:
    """What of a call's FLOPs the answer needs: without padded tokens, without the half of causal attention that is masked."""

    flops: float
    """All that run, as counted."""
    flops_useful: float
    flops_by_dtype: dict[str, float] = field(default_factory=dict)
    """Useful ones, by the dtype they run in."""
    real_tokens: float | None = None
    """Share of the tokens that the mask calls real, 0..1; None without a mask."""
    real_pairs: float | None = None
    """Share of the query-key pairs in which both are real."""
    flops_padding: float = 0.0
    flops_causal: float = 0.0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """One output of a candidate against the reference."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rmse: float | None
    rms_reference: float | None
    relative_rmse: float | None
    """RMSE / RMS(reference)."""
    max_abs: float | None
    cosine: float | None
    """Reported, never gated on."""
    snr_db: float | None
    num_nonfinite: int = 0
    num_nonfinite_reference: int = 0
    twin_rmse: float | None = None
    """RMSE of eager at the same dtype against the same reference: the yardstick."""
    ratio: float | None = None
    """rmse / twin_rmse."""
    limit_rmse: float | None = None
    """What rmse had to stay under."""
    exact_mismatches: int | None = None
    """Integers and booleans: how many differ."""
    passed: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One of the two stages of the accuracy gate, over all outputs and seeds."""

    name: str
    """`structure` (fp32 twin) or `precision`."""
    passed: bool
    outputs: tuple[OutputError, ...]
    """Worst over the seeds, one an output."""
    worst: str | None = None
    """Name of the worst output."""
    seeds: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """A user's own metric of a candidate against that of plain eager, on the same real data."""

    name: str
    """As it was typed: `file.py:function`."""
    value: float | None
    """Mean over the batches, weighted by their samples; None where the outputs it was computed from hold NaN or Inf."""
    reference: float
    """Of the model as it is, in plain eager."""
    limit: float
    """What `value` has to reach; where lower is better, must not exceed."""
    lower_is_better: bool = False
    num_samples: int = 0
    data_sha256: str | None = None
    """Of the file with the data: scores of other data are not comparable."""
    passed: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityRow:
    """One module, cast alone."""

    module: str
    error: float | None
    """What it does to the outputs, as a multiple of the gate's limit: up to 1 passes. None: NaN, Inf, or it does not run."""
    parameters: float = 0.0
    """Its share of the model's parameters, 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Which modules have to stay in fp32 for a precision to pass the gate, and what that costs."""

    precision: str
    kept: tuple[str, ...] | None
    """Values for `keep_fp32`; empty where the precision itself is not at fault, None where no set was found."""
    error: float | None
    """Of the outputs with these kept, as a multiple of the gate's limit."""
    error_before: float | None
    """The same with none kept. None: NaN or Inf."""
    evaluations: int
    """Forward passes of other sets that it took."""
    is_minimal: bool = False
    """Each of the kept modules was left out alone, and the gate then failed."""
    ranking: tuple[SensitivityRow, ...] = ()
    """Modules by the error each makes alone, worst first."""
    first_nonfinite: str | None = None
    """First module, in order of execution, that makes NaN or Inf where fp32 has none."""
    parameters_kept: float | None = None
    """Share of the parameters that stay in fp32, 0..1."""
    flops_kept: float | None = None
    """Share of the FLOPs, where they were counted."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Verdict of the gate."""

    passed: bool
    reference: str
    """`fp64`, or `fp32` with the reason fp64 could not be had."""
    stages: tuple[Stage, ...] = ()
    worst_output: str | None = None
    relative_rmse: float | None = None
    """Of the worst output of the last stage."""
    deterministic: bool | None = None
    """Two calls gave the same bits."""
    mutates_inputs: bool = False
    reason: str = ""
    notes: tuple[str, ...] = ()
    metric: MetricResult | None = None
    """The user's own, where one was given."""

    @property
    def status(self) -> Status:
        """`ok`, `nan` when only the candidate has NaN or Inf, `accuracy_fail` for anything else."""
        if self.passed:
            return Status.OK
        rows = [row for stage in self.stages for row in stage.outputs if not row.passed]
        return Status.NAN if any(row.num_nonfinite > row.num_nonfinite_reference for row in rows) else Status.ACCURACY_FAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAudit:
    """What the built artifact really runs in."""

    shares: dict[str, float]
    """dtype -> share of FLOPs, 0..1; sums to 1 where anything is known."""
    method: str
    """How it was read back: `post-grad graph`, `engine inspector`, `onnx graph + placement`, `network layers`."""
    honoured: bool
    """The requested dtype carries (nearly) all FLOPs."""
    requested: str | None = None
    placements: dict[str, float] = field(default_factory=dict)
    """Execution provider -> share of FLOPs, for onnxruntime."""
    exceptions: tuple[str, ...] = ()
    """Largest layers in another dtype, by name."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something a user should change: by a rule of the doctor, or noticed on the way (inputs that were guessed)."""

    code: str
    """`GPU012`, or a word for what no rule found."""
    severity: str
    """`error` (wrong or broken), `warning` (worth a twentieth of the time or more) or `info`."""
    message: str
    """What was seen, with its figures, in one line."""
    fix: str = ""
    """The exact change, in one line."""
    rule: str = ""
    """The rule's name in words: `pageable-h2d`."""
    module: str | None = None
    """Qualified name of the module it is about."""
    line: str | None = None
    """Source line, `file.py:12`."""
    op: str | None = None
    """Op or kernel it is about."""
    count: int | None = None
    """How often a call."""
    bytes: float | None = None
    time_ms: float | None = None
    """What it takes now, a call."""
    gain_low_ms: float | None = None
    gain_high_ms: float | None = None
    """What the change would give back, a call: between these two. None where it cannot be priced."""
    safe: bool = False
    """The change keeps the model's results within the accuracy gate by its nature."""
    change: Change | None = None
    """The change as gpuopt can make it itself; None where only the user can."""
    measured_gain_ms: float | None = None
    """After --fix: what it gave back, from interleaved pairs."""
    confirmed: bool | None = None
    """After --fix: whether that lies in the predicted range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One candidate, built, verified and timed; or the reason why not."""

    model: str
    backend: str
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    precision: str | None = None
    transforms: tuple[str, ...] = ()
    batch: int | None = None
    dims: dict[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    """Bound tensor specs as text."""
    signature: tuple[str, ...] = ()
    """The same with their free dimensions and the range of random values: `ids:int64[N,S]<30522`."""
    dim_ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Range of each dimension that it accepts in any size, where one was asked for; a dimension absent here is as it was bound."""
    input_source: str = ""
    input_mode: str = "device"
    device: str | None = None
    """Id of the device it ran on; None in a report of an older version, which is about one device."""
    status: Status = Status.OK
    reason: str = ""
    fix: str = ""
    latency_ms: Stats | None = None
    samples_per_s: float | None = None
    flops: float | None = None
    """A call."""
    flops_by_dtype: dict[str, float] = field(default_factory=dict)
    flop_coverage: float | None = None
    flop_source: str = ""
    bytes: float | None = None
    tflops: float | None = None
    pct_of_measured: float | None = None
    pct_of_sustained: float | None = None
    """Of products timed in blocks between this candidate's own, as hot and as short of power as it was; None where that was not done."""
    pct_of_spec: float | None = None
    pct_of_roofline: float | None = None
    """Floor time (per-op max of compute and memory, unfused) over measured time."""
    peak_bytes: int | None = None
    energy_j_per_sample: float | None = None
    mean_power_w: float | None = None
    load_s: float | None = None
    compile_s: float | None = None
    cold_start_s: float | None = None
    """From the start of a fresh process to its first answer: imports, loading, build, first call."""
    build_peak_host_bytes: int | None = None
    """Most host memory of its process and of the compilers it started, up to that first answer."""
    accuracy: Accuracy | None = None
    precision_audit: PrecisionAudit | None = None
    samples_ns: tuple[int, ...] = ()
    warmup_ns: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] = ()
    wall_ms: float | None = None
    """Host wall time a call, over the counted calls."""
    clock: str = ""
    throttled_ms: dict[str, float] = field(default_factory=dict)
    """Time NVML says was lost in this run, by reason."""
    relative: Relative | None = None
    """Against the first run of the report, interleaved with it."""
    waterfall: Waterfall | None = None
    bounds: Bounds | None = None
    """What the device allows, in this precision and in others."""
    useful: Useful | None = None
    """None where nothing says which of its FLOPs are not needed."""
    roofline: tuple[RooflinePoint, ...] = ()
    modules: tuple[ModuleRow, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reproduce: str = ""
    """A line that runs this candidate alone."""
    generated: Generated | None = None
    """Of a bench with --generate: tokens, their times and their bound. A call is then a whole generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Versions and settings a figure depends on; no machine's paths."""

    gpuopt: str
    python: str
    platform: str
    packages: dict[str, str] = field(default_factory=dict)
    cuda: str | None = None
    cudnn: str | None = None
    flags: dict[str, str] = field(default_factory=dict)
    """Environment variables that change results (TORCHINDUCTOR_*, CUDA_VISIBLE_DEVICES, …)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """One gate, judged."""

    name: str
    passed: bool
    figure: str
    limit: str
    run: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a command ended without finishing; what it had found until then is in the same report."""

    id: str
    """Stable: `GPO200`; `GPO000` is a bug of gpuopt."""
    type: str
    """Class name of the error."""
    message: str
    fix: str = ""
    exit_code: int = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a command found. Anything on screen can be made again from this."""

    schema_version: int
    command: str
    verb: str
    environment: Environment
    device: Device | None = None
    """The only one, or the first of `devices`."""
    devices: tuple[Device, ...] = ()
    """All of them with their ceilings, in a report about several; empty where there is one."""
    runs: tuple[Run, ...] = ()
    findings: tuple[Finding, ...] = ()
    gates: tuple[GateResult, ...] = ()
    output: str | None = None
    """Name of the bundle or file written."""
    tables: dict[str, Any] = field(default_factory=dict)
    """Verb-specific facts: the backend matrix, the conversion's checks."""
    error: Failure | None = None
    """The command failed; None where it came to its end."""
    sweep: Sweep | None = None
    """Curves over batch on several devices, and where they cross."""
    search: Search | None = None
    """`optimize`: what was tried, what was chosen, and why."""
    streamed: StreamReport | None = None
    """`stream`: plans, what runs of them took against bound and prediction, rivals and checks."""

    def device_of(self, run: Run) -> Device | None:
        """The device this run's figures are held against."""
        return next((device for device in self.devices if device.id == run.device), None if self.devices else self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One file of a bundle."""

    name: str
    sha256: str
    bytes: int
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json` of a bundle."""

    schema_version: int
    gpuopt: str
    model: str
    model_sha256: str | None
    backend: BackendSpec
    precision: Precision | None
    transforms: tuple[str, ...]
    files: tuple[ManifestFile, ...]
    fingerprint: dict[str, str]
    """What the native code was built for: torch, cuda, driver, device name, capability, platform, backend's library."""
    inputs: tuple[str, ...]
    """Specs with their free dimensions, as text."""
    dims: dict[str, int]
    dim_ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Accepted range of each dynamic dimension; a dimension absent here is fixed."""
    positional: int = 0
    """How many of the inputs are positional; the rest are keywords."""
    device: str = "cpu"
    verified: bool = False
    run: Run | None = None
    """Accuracy and speed evidence."""
    flops: float | None = None
    flops_by_dtype: dict[str, float] = field(default_factory=dict)
    flop_coverage: float | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
