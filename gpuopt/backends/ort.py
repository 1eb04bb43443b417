"""ONNX file + inputs -> Runner, by ONNX Runtime's CPU or CUDA provider, with the tensors bound in place."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from gpuopt.core import binding
from gpuopt.core.accepts import dtype_name
from gpuopt.core.errors import BadInput, OutOfMemory, Unavailable, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.trust import gate, packages

onnxruntime = packages.load("onnxruntime")
native = onnxruntime.capi.onnxruntime_pybind11_state

OPAQUE_ON_CPU = True
"""torch.profiler sees ONNX Runtime's CUDA kernels, and nothing of what its CPU provider does."""
FORMS = frozenset({"onnx"})

# None records a CUDA graph: with enable_cuda_graph a small fp16 ResNet passed, but a tiny fp16 BERT ended in an illegal memory access, cause not found
# (H200, onnxruntime-gpu 1.30, torch 2.11).
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "basic": {"optimization": "basic"},
    "cpu": {"provider": "cpu"},
    "cuda": {"provider": "cuda"},
    "nhwc": {"provider": "cuda", "prefer_nhwc": True},
    "tunable": {"provider": "cuda", "tunable_op": True},
}
"""Preset -> the options it stands for; `provider` only says which device the preset makes sense on."""

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA}

_OTHER_WHEEL = "pip uninstall onnxruntime, then pip install 'gpuopt[ort-gpu]'"

OPTIMIZATION = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

# ONNX TensorProto.DataType of every dtype that crosses the border; numpy has no bfloat16 or fp8, so the numbers are used for all.
ELEMENT_TYPE = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.complex64: 14,
    torch.complex128: 15,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
    torch.float8_e5m2: 19,
}
TYPE_NAME = {
    "float": torch.float32,
    "double": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8e4m3fn": torch.float8_e4m3fn,
    "float8e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
"""ONNX Runtime's names, as in `tensor(float16)` and in its profiles."""

RUNTIME_ERRORS = (native.Fail, native.InvalidArgument, native.NotImplemented, native.RuntimeException, native.EPFail, native.InvalidGraph)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a session is made; written beside the file in a bundle, so that it can be made again without the inputs."""

    provider: str = "cpu"
    precision: str | None = None
    optimization: str = "all"
    prefer_nhwc: bool = False
    tunable_op: bool = False
    cpu_nodes: bool = True
    """Let nodes without a CUDA kernel run on the CPU (the audit lists them); False makes the first such node an error."""
    threads: int | None = None
    """CPU threads inside an operator; None is torch's own number."""
    fixed: Mapping[str, int]
    """Free dimensions of the file that this build fixes: shapes become constants the optimizer can fold."""
    ranges: Mapping[str, tuple[int, int]]
    """Free dimensions that stay free, with what they accept."""


USER_OPTIONS = ("optimization", "prefer_nhwc", "tunable_op", "cpu_nodes", "threads", "provider")
PIPELINE_OPTIONS = ("preset", "precision", "dynamic", "layer_flops", "device", "build_only")


def available(device: str) -> str | None:
    """None, or why ONNX Runtime cannot run on this device here."""
    problem = packages.why_not(
        onnxruntime
    )  # also after the import: `pip uninstall` of one variant empties the other under a running process
    if problem is not None:
        return f"{problem[0]}: {problem[1]}"
    if device == "cpu":
        return None
    if not device.startswith("cuda"):
        return f"ONNX Runtime has no provider for {device!r} here"
    missing = _no_cuda_provider()
    if missing:
        return f"{missing}: {_OTHER_WHEEL}"
    if not torch.cuda.is_available():
        return "no CUDA device or driver"
    return None


def _no_cuda_provider() -> str | None:
    """None, or which wheel of ONNX Runtime is here instead of the one with the CUDA provider."""
    if CUDA in onnxruntime.get_available_providers():
        return None
    found = packages.installed("onnxruntime")
    over = " (installed over each other: the last one wins)" if " and " in found else ""
    return f"{found}{over} has no CUDA provider"


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """None, or why this form at this precision can never run on this kind of device."""
    if form not in FORMS:
        return f"takes ONNX files, not {form}"
    if precision is Precision.TF32 and not device.startswith("cuda"):
        return "TF32 exists on NVIDIA GPUs only"
    if precision in (Precision.FP8, Precision.INT8):
        return f"{precision} comes from quantize and dequantize nodes in the ONNX file; ask for no precision to run such a file as it is"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> Runner:
    """Session on the device of the inputs. Dimensions outside `dynamic` are fixed at the inputs' own.

    Raises Unavailable when the provider is missing, Unsupported when an operator has no kernel, OutOfMemory, UsageError.
    """
    assert model.path is not None, "an onnx model has a path"
    given = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, torch.Tensor)]
    device = str(options.get("device") or (given[0].device if given else "cpu"))
    settings = _settings(options, device, *_dims(model, inputs, options.get("dynamic") or {}))
    runner = OrtRunner(model.path, settings, device, layer_flops=options.get("layer_flops") or {})
    runner.remember(inputs.args, inputs.kwargs)
    return runner


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> Runner:
    """Runner from the files `save` wrote. Raises BadInput, Unavailable."""
    try:
        plain = json.loads((folder / files["settings"]).read_text())
        plain["ranges"] = {name: (int(low), int(high)) for name, (low, high) in plain["ranges"].items()}
        settings = Settings(**plain)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{folder.name}: its ONNX Runtime settings cannot be read: {error}", fix="compile the bundle again") from error
    if settings.provider != _kind(device):
        raise Unavailable(
            f"the bundle was built for ONNX Runtime on {settings.provider}, not for {device}", fix=f"--device {settings.provider}"
        )
    return OrtRunner(folder / files["onnx"], settings, device, layer_flops=options.get("layer_flops") or {})


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else device


