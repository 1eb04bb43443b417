"""Serialised engine -> Runner: on torch's current stream by device pointers, or, built for another machine, one that can only be saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpuopt.backends.trt import audit as layers_of
from gpuopt.backends.trt.flavour import Flavour
from gpuopt.backends.trt.network import Engine, Log, Profile
from gpuopt.core import binding
from gpuopt.core.accepts import dtype_name
from gpuopt.core.errors import BadInput, OutOfMemory, Unavailable, UsageError
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.trust import gate

TORCH_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an engine was built with; `engine.json` in a bundle. An engine runs on this alone, and nothing in it can be asked before it is deserialised."""

    flavour: str
    version: str
    compute_capability: str
    device_name: str
    """GPU it was built on; "" for an engine built by name."""
    portable: bool
    """Built to run on other GPUs than `device_name`."""
    version_compatible: bool
    precision: str | None
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def write_facts(facts: Facts, path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(asdict(facts), sort_keys=True, indent=1) + "\n")


def read_facts(path: Path) -> Facts:
    """Raises BadInput where the file is not what `write_facts` wrote."""
    try:
        plain = json.loads(path.read_text())
        profile = {name: tuple(tuple(int(size) for size in shape) for shape in shapes) for name, shapes in plain.pop("profile").items()}
        facts = Facts(profile=profile, **plain)  # type: ignore[arg-type]  # three shapes each, checked below
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path.name} cannot be read: {error}", fix="compile the bundle again") from error
    if any(len(shapes) != 3 for shapes in profile.values()):
        raise BadInput(f"{path.name} has an input without three shapes", fix="compile the bundle again")
    return facts


def mismatch(facts: Facts, flavour: Flavour, capability: str | None, device_name: str | None) -> str | None:
    """None, or why an engine with these facts cannot run here. Asked before it is deserialised: TensorRT itself answers with null, or with a crash."""
    if facts.flavour != flavour.name:
        return f"the engine was built by {facts.flavour} {facts.version}, here is {flavour.title}"
    same_major = facts.version.split(".")[0] == flavour.version.split(".")[0]
    if facts.version != flavour.version and not (facts.version_compatible and same_major):
        return f"the engine was built by {facts.flavour} {facts.version}, here is version {flavour.version}"
    if capability is None:
        return "no NVIDIA GPU or driver here"
    if facts.compute_capability and facts.compute_capability != capability and not facts.portable:
        return f"the engine was built for compute capability {facts.compute_capability}, this GPU has {capability}"
    if facts.device_name and facts.device_name != device_name and not facts.portable:
        return f"the engine was built on {facts.device_name}, this GPU is {device_name}"
    return None


