"""ONNX file + inputs -> Runner, by a strongly typed TensorRT engine. Without a GPU the same code builds engines that can be audited and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpuopt.backends.trt import flavour as flavours
from gpuopt.backends.trt.flavour import Flavour
from gpuopt.backends.trt.network import BuildSettings, Engine, build_engine, cache_folder, parse, profile_of
from gpuopt.backends.trt.runner import BuiltEngine, EngineRunner, Facts, mismatch, read_facts
from gpuopt.core import binding
from gpuopt.core.errors import BadInput, Unavailable, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import Precision
from gpuopt.trust import gate

FORMS = frozenset({"onnx"})

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast-build": {"optimization_level": 1, "timing_cache": True},
    "max": {"optimization_level": 5},
    "portable": {"hardware_compatibility": "ampere_plus", "version_compatible": True},
}
"""Preset -> the options it stands for. `portable` trades speed for an engine that other GPUs and later versions load."""

USER_OPTIONS = (
    "flavour",
    "compute_capability",
    "optimization_level",
    "workspace_bytes",
    "hardware_compatibility",
    "version_compatible",
    "timing_cache",
)
PIPELINE_OPTIONS = ("preset", "precision", "dynamic", "layer_flops", "build_only", "device")

COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")


DEFAULT_TARGET = "12.0"
"""What an RTX engine is built for where neither the user nor a GPU says: desktop cards of the newest generation that the flavour knows by name."""


def available(device: str) -> str | None:
    """None, or why no engine can run on this device here. Building without running asks less: see `build_only`."""
    if not device.startswith("cuda"):
        return "TensorRT engines run on NVIDIA GPUs; --build-only builds one without a GPU"
    try:
        found = flavours.find()
    except Unavailable as error:
        return f"{error.message}: {error.fix}"
    capability = _capability(device)
    if capability is None:
        return "no NVIDIA GPU or driver here; --build-only builds an engine without one"
    return refusal(found, capability)


def refusal(flavour: Flavour, capability: str) -> str | None:
    """None, or why this flavour does not run on a GPU of this compute capability."""
    if flavour.is_rtx and capability not in flavour.capabilities:
        return f"{flavour.title} does not run on compute capability {capability} (it knows {', '.join(flavour.capabilities)}); plain TensorRT does: pip install 'gpuopt[trt]'"
    return None


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """None, or why TensorRT can never build this form at this precision."""
    if form not in FORMS:
        return f"takes ONNX files, not {form}"
    if precision is Precision.FP64:
        return "TensorRT has no double precision"
    if precision is not None and precision.is_quantised:
        return f"{precision} comes from quantize and dequantize nodes in the ONNX file; ask for no precision to build such a file as it is"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> Runner:
    """Engine for the GPU of the inputs; with `build_only`, for `compute_capability`, and nothing is run.

    Precision is the file's own: TensorRT 11 has no other. Raises Unavailable, Unsupported, BadInput, OutOfMemory, UsageError.
    """
    assert model.path is not None, "an onnx model has a path"
    chosen = _chosen(options)
    flavour = flavours.find(chosen.get("flavour"))
    device = _device(inputs, options)
    capability = _capability(device)
    reason = _cannot_run(flavour, device, capability)
    if reason and not options.get("build_only"):
        raise Unavailable(f"trt cannot run on {device}: {reason}", fix="--build-only builds the engine for another machine")
    precision = Precision(options["precision"]) if options.get("precision") else None
    target = _target(flavour, chosen.get("compute_capability"), None if reason else capability)
    gate.check_onnx(model.path)
    with torch.cuda.device(device) if capability else contextlib.nullcontext():  # plain TensorRT builds for the current GPU
        parsed = parse(model.path, flavour)
        engine = build_engine(
            parsed,
            profile_of(parsed, *_shapes(parsed.network, inputs), options.get("dynamic") or {}),
            BuildSettings(
                precision=precision,
                compute_capability=target,
                optimization_level=chosen.get("optimization_level"),
                workspace_bytes=chosen.get("workspace_bytes"),
                hardware_compatibility=chosen.get("hardware_compatibility", "none"),
                version_compatible=bool(chosen.get("version_compatible", False)),
                timing_cache=_timing_cache(flavour, device, capability) if chosen.get("timing_cache", True) else None,
            ),
            layer_flops=options.get("layer_flops"),
        )
    facts = _facts(flavour, engine, chosen, capability, device)
    if options.get("build_only") or reason:
        return BuiltEngine(engine, facts, model.path, reason or "--build-only was asked for")
    return EngineRunner(engine.plan, facts, flavour, model.path, _numbered(device), built=engine)


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> Runner:
    """Runner from the files `save` wrote. Versions and GPU are compared before the engine is deserialised. Raises Unavailable naming both sides, BadInput."""
    facts = read_facts(folder / files["facts"])
    if facts.flavour not in flavours.MODULES:
        raise BadInput(f"{folder.name} names the unknown TensorRT flavour {facts.flavour!r}", fix="compile the bundle again")
    flavour = flavours.find(facts.flavour)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None
    reason = mismatch(facts, flavour, _capability(device), name)
    if reason is None:
        reason = _cannot_run(flavour, device, _capability(device))
    if reason:
        raise Unavailable(
            f"the engine in {folder.name} does not run here: {reason}", fix="compile the model again here: the bundle holds its model.onnx"
        )
    try:
        plan = (folder / files["engine"]).read_bytes()
    except OSError as error:
        raise BadInput(f"the engine in {folder.name} cannot be read: {error.strerror}", fix="copy the bundle again") from error
    return EngineRunner(plan, facts, flavour, folder / files["onnx"], _numbered(device))


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    preset = options.get("preset") or "default"
    if preset not in PRESETS:
        raise UsageError(f"trt has no preset {preset!r}", fix="one of " + ", ".join(PRESETS))
    unknown = [name for name in options if name not in (*USER_OPTIONS, *PIPELINE_OPTIONS)]
    if unknown:
        raise UsageError(f"trt has no option {unknown[0]!r}", fix="one of " + ", ".join(USER_OPTIONS))
    chosen = {**PRESETS[preset], **{name: options[name] for name in USER_OPTIONS if options.get(name) is not None}}
    if chosen.get("hardware_compatibility", "none") not in COMPATIBILITY:
        raise UsageError(f"hardware_compatibility is {chosen['hardware_compatibility']!r}", fix="one of " + ", ".join(COMPATIBILITY))
    level = chosen.get("optimization_level")
    if level is not None and level not in range(6):
        raise UsageError(f"optimization_level is {level!r}", fix="a whole number from 0 to 5")
    return chosen


def _device(inputs: Inputs, options: Mapping[str, Any]) -> str:
    given = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, torch.Tensor)]
    return str(options.get("device") or (given[0].device if given else "cpu"))


def _numbered(device: str) -> str:
    """`cuda` -> `cuda:0`, as tensors say it."""
    return f"cuda:{torch.device(device).index or 0}"


def _capability(device: str) -> str | None:
    """`9.0`, or None where there is no GPU to ask."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(torch.device(device).index or 0)
    return f"{major}.{minor}"


