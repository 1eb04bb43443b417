"""Model + inputs -> Runner, by AOTInductor: a package of native code that loads without the model's source.

Packages check nothing by themselves: one built for 64 rows returns 64 rows for 128, reads past the end for 1, and takes float64 bits for float32.
Every call is therefore checked here against what was built, and the library's own checks are switched on by the gate that loads it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.trust import gate, portable

FORMS = frozenset({"module", "exported"})

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
}
"""Inductor's own settings."""

PACKAGE = "model.aoti.pt2"
_QUIET = {"autotune_num_choices_displayed": 0}
_OWN = frozenset({"preset", "precision", "dynamic", "trust", "signed_by_us"})
_ALIGN_BYTES = 16
"""Inductor's kernels use 16-byte loads on a GPU and, in a package, take the alignment of every input for granted."""


def available(device: str) -> str | None:
    """Why it cannot run here, or None."""
    from torch._inductor import cpp_builder, exc

    if device.startswith("cuda") and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "AOTInductor needs a C++ compiler to build a package and finds none: install g++"
    return None


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form == "torchscript":
        return "a ScriptModule cannot be exported to a graph"
    if form not in FORMS:
        return f"AOTInductor takes PyTorch modules and exported programs, not {form}"
    if precision in (Precision.FP8, Precision.INT8):
        return f"a module cannot be cast to {precision}: quantise it first"
    if precision is Precision.TF32 and not device.startswith("cuda"):
        return "TF32 is a mode of NVIDIA tensor cores"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> PackageRunner:
    """Export, compile, package, load the package and call it once.

    `options`: `preset`, `precision`, `dynamic` (dimension -> (low, high)); anything else is a setting of Inductor by its own name.
    Raises Unsupported when the model cannot be exported, UsageError for an unknown preset or setting; what the compiler raises goes through.
    """
    settings = _settings(options)
    dynamic = options.get("dynamic") or {}
    device = _device_of(inputs)
    accepts = Accepts.of(inputs, dynamic, align_bytes=_ALIGN_BYTES if device.startswith("cuda") else 1)
    program = portable.export(model.module, inputs, dynamic)
    tf32_matmul, tf32_conv = _tf32(device)
    reader = _Reader(Tally(tf32_matmul=tf32_matmul, tf32_conv=tf32_conv))
    folder = Path(tempfile.mkdtemp(prefix="gpuopt-aoti-"))  # 0700: what lies here is about to be run
    try:
        with torch.no_grad():
            written = torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / PACKAGE), inductor_configs={**settings, "post_grad_custom_post_pass": reader}
            )
        call = gate.load_aoti(Path(written), signed_by_us=True, device_index=_index(device))
        runner = PackageRunner(
            call=call,
            accepts=accepts,
            device=device,
            package=Path(written),
            folder=folder,
            reader=reader,
            precision=options.get("precision"),
        )
        runner(*inputs.args, **inputs.kwargs)
        _synchronize(device)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return runner


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> PackageRunner:
    """A bundle's package, as it is. `options`: `trust` and `signed_by_us`, which the gate asks for."""
    accepts = portable.read_accepts(folder, files)
    package = folder / files["aoti"]
    call = gate.load_aoti(package, **portable.consent(options), device_index=_index(device))
    return PackageRunner(call=call, accepts=accepts, device=_indexed(device), package=package, precision=options.get("precision"))


class PackageRunner:
    """A loaded package behind a check of its inputs."""

    def __init__(
        self,
        *,
        call: Any,
        accepts: Accepts,
        device: str,
        package: Path,
        folder: Path | None = None,
        reader: _Reader | None = None,
        precision: str | None = None,
    ) -> None:
        self.device = device
        self.notes: list[str] = []
        self.accepts = accepts
        self._call = call
        self._package = package
        self._folder = folder
        """Ours to remove; None for a bundle's."""
        self._reader = reader
        self._precision = precision

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in plain containers. Raises UsageError naming an input that is not what the package was built for."""
        self.accepts.check(args, kwargs)
        return self._call(*args, **kwargs)

    def audit(self) -> PrecisionAudit | None:
        """From the post-grad graph the package was generated from; None for one that was loaded."""
        return self._reader.tally.audit(self._precision, "post-grad graph") if self._reader and self._reader.num_graphs else None

    def save(self, folder: Path) -> Mapping[str, str]:
        """The package and what it accepts."""
        shutil.copyfile(self._package, folder / PACKAGE)
        portable.write_accepts(self.accepts, folder)
        return {"aoti": PACKAGE, "accepts": portable.ACCEPTS}

    def close(self) -> None:
        """Unmap the code and remove the temporary package."""
        self._call = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class _Reader(CustomGraphPass):
    """Looks at each post-grad graph and changes nothing."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.num_graphs += 1
        self.tally.add_graph(graph)

    def __deepcopy__(self, memo: Any) -> _Reader:
        """AOTInductor deep-copies its settings: what a copy reads would be lost."""
        return self

    def uuid(self) -> None:
        """None keeps this compile out of Inductor's graph cache: a hit would skip the reading."""
        return None


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    preset = options.get("preset") or "default"
    if preset not in PRESETS:
        raise UsageError(f"aoti has no preset {preset!r}", fix="one of: " + ", ".join(PRESETS))
    settings = {**_QUIET, **PRESETS[preset]}
    known = torch._inductor.config.get_config_copy()
    for key, value in options.items():
        if key in _OWN:
            continue
        if key not in known:
            raise UsageError(f"aoti has no option {key!r}", fix="a name in torch._inductor.config")
        if key == "triton.cudagraphs" and value:
            raise Unsupported("a package cannot hold CUDA graphs", fix="use --backend inductor with the preset reduce-overhead")
        settings[key] = value
    return settings


def _index(device: str) -> int:
    """The gate's device index: -1 is the current one."""
    return int(device.partition(":")[2] or -1)


def _indexed(device: str) -> str:
    """`cuda` as tensors spell it."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def _tf32(device: str) -> tuple[bool, bool]:
    """Whether fp32 products and fp32 convolutions go through TF32 tensor cores here, now."""
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < (8, 0):
        return False, False
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # settings made through the newer interface cannot be read through the older one
        conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch's stub lacks it
        return torch.backends.cuda.matmul.fp32_precision == "tf32", conv.fp32_precision == "tf32"


def _device_of(inputs: Inputs) -> str:
    for value in (*inputs.args, *inputs.kwargs.values()):
        if isinstance(value, torch.Tensor):
            return str(value.device)
    return "cpu"


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