class BuiltEngine:
    """An engine for another machine: it can be audited and saved, and says why it cannot be called."""

    build_only = True

    def __init__(self, engine: Engine, facts: Facts, source: Path, reason: str) -> None:
        self.device = "cpu"
        self.notes = list(engine.notes)
        self._engine, self._facts, self._source, self._reason = engine, facts, source, reason

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises Unavailable with the reason."""
        raise Unavailable(f"this engine was only built: {self._reason}", fix="load its bundle on a machine it was built for")

    def audit(self) -> PrecisionAudit | None:
        """Of the layers that were built."""
        return self._engine.audit

    def save(self, folder: Path) -> Mapping[str, str]:
        """The engine, the ONNX file it came from, and what it was built with."""
        return save_engine(folder, self._engine.plan, self._facts, self._source)

    def close(self) -> None:
        """Nothing is held on a device."""


def save_engine(folder: Path, plan: bytes, facts: Facts, source: Path) -> dict[str, str]:
    """Write engine.plan, engine.json and the portable source: role -> file name."""
    (folder / "engine.plan").write_bytes(plan)
    write_facts(facts, folder / "engine.json")
    return {**gate.copy_onnx(source, folder / "model.onnx"), "engine": "engine.plan", "facts": "engine.json"}


class EngineRunner:
    """An engine on a GPU. Inputs are read and outputs written where torch has them."""

    build_only = False

    def __init__(self, plan: bytes, facts: Facts, flavour: Flavour, source: Path, device: str, built: Engine | None = None) -> None:
        """`device` is `cuda:N`."""
        self._trt, self._log = flavour.module, Log(flavour.module)
        self._plan, self._facts, self._source, self._built = plan, facts, source, built
        self._index = torch.device(device).index or 0
        self.device = device
        self.notes = list(built.notes) if built else []
        with torch.cuda.device(self._index):
            self._runtime: Any = self._trt.Runtime(self._log.logger)
            if facts.version_compatible:
                self._runtime.engine_host_code_allowed = True  # the gate has checked that this engine is ours or trusted
            self._engine: Any = gate.deserialize_engine(self._runtime, plan)
            if self._engine is None:
                raise Unavailable(
                    f"TensorRT does not load the engine: {self._log.last_error}", fix="compile the model again on this machine"
                )
            self._context: Any = self._engine.create_execution_context()
            if self._context is None:
                raise OutOfMemory(f"TensorRT cannot hold the engine's activations: {self._log.last_error}", fix="a smaller batch or range")
        # enqueueV3 synchronises on the default stream, so a stream of its own stands in for it; streams wait for each other, not the host.
        self._stream = torch.cuda.Stream(self._index)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [name for name in names if modes[name] == self._trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if modes[name] == self._trt.TensorIOMode.OUTPUT]
        self._dtypes = {name: TORCH_DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        self._on_host = {name for name in names if self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST}
        self._allocators: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Output name -> tensor on the device, not waited for. Raises UsageError for inputs outside the profile, OutOfMemory."""
        if self._context is None:
            raise RuntimeError("this runner was closed")
        tensors = check_inputs(binding.bind(self._inputs, args, kwargs), self._facts.profile, self._dtypes, self.device, self._on_host)
        caller = torch.cuda.current_stream(self._index)
        stream = caller if caller.cuda_stream else self._stream
        for name, tensor in tensors.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr() or self._nothing().data_ptr())
        outputs = {name: self._bind_output(name) for name in self._outputs}
        if stream is not caller:
            stream.wait_stream(caller)
        with torch.cuda.device(self._index):
            is_queued = self._context.execute_async_v3(stream.cuda_stream)
        if not is_queued:
            text = self._log.last_error
            raise (OutOfMemory if "memory" in text.lower() else Unavailable)(
                f"TensorRT did not run the engine: {text}", fix="see the reason; --backend inductor runs anywhere"
            )
        if stream is not caller:
            caller.wait_stream(stream)
        return {name: tensor if tensor is not None else self._allocators[name].take() for name, tensor in outputs.items()}

    def _bind_output(self, name: str) -> torch.Tensor | None:
        """A fresh tensor of the shape TensorRT derives from the inputs; None where only the run will tell, and an allocator stands by."""
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            self._allocators[name] = _output_allocator(self._trt, self._dtypes[name], self.device)
            self._context.set_output_allocator(name, self._allocators[name])
            return None
        tensor = torch.empty(shape, dtype=self._dtypes[name], device="cpu" if name in self._on_host else self.device)
        self._context.set_tensor_address(name, tensor.data_ptr() or self._nothing().data_ptr())
        return tensor

    def _nothing(self) -> torch.Tensor:
        """An address for tensors without elements: TensorRT refuses null."""
        if not hasattr(self, "_spare"):
            self._spare = torch.empty(16, dtype=torch.uint8, device=self.device)
        return self._spare

    def audit(self) -> PrecisionAudit | None:
        """Of the layers that were built; for an engine out of a bundle, of what the inspector says, by layers and not by FLOPs."""
        if self._built is not None:
            return self._built.audit
        return audit_inspected(self.inspect(), Precision(self._facts.precision) if self._facts.precision else None)

    def inspect(self) -> str:
        """The engine inspector's JSON: layers with shapes, dtypes, tactics and source nodes."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # else free dimensions read -1
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def save(self, folder: Path) -> Mapping[str, str]:
        """The engine, the ONNX file it came from, and what it was built with."""
        return save_engine(folder, self._plan, self._facts, self._source)

    def close(self) -> None:
        """Give back the engine and its memory. Harmless twice."""
        if self._context is not None:
            torch.cuda.synchronize(self._index)
        self._context = self._engine = self._runtime = None


def audit_inspected(text: str, requested: Precision | None) -> PrecisionAudit:
    """The inspector's JSON alone -> share of computing layers by dtype: without the network there are no FLOPs to weigh them with."""
    tally = Tally()
    for layer in layers_of.engine_layers(text):
        if layer.dtype and layer.kind.lower() not in layers_of.COPYING:
            dtype = "tf32" if requested is Precision.TF32 and layer.dtype == "float32" else layer.dtype
            tally.add_counted("product", dtype, 1.0, layer.name)
    return tally.audit(requested.value if requested else None, "engine inspector, layers counted: the bundle holds no FLOPs a layer")


def check_inputs(
    tensors: Mapping[str, torch.Tensor],
    profile: Profile,
    dtypes: Mapping[str, torch.dtype],
    device: str,
    on_host: set[str] | frozenset[str] = frozenset(),
) -> dict[str, torch.Tensor]:
    """Name -> contiguous tensor that fits the engine: it reads pointers on trust, and a wrong dtype or size would be wrong numbers. Raises UsageError."""
    checked = {}
    for name, tensor in tensors.items():
        if tensor.dtype is not dtypes[name]:
            raise UsageError(
                f"input {name!r} is {dtype_name(tensor.dtype)}, the engine wants {dtype_name(dtypes[name])}",
                fix="cast it, or build the engine at this dtype",
            )
        place = "cpu" if name in on_host else device
        if str(tensor.device) != place:
            raise UsageError(f"input {name!r} is on {tensor.device}, the engine wants it on {place}", fix=f"move it to {place}")
        low, _, high = profile[name]
        if tensor.dim() != len(low):
            raise UsageError(
                f"input {name!r} has shape {list(tensor.shape)}, the engine wants {len(low)} dimensions",
                fix=f"a shape within {list(low)} … {list(high)}",
            )
        for axis, (least, size, most) in enumerate(zip(low, tensor.shape, high, strict=True)):
            if not least <= size <= most:
                wanted = f"{least}" if least == most else f"{least} to {most}"
                raise UsageError(
                    f"input {name!r} has {size} in dimension {axis}, the engine takes {wanted}",
                    fix="build with a range: --dim NAME=MIN:USUAL:MAX",
                )
        checked[name] = tensor.detach().contiguous()
    return checked


def _output_allocator(trt: Any, dtype: torch.dtype, device: str) -> Any:
    """For outputs whose size only the run tells (NonZero, NMS): TensorRT asks for bytes, then names the shape."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # a pybind class of a module chosen at run time
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            self.buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
            return int(self.buffer.data_ptr())

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def take(self) -> torch.Tensor:
            num_bytes = torch.Size(self.shape).numel() * dtype.itemsize
            return self.buffer[:num_bytes].view(dtype).view(self.shape)

    return Allocator()
