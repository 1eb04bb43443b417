"""An ONNX file + Settings -> a session of ONNX Runtime, its errors translated, and tensors bound to it by pointer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from gpuopt.backends.ort.settings import CPU, CUDA, OPTIMIZATION, OTHER_WHEEL, Settings, missing_cuda, onnxruntime
from gpuopt.core.errors import BadInput, OutOfMemory, Unavailable, Unsupported, UsageError
from gpuopt.core.spec import Precision
from gpuopt.trust import gate, packages

native = onnxruntime.capi.onnxruntime_pybind11_state

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
    missing = missing_cuda()
    if missing:
        return f"{missing}: {OTHER_WHEEL}"
    if not torch.cuda.is_available():
        return "no CUDA device or driver"
    return None


def open_session(
    path: Path,
    settings: Settings,
    index: int,
    stream: torch.cuda.Stream | None,
    profile: Path | None = None,
    optimised: Path | None = None,
) -> Any:
    """A session on exactly this provider; `profile` and `optimised`: where it writes its profile and the graph it made. Raises Unavailable when ONNX Runtime hands back another one, Unsupported when an operator has no kernel."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = OPTIMIZATION[settings.optimization]
    options.log_severity_level = 3  # errors; warnings about placement are read back from the profile instead
    options.intra_op_num_threads = settings.threads or torch.get_num_threads()
    for name, size in settings.fixed.items():
        options.add_free_dimension_override_by_name(name, size)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        # In a file beside it: protobuf ends at 2 GiB, and only the graph is read back.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", optimised.name + ".data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    providers: list[Any] = [CPU]
    if settings.provider == "cuda":
        assert stream is not None
        if hasattr(onnxruntime, "preload_dlls"):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it did not find
                onnxruntime.preload_dlls()  # after torch, whose cuDNN and cuBLAS are then the ones in use
        providers = [(CUDA, cuda_options(settings, index, stream.cuda_stream))]
        if settings.cpu_nodes:
            providers.append(CPU)
    with translated(path.name):
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
        "use_tf32": "1" if has_tf32(settings) else "0",
        # Doubling the arena at each growth would count memory nobody uses into the peak.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if settings.prefer_nhwc:
        options["prefer_nhwc"] = "1"
    if settings.tunable_op:
        options |= {"tunable_op_enable": "1", "tunable_op_tuning_enable": "1"}
    return options


def has_tf32(settings: Settings) -> bool:
    """Whether float32 products run through tensor cores."""
    return settings.provider == "cuda" and settings.precision == Precision.TF32


@contextlib.contextmanager
def translated(name: str) -> Iterator[None]:
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


def bind_input(bound: Any, name: str, tensor: torch.Tensor, index: int) -> None:
    """Let the run read this tensor where it lies."""
    pointer = tensor.data_ptr() or _EMPTY.data_ptr()  # an empty tensor has no address, and ONNX Runtime wants one
    bound.bind_input(name, tensor.device.type, index, ELEMENT_TYPE[tensor.dtype], list(tensor.shape), pointer)


_EMPTY = torch.zeros(1, dtype=torch.int64)


def to_torch(value: Any) -> torch.Tensor:
    """A value ONNX Runtime allocated -> the same memory as a torch tensor, which keeps it alive."""
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
    wanted = dtype_of(value.data_type())
    return tensor if tensor.dtype is wanted else tensor.view(wanted)  # DLPack of a bool is uint8


def dtype_of(type_name: str) -> torch.dtype:
    """`tensor(float16)` -> torch.float16. Raises Unsupported for sequences, maps and strings."""
    dtype = TYPE_NAME.get(type_name.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise Unsupported(f"an input or output is a {type_name}", fix="export a model whose inputs and outputs are tensors of numbers")
    return dtype