def _dims(model: Model, inputs: Inputs, dynamic: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Free dimensions of the file, by the file's letters -> those this build fixes, and those it leaves free with their ranges.

    `dynamic` names the letters of the inputs' specs; an exporter may have given the file others, so the two are joined axis by axis.
    """
    names = [spec.name for spec in model.signature]
    bound = binding.bind(names, inputs.args, inputs.kwargs) if names else {}
    asked = binding.letters(names, inputs) if names else {}
    fixed: dict[str, int] = {}
    ranges: dict[str, tuple[int, int]] = {name: (int(low), int(high)) for name, (low, high) in dynamic.items()}
    for spec in model.signature:
        shape = tuple(bound[spec.name].shape)
        if len(shape) != len(spec.shape):
            raise UsageError(f"input {spec.name!r} has {len(shape)} dimensions, the file wants {spec}", fix=f"--input '{spec}'")
        letters = asked.get(spec.name, ())
        for axis, (wanted, size) in enumerate(zip(spec.shape, shape, strict=True)):
            if isinstance(wanted, int):
                continue
            letter = letters[axis] if axis < len(letters) else wanted
            if letter in dynamic:
                ranges[wanted] = ranges[str(letter)]
            elif wanted not in ranges:
                fixed[wanted] = int(size)
    return {name: size for name, size in fixed.items() if name not in ranges}, ranges


def _settings(options: Mapping[str, Any], device: str, fixed: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> Settings:
    preset = options.get("preset") or "default"
    if preset not in PRESETS:
        raise UsageError(f"ort has no preset {preset!r}", fix="one of " + ", ".join(PRESETS))
    unknown = [name for name in options if name not in (*USER_OPTIONS, *PIPELINE_OPTIONS)]
    if unknown:
        raise UsageError(f"ort has no option {unknown[0]!r}", fix="one of " + ", ".join(USER_OPTIONS))
    chosen = {**PRESETS[preset], **{name: options[name] for name in USER_OPTIONS if name in options}}
    wanted = chosen.pop("provider", _kind(device))
    if wanted not in PROVIDERS:
        raise UsageError(f"provider is {wanted!r}", fix="one of " + ", ".join(PROVIDERS))
    missing = _no_cuda_provider() if wanted == "cuda" else None
    if missing:  # before the device is compared: with this wheel no --device would do
        raise Unavailable(f"ort:{preset} asks for the CUDA provider, and {missing}", fix=_OTHER_WHEEL)
    if wanted != _kind(device):
        raise UsageError(f"ort:{preset} is for {wanted}, the inputs are on {device}", fix=f"--device {wanted}, or another preset")
    if chosen.get("optimization", "all") not in OPTIMIZATION:
        raise UsageError(f"optimization is {chosen['optimization']!r}", fix="one of " + ", ".join(OPTIMIZATION))
    precision = options.get("precision")
    return Settings(
        provider=wanted,
        precision=Precision(precision).value if precision else None,
        fixed=fixed,
        ranges=ranges,
        **chosen,
    )


class OrtRunner:
    """One session. Inputs and outputs are bound by pointer: nothing crosses the host, and no copy is made of what is contiguous."""

    def __init__(self, path: Path, settings: Settings, device: str, *, layer_flops: Mapping[str, tuple[float | None, str]]) -> None:
        reason = available(device)
        if reason:
            raise Unavailable(f"ort cannot run on {device}: {reason}", fix="gpuopt backends shows what can run here")
        self.device = device
        self.notes: list[str] = []
        self._path, self._settings, self._layer_flops = path, settings, layer_flops
        self._stream: torch.cuda.Stream | None = None
        self._index = 0
        if settings.provider == "cuda":
            self._index = torch.device(device).index or 0
            self.device = f"cuda:{self._index}"
            # A stream of its own: the provider must be told one when it is made, and the caller's may differ from call to call.
            self._stream = torch.cuda.Stream(self._index)
        self._session: Any = _session(path, settings, self._index, self._stream)
        self._inputs = self._session.get_inputs()
        self._outputs = self._session.get_outputs()
        self._last: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._run_options = onnxruntime.RunOptions()
        if self._stream is not None:
            # Without this every call ends in a cudaStreamSynchronize; order is kept by the streams instead.
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def remember(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check inputs and keep their shapes for the audit, without a run. Raises UsageError."""
        self._last = {name: (t.dtype, tuple(t.shape)) for name, t in self._checked(args, kwargs).items()}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Output name -> tensor on the runner's device. Raises UsageError for inputs that do not fit, OutOfMemory."""
        if self._session is None:
            raise RuntimeError("this runner was closed")
        tensors = self._checked(args, kwargs)
        self._last = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        bound = self._session.io_binding()
        for name, tensor in tensors.items():
            _bind_input(bound, name, tensor, self._index)
        outputs = self._bind_outputs(bound, {name: shape for name, (_, shape) in self._last.items()})
        self._run(bound)
        values = bound.get_outputs()
        return {
            info.name: outputs[info.name] if info.name in outputs else _to_torch(value)
            for info, value in zip(self._outputs, values, strict=True)
        }

    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Name -> contiguous tensor of the right dtype, rank, size and device: ONNX Runtime reads a bound pointer on trust."""
        tensors = binding.bind([info.name for info in self._inputs], args, kwargs)
        dims: dict[str, int] = {}
        for info in self._inputs:
            tensor = tensors[info.name]
            wanted = _dtype_of(info.type)
            if tensor.dtype is not wanted:
                raise UsageError(
                    f"input {info.name!r} is {dtype_name(tensor.dtype)}, the file wants {dtype_name(wanted)}",
                    fix="cast it, or export the model at this dtype",
                )
            if str(tensor.device) != self.device:
                raise UsageError(
                    f"input {info.name!r} is on {tensor.device}, the session runs on {self.device}", fix=f"move it to {self.device}"
                )
            self._check_shape(info, tuple(tensor.shape), dims)
            tensors[info.name] = tensor.detach().contiguous()
        return tensors

    def _check_shape(self, info: Any, shape: tuple[int, ...], dims: dict[str, int]) -> None:
        if len(shape) != len(info.shape):
            raise UsageError(
                f"input {info.name!r} has shape {list(shape)}, the file wants {info.shape}", fix=f"{len(info.shape)} dimensions"
            )
        for axis, (wanted, size) in enumerate(zip(info.shape, shape, strict=True)):
            if isinstance(wanted, int) and wanted != size:
                raise UsageError(
                    f"input {info.name!r} has {size} in dimension {axis}, this build takes {wanted}",
                    fix="build with a range: --dim NAME=MIN:USUAL:MAX",
                )
            if isinstance(wanted, str):
                low, high = self._settings.ranges.get(wanted, (0, sys.maxsize))
                if not low <= size <= high:
                    raise UsageError(
                        f"input {info.name!r} has {wanted}={size}, this build takes {low} to {high}",
                        fix=f"--dim {wanted}={low}:{low}:{size}",
                    )
                if dims.setdefault(wanted, size) != size:
                    raise UsageError(
                        f"input {info.name!r} has {wanted}={size}, another input has {dims[wanted]}", fix="equal letters are equal sizes"
                    )

    def _bind_outputs(self, bound: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Bind every output; those whose shape follows from the inputs' to a fresh torch tensor, the others to the device, where ONNX Runtime allocates."""
        dims = {
            wanted: size
            for info in self._inputs
            for wanted, size in zip(info.shape, shapes[info.name], strict=True)
            if isinstance(wanted, str)
        }
        made: dict[str, torch.Tensor] = {}
        for info in self._outputs:
            sizes = [dims.get(wanted) if isinstance(wanted, str) else wanted for wanted in info.shape or [None]]
            known = [int(size) for size in sizes if size is not None]
            if len(known) < len(sizes) or 0 in known:
                bound.bind_output(info.name, self._settings.provider, self._index)
                continue
            tensor = torch.empty(known, dtype=_dtype_of(info.type), device=self.device)
            bound.bind_output(info.name, self._settings.provider, self._index, ELEMENT_TYPE[tensor.dtype], known, tensor.data_ptr())
            made[info.name] = tensor
        return made

    def _run(self, bound: Any) -> None:
        """Run behind what the caller's stream has queued, and let that stream wait for the outputs."""
        with _translated(str(self._path.name)):
            if self._stream is None:
                self._session.run_with_iobinding(bound, self._run_options)
                return
            caller = torch.cuda.current_stream(self._index)
            self._stream.wait_stream(caller)
            self._session.run_with_iobinding(bound, self._run_options)
            caller.wait_stream(self._stream)

    def audit(self) -> PrecisionAudit | None:
        """Run once with zeros in a profiled session of its own and read which provider ran each node, in which dtype; None before any inputs are known."""
        if not self._last:
            return None
        nodes = _profile(self._path, self._settings, self._index, self._stream, self._last, self.device)
        if self._settings.provider == "cuda":
            self.notes += [note for note in placement_notes(nodes) if note not in self.notes]
        return audit_nodes(
            nodes,
            requested=Precision(self._settings.precision) if self._settings.precision else None,
            layer_flops=self._layer_flops,
            has_tf32=_has_tf32(self._settings),
        )

    def save(self, folder: Path) -> Mapping[str, str]:
        """The ONNX file with its weight files, and the session's settings. The file is portable; ONNX Runtime optimizes it again when it loads."""
        files = gate.copy_onnx(self._path, folder / "model.onnx")
        plain = {name: getattr(self._settings, name) for name in Settings.__dataclass_fields__}
        (folder / "settings.json").write_text(json.dumps(plain, sort_keys=True, indent=1) + "\n")
        return {**files, "settings": "settings.json"}

    def close(self) -> None:
        """Give back the session and its memory. Harmless twice."""
        if self._stream is not None and self._session is not None:
            self._stream.synchronize()
        self._session = None


def _session(path: Path, settings: Settings, index: int, stream: torch.cuda.Stream | None, profile: Path | None = None) -> Any:
    """A session on exactly this provider. Raises Unavailable when ONNX Runtime hands back another one, Unsupported when an operator has no kernel."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = OPTIMIZATION[settings.optimization]
    options.log_severity_level = 3  # errors; warnings about placement are read back from the profile instead
    options.intra_op_num_threads = settings.threads or torch.get_num_threads()
    for name, size in settings.fixed.items():
        options.add_free_dimension_override_by_name(name, size)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers: list[Any] = [CPU]
    if settings.provider == "cuda":
        assert stream is not None
        if hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it did not find
                onnxruntime.preload_dlls()  # after torch, whose cuDNN and cuBLAS are then the ones in use
        providers = [(CUDA, cuda_options(settings, index, stream.cuda_stream))]
        if settings.cpu_nodes:
            providers.append(CPU)
    with _translated(path.name):
        session = gate.onnx_session(path, providers, options)
    wanted = CUDA if settings.provider == "cuda" else CPU
    if session.get_providers()[0] != wanted:
        raise Unavailable(
            f"ONNX Runtime was asked for {wanted} and made a session on {session.get_providers()[0]}",
            fix="its CUDA libraries do not load: pip install 'gpuopt[ort-gpu]' for the CUDA version torch was built with",
        )
    return session


def cuda_options(settings: Settings, index: int, stream: int) -> dict[str, str]:
    """Options of the CUDA provider, as it wants them: text."""
    options = {
        "device_id": str(index),
        "user_compute_stream": str(stream),
        "use_tf32": "1" if _has_tf32(settings) else "0",
        # Doubling the arena at each growth would count memory nobody uses into the peak.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if settings.prefer_nhwc:
        options["prefer_nhwc"] = "1"
    if settings.tunable_op:
        options |= {"tunable_op_enable": "1", "tunable_op_tuning_enable": "1"}
    return options


def _has_tf32(settings: Settings) -> bool:
    return settings.provider == "cuda" and settings.precision == Precision.TF32


@contextlib.contextmanager
def _translated(name: str) -> Iterator[None]:
    """ONNX Runtime's exceptions -> ours, its text kept to the line that says something."""
    try:
        yield
    except BadInput as error:  # the gate's word for whatever a session was refused for; what was wrong is behind it
        if not isinstance(error.__cause__, RUNTIME_ERRORS):
            raise
        _raise_translated(error.__cause__, name)
    except RUNTIME_ERRORS as error:
        _raise_translated(error, name)


def _raise_translated(error: Exception, name: str) -> NoReturn:
    text = " ".join(str(error).split())[:400]
    if any(sign in text for sign in ("Failed to allocate memory", "out of memory", "CUDA_ERROR_OUT_OF_MEMORY")):
        raise OutOfMemory(f"ONNX Runtime ran out of memory: {text}", fix="a smaller batch") from error
    if isinstance(error, native.NotImplemented) or "Could not find an implementation" in text:
        raise Unsupported(f"ONNX Runtime has no kernel: {text}", fix="another --precision or --backend") from error
    if isinstance(error, native.InvalidArgument):
        raise UsageError(f"{name}: {text}", fix="give inputs of the shapes and dtypes the file names") from error
    raise Unsupported(f"ONNX Runtime cannot run {name}: {text}", fix="gpuopt backends MODEL shows what else can") from error


def _bind_input(bound: Any, name: str, tensor: torch.Tensor, index: int) -> None:
    pointer = tensor.data_ptr() or _EMPTY.data_ptr()  # an empty tensor has no address, and ONNX Runtime wants one
    bound.bind_input(name, tensor.device.type, index, ELEMENT_TYPE[tensor.dtype], list(tensor.shape), pointer)


_EMPTY = torch.zeros(1, dtype=torch.int64)


def _to_torch(value: Any) -> torch.Tensor:
    """A value ONNX Runtime allocated -> the same memory as a torch tensor, which keeps it alive."""
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
    wanted = _dtype_of(value.data_type())
    return tensor if tensor.dtype is wanted else tensor.view(wanted)  # DLPack of a bool is uint8


def _dtype_of(type_name: str) -> torch.dtype:
    """`tensor(float16)` -> torch.float16. Raises Unsupported for sequences, maps and strings."""
    dtype = TYPE_NAME.get(type_name.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise Unsupported(f"an input or output is a {type_name}", fix="export a model whose inputs and outputs are tensors of numbers")
    return dtype


# -- what really ran ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """One node as ONNX Runtime ran it, after all its rewriting."""

    name: str
    op: str
    provider: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    """Torch's dtype name and shape; weights a kernel has packed away are absent."""
    outputs: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def dtype(self) -> str:
        """Of the first input that is computed with: floating, else 8-bit integers, else the first."""
        names = [name for name, _ in self.inputs]
        for name in names:
            if name.startswith(("float", "bfloat")):
                return name
        eight = [name for name in names if name in ("int8", "uint8")]
        return "int8" if eight else names[0] if names else ""


def _profile(
    path: Path,
    settings: Settings,
    index: int,
    stream: torch.cuda.Stream | None,
    inputs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    device: str,
) -> tuple[NodeRun, ...]:
    with tempfile.TemporaryDirectory(prefix="gpuopt-ort-") as folder:
        session = _session(path, settings, index, stream, Path(folder, "profile"))
        bound = session.io_binding()
        tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in inputs.items()}
        if stream is not None:
            torch.cuda.synchronize(index)
        for name, tensor in tensors.items():
            _bind_input(bound, name, tensor, index)
        for info in session.get_outputs():
            bound.bind_output(info.name, settings.provider, index)
        with _translated(path.name):
            session.run_with_iobinding(bound)
        written = Path(session.end_profiling())
        events = json.loads(written.read_text())
    return read_profile(events)


def read_profile(events: list[dict[str, Any]]) -> tuple[NodeRun, ...]:
    """Events of ONNX Runtime's profile -> its kernels, in order."""
    nodes = []
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        args = event["args"]
        nodes.append(
            NodeRun(
                name=name.removesuffix("_kernel_time"),
                op=args.get("op_name", ""),
                provider=args.get("provider", ""),
                inputs=_types(args.get("input_type_shape", [])),
                outputs=_types(args.get("output_type_shape", [])),
            )
        )
    return tuple(nodes)


def _types(entries: list[dict[str, list[int]]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype_name(TYPE_NAME[name]) if name in TYPE_NAME else name, tuple(shape)) for entry in entries for name, shape in entry.items()
    )


PRODUCTS = frozenset(
    "MatMul Gemm FusedMatMul FusedGemm TransposeMatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul QLinearMatMul QGemm GemmFloat8 MatMulNBits "
    "GemmFastGelu FusedMatMulActivation".split()
)
CONVOLUTIONS = frozenset("Conv FusedConv NhwcFusedConv ConvInteger QLinearConv NhwcConv".split())
KINDS = {
    **dict.fromkeys((*CONVOLUTIONS, "ConvTranspose", "FusedConvTranspose", "DeformConv"), "convolution"),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention"), "attention"),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent"),
}
"""Operator -> kind of work, as in core/tally.py; a product where absent."""

