"""Model + inputs -> Runner, by torch_tensorrt's own compiler: an exported program with TensorRT engines in place of what TensorRT can take.

Written against the documented interface of torch_tensorrt 2.11 and later (`dynamo.compile`, `Input`, `save`); it has not been run on a GPU yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch_tensorrt

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.programs import artifact, ops
from gpuopt.programs.export import export
from gpuopt.trust import gate

FORMS = frozenset({"module", "exported"})

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "full": {"require_full_compilation": True},
    "best": {"optimization_level": 5},
}
"""Settings of torch_tensorrt.dynamo.compile. `full` refuses to leave any op to PyTorch."""

PROGRAM = "model.trt.pt2"
_OWN = frozenset({"preset", "precision", "dynamic", "trust", "signed_by_us"})


def available(device: str) -> str | None:
    """Why it cannot run here, or None. Importing this file already needs torch_tensorrt, and so TensorRT."""
    if not device.startswith("cuda"):
        return f"TensorRT runs on an NVIDIA GPU, not on {device}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form == "torchscript":
        return "a ScriptModule cannot be exported to a graph"
    if form not in FORMS:
        return f"torch_tensorrt takes PyTorch modules and exported programs, not {form}: use the backend trt"
    if precision is not None and precision.is_quantised:
        return f"torch_tensorrt knows nothing of the products that {precision} is made of: use inductor, aoti or cudagraphs"
    if precision is Precision.FP64:
        return "TensorRT has no fp64"
    return None if device.startswith("cuda") else f"TensorRT runs on an NVIDIA GPU, not on {device}"


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> EngineRunner:
    """Export, partition, build engines, call once.

    `options`: `preset`, `precision`, `dynamic`; anything else is a setting of torch_tensorrt.dynamo.compile by its own name.
    Raises Unsupported when the model cannot be exported, UsageError for an unknown preset or setting; what the compiler raises goes through.
    """
    dynamic = {name: (int(pair[0]), int(pair[1])) for name, pair in (options.get("dynamic") or {}).items()}
    accepts = Accepts.of(inputs, dynamic)
    program = export(model.module, inputs, dynamic)
    precision = options.get("precision")
    settings = _settings(options, precision)
    profiles = [_profile(t, i, accepts) for i, t in enumerate((*inputs.args, *inputs.kwargs.values()))]
    count = len(inputs.args)
    with torch.cuda.device(accepts.inputs[0].device):
        compiled = torch_tensorrt.dynamo.compile(
            program, arg_inputs=profiles[:count], kwarg_inputs=dict(zip(inputs.kwargs, profiles[count:], strict=True)), **settings
        )
    runner = EngineRunner(
        module=compiled,
        accepts=accepts,
        device=accepts.inputs[0].device,
        program=program,
        inputs=inputs,
        precision=precision,
        settings=settings,
    )
    runner(*inputs.args, **inputs.kwargs)
    torch.cuda.synchronize(runner.device)
    left = runner.left_to_torch()
    if left:
        runner.notes.append("left to PyTorch: " + ", ".join(left[:10]))
    return runner


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> EngineRunner:
    """A bundle's program with its engines inside; torch_tensorrt's operators were registered by importing it."""
    accepts = artifact.read_accepts(folder, files)
    ops.register()
    program = gate.load_exported(folder / files["torch-trt"], **artifact.consent(options))
    return EngineRunner(
        module=program.module(), accepts=accepts, device=device, program=None, inputs=None, precision=options.get("precision"), settings={}
    )


class EngineRunner:
    """A graph of engines behind a check of its inputs."""

    def __init__(
        self,
        *,
        module: Any,
        accepts: Accepts,
        device: str,
        program: Any,
        inputs: Inputs | None,
        precision: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        self.device = device
        self.notes: list[str] = []
        self.accepts = accepts
        self._module = module
        self._program = program
        self._inputs = inputs
        self._precision = precision
        self._settings = dict(settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in plain containers. Raises UsageError naming an input that is not what the engines were built for."""
        self.accepts.check(args, kwargs)
        with torch.no_grad():
            return self._module(*args, **kwargs)

    def left_to_torch(self) -> list[str]:
        """Ops no engine took, which run as PyTorch kernels between engines."""
        graph = getattr(self._module, "graph", None)
        if graph is None:
            return []
        plain = ("getitem", "sym_size", "tensorrt")
        return sorted({str(n.target) for n in graph.nodes if n.op == "call_function" and not any(p in str(n.target) for p in plain)})

    def audit(self) -> PrecisionAudit | None:
        """From the graph the engines were built from, which strong typing makes binding. None where this version does not type strongly."""
        if self._program is None or not self._settings.get("use_explicit_typing", False):
            return None
        tf32 = not self._settings.get("disable_tf32", True)
        tally = Tally(tf32_matmul=tf32, tf32_conv=tf32)
        tally.add_graph(self._program.graph)
        return tally.audit(self._precision, "exported graph, strongly typed engines")

    def save(self, folder: Path) -> Mapping[str, str]:
        """The program with its engines. Raises Unsupported for a runner that was loaded."""
        if self._inputs is None:
            raise Unsupported("a bundle that was loaded is not saved again", fix="copy its folder")
        torch_tensorrt.save(
            self._module,
            str(folder / PROGRAM),
            output_format="exported_program",
            arg_inputs=list(self._inputs.args),
            kwarg_inputs=dict(self._inputs.kwargs),
        )
        artifact.write_accepts(self.accepts, folder)
        return {"torch-trt": PROGRAM, "accepts": artifact.ACCEPTS}

    def close(self) -> None:
        """Let go of the engines."""
        self._module = self._program = self._inputs = None


def _settings(options: Mapping[str, Any], precision: str | None) -> dict[str, Any]:
    preset = options.get("preset") or "default"
    if preset not in PRESETS:
        raise UsageError(f"torch-trt has no preset {preset!r}", fix="one of: " + ", ".join(PRESETS))
    accepted = inspect.signature(torch_tensorrt.dynamo.compile).parameters
    settings: dict[str, Any] = {
        "disable_tf32": precision != Precision.TF32,
        "truncate_double": False,
        "cache_built_engines": False,  # a cached engine would be reported as a build time
        "reuse_cached_engines": False,
        **PRESETS[preset],
    }
    if "use_explicit_typing" in accepted:  # before 2.9 precision was a set of permissions, not a type system
        settings["use_explicit_typing"] = True
    for key, value in options.items():
        if key in _OWN:
            continue
        if key not in accepted:
            raise UsageError(f"torch-trt has no option {key!r}", fix="a parameter of torch_tensorrt.dynamo.compile")
        settings[key] = value
    return settings


def _profile(tensor: torch.Tensor, index: int, accepts: Accepts) -> Any:
    """A fixed input as it is; a dynamic one as min, usual and max shapes."""
    want = accepts.inputs[index]
    if all(isinstance(d, int) for d in want.shape):
        return tensor
    low = tuple(accepts.ranges[d][0] if isinstance(d, str) else d for d in want.shape)
    return torch_tensorrt.Input(
        min_shape=low, opt_shape=tuple(tensor.shape), max_shape=accepts.shape(index), dtype=tensor.dtype, name=want.name
    )