def _cannot_run(flavour: Flavour, device: str, capability: str | None) -> str | None:
    if capability is None:
        return "no NVIDIA GPU or driver" if device.startswith("cuda") else "the inputs are on the CPU"
    return refusal(flavour, capability)


def _target(flavour: Flavour, asked: object, here: str | None) -> str | None:
    """The capability an RTX engine is built for: the one asked, else this GPU's, else DEFAULT_TARGET. Plain TensorRT builds for what it sees."""
    if not flavour.is_rtx:
        if asked is not None and str(asked) != here:
            raise UsageError(
                f"{flavour.title} builds for the GPU of this machine, not for {asked}",
                fix="leave compute_capability out, or flavour=tensorrt_rtx",
            )
        return None
    target = str(asked) if asked is not None else here or DEFAULT_TARGET
    flavour.capability(target)
    return target


def _shapes(network: Any, inputs: Inputs) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str | int, ...]]]:
    """Input name -> shape of the example, and the letters of its spec."""
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    bound = binding.bind(names, inputs.args, inputs.kwargs)
    return {name: tuple(tensor.shape) for name, tensor in bound.items()}, binding.letters(names, inputs)


def _timing_cache(flavour: Flavour, device: str, capability: str | None) -> Path | None:
    folder = cache_folder()
    if folder is None or capability is None:
        return None
    gpu = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    return folder / f"timing-{flavour.version}-{gpu}.cache"


def _facts(flavour: Flavour, engine: Engine, chosen: Mapping[str, Any], capability: str | None, device: str) -> Facts:
    on_gpu = not flavour.is_rtx and capability is not None
    return Facts(
        flavour=flavour.name,
        version=flavour.version,
        compute_capability=engine.compute_capability or capability or "",
        device_name=torch.cuda.get_device_name(device) if on_gpu else "",
        portable=chosen.get("hardware_compatibility", "none") != "none",
        version_compatible=bool(chosen.get("version_compatible", False)),
        precision=engine.audit.requested,
        profile=engine.profile,
    )


__all__ = ["FORMS", "PRESETS", "available", "build", "load", "refusal", "supports"]
