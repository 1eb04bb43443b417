"""ONNX file -> strongly typed TensorRT network -> serialised engine, with what the builder said about it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuopt.backends.trt import audit
from gpuopt.backends.trt.flavour import Flavour
from gpuopt.core.errors import BadInput, OutOfMemory, Unavailable, Unsupported, UsageError
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> smallest, usual and largest shape."""

SYNTAX_CODES = frozenset({"MODEL_DESERIALIZE_FAILED", "INVALID_GRAPH", "INVALID_NODE", "INVALID_VALUE"})
"""Parser errors that say the file is broken; the others say that TensorRT cannot do it."""

_NOISE = re.compile(r"Make sure (?:in|out)put \S+ has Int64 binding")
"""Warnings about what cannot go wrong here: every binding's dtype is checked at each call."""


class Log:
    """TensorRT's log: the last lines kept, errors and warnings kept apart, nothing printed. `logger` is what TensorRT wants."""

    def __init__(self, module: Any) -> None:
        self.lines: deque[str] = deque(maxlen=400)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers = ""
        """The engine's layers as the builder describes them at DETAILED verbosity: the engine inspector's text, without a GPU."""
        log = self

        class Logger(module.ILogger):  # type: ignore[misc]  # a pybind class of a module chosen at run time
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.take(severity.name, message)

        self.logger = Logger()

    def take(self, severity: str, message: str) -> None:
        """One message. The builder calls from threads of its own."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif severity == "WARNING" and not _NOISE.search(message):
            text = re.sub(r"^\w+\.cpp:\d+: ", "", message)
            if text not in self.warnings:
                self.warnings.append(text)
        if message.startswith("Layers:\n"):
            self.layers = message
        else:
            self.lines.append(f"{severity}: {message}"[:500])

    @property
    def last_error(self) -> str:
        """The last error, readable."""
        return clean((self.errors or ["TensorRT gave no reason"])[-1])


def clean(text: str) -> str:
    """One line without the places in NVIDIA's source, and without the driver's absence, which every check of a shape reports again on a machine without a GPU."""
    line = " ".join(text.split())
    without_driver = re.sub(r"\[checkMacros\.cpp::\w+::\d+\] Error Code 1: Cuda Runtime \(In .*?\)\)", "", line).strip()
    line = without_driver or line
    line = re.sub(r"\[\w+\.cpp::[\w:~]+::\d+\]\s*", "", line)
    line = re.sub(r"\.?\s*\bIn \S+ at /\S+:\d+\s*", " ", line)
    return " ".join(line.split()).replace("( ", "(").replace(" )", ")")[:400]


@dataclass(slots=True, kw_only=True)
class Parsed:
    """A network with everything it must not outlive."""

    flavour: Flavour
    log: Log
    builder: Any
    network: Any
    parser: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serialised engine and what is known about it without running it."""

    plan: bytes = field(repr=False)
    audit: PrecisionAudit
    profile: Profile
    compute_capability: str
    """What it was built for; "" where plain TensorRT built for the GPU it saw (the runner then names it)."""
    notes: tuple[str, ...] = ()


def parse(path: Path, flavour: Flavour) -> Parsed:
    """The file must have passed the gate. Raises Unsupported naming each node TensorRT cannot take, BadInput for a broken file, Unavailable without a driver plain TensorRT needs."""
    trt, log = flavour.module, Log(flavour.module)
    try:
        builder = trt.Builder(log.logger)
    except TypeError as error:  # the factory returned null; pybind says so as a TypeError
        raise Unavailable(
            f"{flavour.title} cannot start its builder: {log.last_error}", fix="plain TensorRT needs an NVIDIA GPU and driver to build"
        ) from error
    network = builder.create_network(_network_flags(flavour))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(path)):
        raise _parser_error(parser, path)
    return Parsed(flavour=flavour, log=log, builder=builder, network=network, parser=parser)


def _network_flags(flavour: Flavour) -> int:
    # From 11 on every network is strongly typed and the flag is deprecated; before, without it, fp16 weights may silently run in fp32.
    if not flavour.is_rtx and int(flavour.version.split(".")[0]) >= 11:
        return 0
    return 1 << int(flavour.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parser_error(parser: Any, path: Path) -> Exception:
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"node {e.node_name() or '?'} ({e.node_operator() or '?'}): {clean(e.desc())}" for e in found]
    codes = {e.code().name for e in found}
    text = "; ".join(dict.fromkeys(lines[:5])) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
    if codes and codes <= SYNTAX_CODES:
        return BadInput(f"{path.name} is not a sound ONNX file: {text}", fix="export it again")
    return Unsupported(
        f"TensorRT cannot take {path.name}: {text or 'the parser gave no reason'}",
        fix="another backend; ort runs every standard ONNX operator",
    )


