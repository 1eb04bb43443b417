"""Options + the file's free dimensions -> Settings: how a session is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpuopt.core import binding
from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Precision
from gpuopt.trust import packages

onnxruntime = packages.load("onnxruntime")

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

OTHER_WHEEL = "pip uninstall onnxruntime, then pip install 'gpuopt[ort-gpu]'"

OPTIMIZATION = {
    "off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


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


def missing_cuda() -> str | None:
    """None, or which wheel of ONNX Runtime is here instead of the one with the CUDA provider."""
    if CUDA in onnxruntime.get_available_providers():
        return None
    found = packages.installed("onnxruntime")
    over = " (installed over each other: the last one wins)" if " and " in found else ""
    return f"{found}{over} has no CUDA provider"


def kind_of(device: str) -> str:
    """`cuda:0` -> `cuda`."""
    return "cuda" if device.startswith("cuda") else device


def sizes(model: Model, inputs: Inputs, dynamic: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
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


def settings_of(options: Mapping[str, Any], device: str, fixed: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> Settings:
    """What was asked for, checked. Raises UsageError, Unavailable where the wheel lacks the provider."""
    preset = options.get("preset") or "default"
    if preset not in PRESETS:
        raise UsageError(f"ort has no preset {preset!r}", fix="one of " + ", ".join(PRESETS))
    unknown = [name for name in options if name not in (*USER_OPTIONS, *PIPELINE_OPTIONS)]
    if unknown:
        raise UsageError(f"ort has no option {unknown[0]!r}", fix="one of " + ", ".join(USER_OPTIONS))
    chosen = {**PRESETS[preset], **{name: options[name] for name in USER_OPTIONS if name in options}}
    wanted = chosen.pop("provider", kind_of(device))
    if wanted not in PROVIDERS:
        raise UsageError(f"provider is {wanted!r}", fix="one of " + ", ".join(PROVIDERS))
    missing = missing_cuda() if wanted == "cuda" else None
    if missing:  # before the device is compared: with this wheel no --device would do
        raise Unavailable(f"ort:{preset} asks for the CUDA provider, and {missing}", fix=OTHER_WHEEL)
    if wanted != kind_of(device):
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