UNCOUNTED = frozenset(
    "ConvTranspose Einsum LSTM GRU RNN Attention MultiHeadAttention PackedAttention PackedMultiHeadAttention GroupQueryAttention "
    "DecoderMaskedMultiHeadAttention QAttention LongformerAttention FusedConvTranspose DeformConv".split()
)
"""These compute, and their FLOPs are not in their own shapes alone: taken from `layer_flops` where the name survived."""


def node_flops(node: NodeRun) -> float | None:
    """FLOPs of a run node, 2 a multiply-add; 0 for what is no product of matrices, None where its shapes do not say."""
    if node.op in PRODUCTS:
        return _product_flops(node)
    if node.op in CONVOLUTIONS:
        return _convolution_flops(node)
    if node.op == "ConvTranspose" and len(node.inputs) > 1:
        (_, data), (_, weight) = node.inputs[:2]
        return 2.0 * math.prod(data) * math.prod(weight[1:])
    if node.op == "Attention" and len(node.inputs) >= 3 and len(node.inputs[1][1]) == 2:  # com.microsoft: the projections are inside
        (_, x), (_, weight) = node.inputs[:2]
        if len(x) == 3:
            return 2.0 * math.prod(x) * weight[1] + 4.0 * x[0] * x[1] ** 2 * (weight[1] // 3)
    if node.op == "Attention" and len(node.inputs) >= 3 and all(len(shape) == 4 for _, shape in node.inputs[:3]):
        (_, q), (_, k), (_, v) = node.inputs[:3]
        return 2.0 * math.prod(q[:3]) * k[2] * (q[3] + v[3])
    if node.op == "MultiHeadAttention" and len(node.inputs) >= 3 and all(len(shape) == 3 for _, shape in node.inputs[:3]):
        (_, q), (_, k), (_, v) = node.inputs[:3]
        return 2.0 * q[0] * q[1] * k[1] * (q[2] + v[2])
    return None if node.op in UNCOUNTED else 0.0


def _product_flops(node: NodeRun) -> float | None:
    """A weight may be packed away and absent from the profile, so the inner size comes from the first operand and the output alone."""
    if not node.inputs or not node.outputs:
        return None
    a, out = node.inputs[0][1], node.outputs[0][1]
    rows = out[-2] if len(out) > 1 else 1
    if not a or not math.prod(out):
        return None
    if len(a) == 1 or node.op not in ("Gemm", "FusedMatMul", "TransposeMatMul", "FusedGemm", "GemmFloat8"):
        return 2.0 * math.prod(out) * a[-1]
    # These may transpose A: of its last two sizes, one is the rows of the output, the other the inner size.
    return 2.0 * math.prod(out) * (a[-1] * a[-2] / rows)


def _convolution_flops(node: NodeRun) -> float | None:
    """Weights are [out channels, in channels / groups, *kernel]; in any layout their size over the out channels is the multiply-adds an output element."""
    spatial = len(node.outputs[0][1]) if node.outputs else 0
    weights = [shape for _, shape in node.inputs[1:] if len(shape) == spatial]
    if not weights or spatial < 3:
        return None
    out = node.outputs[0][1]
    channels = weights[0][0]
    return 2.0 * math.prod(out) * math.prod(weights[0]) / channels if channels in out else None


def audit_nodes(
    nodes: tuple[NodeRun, ...],
    *,
    requested: Precision | None,
    layer_flops: Mapping[str, tuple[float | None, str]] | None = None,
    has_tf32: bool = False,
) -> PrecisionAudit:
    """What ran -> share of FLOPs by dtype and by provider. Casts that ONNX Runtime inserted show as the dtype its kernels were given."""
    known = layer_flops or {}
    counted: list[tuple[NodeRun, float]] = []
    unknown: list[NodeRun] = []
    for node in nodes:
        flops = node_flops(node)
        if flops is None:
            flops = _joined(node.name, known)
        if flops is None:
            unknown.append(node)
        elif flops:
            counted.append((node, flops))
    tally = Tally()
    placements: dict[str, float] = {}
    for node, flops in counted:
        tally.add_counted(KINDS.get(node.op, "product"), _audited_dtype(node, has_tf32), flops, f"{node.name} ({node.op})")
        placements[node.provider] = placements.get(node.provider, 0.0) + flops
    for node in unknown:
        tally.add_counted("product", node.dtype, None, f"{node.name} ({node.op})")
    total = sum(placements.values())
    audit = tally.audit(requested.value if requested else None, "onnx graph + placement: the nodes that ran")
    return replace(
        audit,
        # A node that cannot be weighed still says what it computes in: one in another dtype may be most of the work.
        honoured=audit.honoured and all(requested is None or _audited_dtype(node, has_tf32) == _wanted(requested) for node in unknown),
        placements={provider: flops / total for provider, flops in sorted(placements.items())} if total else {},
    )


def _wanted(requested: Precision) -> str:
    return "tf32" if requested is Precision.TF32 else requested.dtype


def _audited_dtype(node: NodeRun, has_tf32: bool) -> str:
    return "tf32" if has_tf32 and node.dtype == "float32" and node.provider == CUDA else node.dtype


def _joined(name: str, layer_flops: Mapping[str, tuple[float | None, str]]) -> float | None:
    """FLOPs of the source node this one was made from: ONNX Runtime appends to names, `node_MatMul_2/MatMulAddFusion`."""
    stems = [stem for stem in layer_flops if name == stem or name.startswith((stem + "/", stem + "_"))]
    return layer_flops[max(stems, key=len)][0] if stems else None


def placement_notes(nodes: tuple[NodeRun, ...]) -> list[str]:
    """What fell to the CPU under the CUDA provider: each such node costs a copy and a wait."""
    notes = []
    fallen = [n for n in nodes if n.provider == CPU and not n.op.startswith("Memcpy")]
    computing = [n for n in fallen if n.dtype.startswith(("float", "bfloat")) and n.op != "Shape"]
    if computing:
        names = ", ".join(f"{n.name} ({n.op})" for n in computing[:8]) + (" …" if len(computing) > 8 else "")
        notes.append(f"{len(computing)} nodes on floating tensors ran on the CPU: {names}")
    if len(fallen) > len(computing):
        notes.append(f"{len(fallen) - len(computing)} nodes on shapes and indices ran on the CPU")
    copies = [n for n in nodes if n.op.startswith("Memcpy")]
    if copies:
        notes.append(f"{len(copies)} copies between host and device inside the graph: {', '.join(n.name for n in copies[:8])}")
    return notes


__all__ = ["FORMS", "PRESETS", "available", "build", "load", "supports"]