def profile_of(
    parsed: Parsed, shapes: Mapping[str, Shape], letters: Mapping[str, tuple[str | int, ...]], dynamic: Mapping[str, tuple[int, int]]
) -> Profile:
    """Shapes of the example inputs + ranges of the letters -> smallest, usual and largest shape of each input that has a free dimension.

    `letters` are the specs' shapes; a free dimension whose letter has no range is fixed at the example's size. Raises UsageError naming a size outside its range.
    """
    profile: dict[str, tuple[Shape, Shape, Shape]] = {}
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        wanted, usual = tuple(tensor.shape), shapes[tensor.name]
        if len(wanted) != len(usual):
            raise UsageError(
                f"input {tensor.name!r} has shape {list(usual)}, the file wants {len(wanted)} dimensions", fix=f"--input '{tensor.name}:…'"
            )
        low, high = list(usual), list(usual)
        names = letters.get(tensor.name, ())
        for axis, (size, here) in enumerate(zip(wanted, usual, strict=True)):
            if size not in (-1, here):
                raise UsageError(f"input {tensor.name!r} has {here} in dimension {axis}, the file has {size}", fix=f"give it {size}")
            letter = names[axis] if axis < len(names) else tensor.get_dimension_name(axis)
            if size == -1 and letter in dynamic:
                low[axis], high[axis] = dynamic[str(letter)]
                if not low[axis] <= here <= high[axis]:
                    raise UsageError(
                        f"{letter}={here} is outside its range {low[axis]} to {high[axis]}", fix=f"--dim {letter}={low[axis]}:{here}:{here}"
                    )
        profile[tensor.name] = (tuple(low), tuple(usual), tuple(high))
    return profile


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What a user may turn."""

    precision: Precision | None = None
    compute_capability: str | None = None
    """RTX: build for this one, `8.9`; None is the GPU of this machine, or without one `default_capability`."""
    optimization_level: int | None = None
    """0 (fastest build) .. 5 (slowest); None is TensorRT's own default, 3."""
    workspace_bytes: int | None = None
    hardware_compatibility: str = "none"
    """`none`, `ampere_plus` or `same_compute_capability`: an engine that runs on more than the GPU it was built on, slower."""
    version_compatible: bool = False
    timing_cache: Path | None = None
    """Plain TensorRT: tactic timings of earlier builds on the same GPU, read and written."""


def build_engine(
    parsed: Parsed, profile: Profile, settings: BuildSettings, *, layer_flops: Mapping[str, tuple[float | None, str]] | None = None
) -> Engine:
    """Build and audit. Precision is what the graph says: nothing here can change a dtype, TF32 for fp32 products apart, which only `tf32` allows.

    Raises Unsupported with TensorRT's reason when no engine comes out, OutOfMemory, UsageError.
    """
    trt, flavour, network = parsed.flavour.module, parsed.flavour, parsed.network
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else layers lose their dtypes and source nodes
    is_tf32 = settings.precision is Precision.TF32
    config.set_flag(trt.BuilderFlag.TF32) if is_tf32 else config.clear_flag(trt.BuilderFlag.TF32)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatibility != "none":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[settings.hardware_compatibility.upper()]
    if flavour.is_rtx and settings.compute_capability:
        target = flavour.capability(settings.compute_capability)
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    # Before the profile exists: the layers' sizes are read with the inputs fixed at their usual shapes.
    layers = audit.network_layers(
        trt, network, {name: usual for name, (_, usual, _) in profile.items()}, is_tf32=is_tf32, layer_flops=layer_flops or {}
    )
    _add_profile(parsed, config, profile)
    with _timing_cache(flavour, config, settings.timing_cache):
        serialised = parsed.builder.build_serialized_network(network, config)
    if serialised is None:
        text = parsed.log.last_error
        if "OutOfMemory" in text or "insufficient memory" in text.lower():
            raise OutOfMemory(f"TensorRT ran out of memory while building: {text}", fix="workspace_bytes, or a smaller model")
        raise Unsupported(f"TensorRT built no engine: {text}", fix="another backend or --precision")
    return Engine(
        plan=bytes(serialised),
        audit=audit.audit_layers(layers, audit.engine_layers(parsed.log.layers), settings.precision, is_tf32=is_tf32),
        profile=profile,
        compute_capability=settings.compute_capability or "",
        notes=tuple(parsed.log.warnings[:5]),
    )


def _add_profile(parsed: Parsed, config: Any, profile: Profile) -> None:
    made = parsed.builder.create_optimization_profile()
    for index in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(index)
        if tensor.is_shape_tensor:
            raise Unsupported(
                f"input {tensor.name!r} holds sizes, not data, and its values would have to be known",
                fix="export the model with fixed sizes",
            )
        if -1 in tuple(tensor.shape):
            made.set_shape(tensor.name, *profile[tensor.name])
    if config.add_optimization_profile(made) < 0:
        raise Unsupported(f"TensorRT refused the ranges of the inputs: {parsed.log.last_error}", fix="a narrower --dim NAME=MIN:USUAL:MAX")


@contextlib.contextmanager
def _timing_cache(flavour: Flavour, config: Any, path: Path | None) -> Iterator[None]:
    """Read timings of earlier builds, and write them back in one rename. RTX times nothing while it builds and deprecates the calls."""
    if flavour.is_rtx or path is None:
        yield
        return
    stored = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)
    yield
    cache = config.get_timing_cache()
    if cache is None:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".timing-", delete=False) as target:
        target.write(bytes(cache.serialize()))
    os.replace(target.name, path)


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/gpuopt/trt`, private; None where it cannot be made or others may write to it: a timing cache steers native code."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "gpuopt" / "trt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    return folder if found.st_uid == os.getuid() and not found.st_mode & 0o022 else None
