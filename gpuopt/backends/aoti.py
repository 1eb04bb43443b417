"""Model + inputs -> Runner, by AOTInductor: a package of native code that loads without the model's source.

Packages check nothing by themselves: one built for 64 rows returns 64 rows for 128, reads past the end for 1, and takes float64 bits for float32.
Every call is therefore checked here against what was built, and the library's own checks are switched on by the gate that loads it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.accepts import Accepts, device_of
from gpuopt.core.errors import Unsupported
from gpuopt.core.launches import Launch
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.programs import artifact, cuda, generated, inductor, ops
from gpuopt.programs.export import export
from gpuopt.programs.weigh import tally_for
from gpuopt.trust import gate

OPAQUE_ON_CPU = True
"""Its package calls C++ kernels that record nothing: a trace would show one long gap."""

FORMS = frozenset({"module", "exported"})

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
}
"""Inductor's own settings."""

PACKAGE = "model.aoti.pt2"
_OWN = frozenset({"preset", "precision", "dynamic", "trust", "signed_by_us"})
_ALIGN_BYTES = 16
"""Inductor's kernels use 16-byte loads on a GPU and, in a package, take the alignment of every input for granted."""


def available(device: str) -> str | None:
    """Why it cannot run here, or None."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None if inductor.has_cpp_compiler() else "AOTInductor needs a C++ compiler to build a package and finds none: install g++"


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form == "torchscript":
        return "a ScriptModule cannot be exported to a graph"
    if form not in FORMS:
        return f"AOTInductor takes PyTorch modules and exported programs, not {form}"
    if precision is not None and precision.is_quantised and form != "module":
        return f"{precision} replaces a module's layers: this is {form}"
    if precision is Precision.TF32 and not device.startswith("cuda"):
        return "TF32 is a mode of NVIDIA tensor cores"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> PackageRunner:
    """Export, compile, package, load the package and call it once.

    `options`: `preset`, `precision`, `dynamic` (dimension -> (low, high)); anything else is a setting of Inductor by its own name.
    A range that begins at 1 takes two packages: the compiler fixes size 1 for good, so a dynamic package begins at 2.
    Raises Unsupported when the model cannot be exported, UsageError for an unknown preset or setting; what the compiler raises goes through.
    """
    settings = _settings(options)
    ranges = {name: (int(pair[0]), int(pair[1])) for name, pair in (options.get("dynamic") or {}).items()}
    device = device_of(inputs)
    accepts = Accepts.of(inputs, ranges, align_bytes=_ALIGN_BYTES if device.startswith("cuda") else 1)
    single = _single(ranges)
    reader = inductor.GraphReader(tally_for(device))
    written: list[generated.Generated] = []
    folder = Path(tempfile.mkdtemp(prefix="gpuopt-aoti-"))  # 0700: what lies here is about to be run
    try:
        above = {name: (max(2, low) if name == single else low, high) for name, (low, high) in ranges.items()}
        with inductor.reading(written):
            packages = {"": _package(model.module, inputs, above, folder / PACKAGE, settings, reader)}
            if single is not None:
                rest = {name: pair for name, pair in ranges.items() if name != single}
                one = folder / _single_name(single)
                packages[single] = _package(model.module, _narrowed(inputs, single), rest, one, settings, reader)
        calls = {letter: gate.load_aoti(path, signed_by_us=True, device_index=_index(device)) for letter, path in packages.items()}
        runner = PackageRunner(
            calls=calls,
            accepts=accepts,
            device=device,
            packages=packages,
            folder=folder,
            reader=reader,
            written=written,
            precision=options.get("precision"),
        )
        runner(*inputs.args, **inputs.kwargs)
        cuda.synchronize(device)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return runner


def structural(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the same program without what only picks its kernels: what the fp32 stage of a verification builds."""
    return {**{key: value for key, value in options.items() if key not in inductor.PICKING}, "preset": "default"}


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> PackageRunner:
    """A bundle's packages, as they are. `options`: `trust` and `signed_by_us`, which the gate asks for."""
    accepts = artifact.read_accepts(folder, files)
    packages = {role.partition(":")[2].partition("=")[0]: folder / name for role, name in files.items() if role.partition(":")[0] == "aoti"}
    ops.register()  # what is compiled calls operators of ours by name
    calls = {k: gate.load_aoti(path, **artifact.consent(options), device_index=_index(device)) for k, path in packages.items()}
    return PackageRunner(calls=calls, accepts=accepts, device=_indexed(device), packages=packages, precision=options.get("precision"))


class PackageRunner:
    """Loaded packages behind a check of their inputs: one for all sizes, and one for size 1 of a dimension whose range begins there."""

    def __init__(
        self,
        *,
        calls: Mapping[str, Any],
        accepts: Accepts,
        device: str,
        packages: Mapping[str, Path],
        folder: Path | None = None,
        reader: inductor.GraphReader | None = None,
        written: Sequence[generated.Generated] = (),
        precision: str | None = None,
    ) -> None:
        self.device = device
        self.notes: list[str] = []
        self.accepts = accepts
        self._calls = dict(calls)
        """"" is the package for all sizes, a letter the one for size 1 of that dimension."""
        self._packages = dict(packages)
        self._folder = folder
        """Ours to remove; None for a bundle's."""
        self._reader = reader
        self._written = written
        self._precision = precision
        self._single = next((letter for letter in self._calls if letter), None)
        self._where = _find(accepts, self._single) if self._single else (0, 0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in plain containers. Raises UsageError naming an input that is not what the package was built for."""
        self.accepts.check(args, kwargs)
        return self._calls[self._chosen(args, kwargs)](*args, **kwargs)

    def audit(self) -> PrecisionAudit | None:
        """From the post-grad graphs the packages were generated from; None for one that was loaded."""
        if self._reader is None or not self._reader.num_graphs:
            return None
        tally: Tally = self._reader.tally
        return tally.audit(self._precision, "post-grad graph")

    def launches(self) -> tuple[Launch, ...]:
        """What the packages launch in a call, in order, with the modules and lines it stems from; nothing for packages that were loaded."""
        return generated.launches(self._written)

    def save(self, folder: Path) -> Mapping[str, str]:
        """The packages and what they accept."""
        files = {}
        for letter, package in self._packages.items():
            shutil.copyfile(package, folder / package.name)
            files[f"aoti:{letter}=1" if letter else "aoti"] = package.name
        artifact.write_accepts(self.accepts, folder)
        return {**files, "accepts": artifact.ACCEPTS}

    def close(self) -> None:
        """Let go of the code and remove the temporary packages."""
        self._calls = {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _chosen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        if self._single is None:
            return ""
        index, axis = self._where
        tensor = args[index] if index < len(args) else kwargs[self.accepts.inputs[index].name]
        return self._single if tensor.shape[axis] == 1 else ""


def _package(
    module: torch.nn.Module,
    inputs: Inputs,
    ranges: Mapping[str, tuple[int, int]],
    path: Path,
    settings: Mapping[str, Any],
    reader: inductor.GraphReader,
) -> Path:
    program = export(module, inputs, ranges)
    with torch.no_grad():
        written = torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={**settings, "post_grad_custom_post_pass": reader}
        )
    return Path(written)


def _single(ranges: Mapping[str, tuple[int, int]]) -> str | None:
    """The dimension whose range begins at 1. Raises Unsupported for two of them (four packages) and for ranges that begin at 0."""
    found = [name for name, (low, high) in ranges.items() if low < 2 <= high]
    for name, (low, high) in ranges.items():
        if low < 1 or high < 2:
            raise Unsupported(f"dimension {name} cannot be dynamic from {low} to {high}", fix=f"give it a range: --dim {name}=1:2:8")
    if len(found) > 1:
        raise Unsupported(
            f"the ranges of {' and '.join(found)} begin at 1, and the compiler fixes size 1 for good",
            fix=f"begin one of them at 2: --dim {found[1]}=2:…",
        )
    return found[0] if found else None


def _single_name(letter: str) -> str:
    return f"model.{letter}1.aoti.pt2"


def _find(accepts: Accepts, letter: str) -> tuple[int, int]:
    """Which input and which of its axes carry a dynamic dimension."""
    return next((i, axis) for i, want in enumerate(accepts.inputs) for axis, d in enumerate(want.shape) if d == letter)


def _narrowed(inputs: Inputs, letter: str) -> Inputs:
    """The same inputs cut to size 1 along a dimension, memory order kept."""
    bound = [*inputs.args, *inputs.kwargs.values()]
    accepts = Accepts.of(inputs)
    for index, spec in enumerate(inputs.specs[: len(bound)]):
        for axis, d in enumerate(spec.shape):
            if d == letter:
                cut = bound[index].narrow(axis, 0, 1)
                one = torch.empty_strided(cut.shape, accepts.strides(index, cut.shape), dtype=cut.dtype, device=cut.device)
                bound[index] = one.copy_(cut)
    count = len(inputs.args)
    return Inputs(args=tuple(bound[:count]), kwargs=dict(zip(inputs.kwargs, bound[count:], strict=True)), specs=inputs.specs)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get("triton.cudagraphs"):
        raise Unsupported("a package cannot hold CUDA graphs", fix="use --backend inductor with the preset reduce-overhead")
    return inductor.settings("aoti", PRESETS, options, own=_OWN)


def _index(device: str) -> int:
    """The gate's device index: -1 is the current one."""
    return int(device.partition(":")[2] or -1)


def _indexed(device: str) -> str:
    """`cuda` as tensors spell it."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
