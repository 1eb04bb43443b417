"""Model + inputs -> Runner, by calling it: the reference every other backend is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpuopt.core.accepts import Accepts, device_of
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.result import PrecisionAudit
from gpuopt.core.spec import Precision
from gpuopt.core.tally import Tally
from gpuopt.programs import artifact, cuda
from gpuopt.programs.weigh import Weigh, tally_for

FORMS = frozenset({"module", "torchscript", "exported"})
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "cudnn-attention": {"attention": "cudnn"}}
"""`cudnn-attention`: scaled-dot-product attention through cuDNN where it can take the call. Not faster as a rule: see docs/evidence.md; it is there to be measured."""
_ATTENTION = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}
"""Kernels in the order they are tried."""
_OWN = frozenset({"preset", "precision", "dynamic", "trust", "signed_by_us"})


def available(device: str) -> str | None:
    """Why it cannot run here, or None."""
    return "torch sees no CUDA device" if device.startswith("cuda") and not torch.cuda.is_available() else None


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """Why this form, precision and device cannot be, or None."""
    if form not in FORMS:
        return f"eager runs PyTorch modules, not {form}"
    if precision is not None and precision.is_quantised and form != "module":
        return f"{precision} replaces a module's layers: this is {form}"
    if precision is Precision.TF32 and not device.startswith("cuda"):
        return "TF32 is a mode of NVIDIA tensor cores"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> EagerRunner:
    """Nothing is compiled; one call finds what cannot run. `options`: `precision`, `dynamic`."""
    chosen = _checked(options, device_of(inputs))
    runner = EagerRunner(
        module=model.module,
        form=model.form,
        device=device_of(inputs),
        inputs=inputs,
        precision=options.get("precision"),
        dynamic=options.get("dynamic") or {},
        attention=chosen.get("attention"),
    )
    runner(*inputs.args, **inputs.kwargs)
    cuda.synchronize(runner.device)
    return runner


def load(folder: Path, files: Mapping[str, str], options: Mapping[str, Any], device: str) -> EagerRunner:
    """The exported program of a bundle, called as it is; inputs are checked against what it was exported for."""
    chosen = _checked(options, device)
    module, accepts = artifact.load(folder, files, options)
    return EagerRunner(
        module=module,
        form="exported",
        device=device,
        precision=options.get("precision"),
        accepts=accepts,
        attention=chosen.get("attention"),
    )


class EagerRunner:
    """Calls the module without gradients."""

    def __init__(
        self,
        *,
        module: Any,
        form: str,
        device: str,
        inputs: Inputs | None = None,
        precision: str | None = None,
        dynamic: Mapping[str, Any] | None = None,
        accepts: Accepts | None = None,
        attention: str | None = None,
    ) -> None:
        self.device = device
        self.notes: list[str] = []
        self._module = module
        self._inputs = inputs
        self._precision = precision
        self._dynamic = dict(dynamic or {})
        self._accepts = accepts
        # inference_mode skips version counters and view tracking, which is worth 5-10% of a launch-bound forward;
        # an exported graph or a ScriptModule may update buffers in ways it forbids, so those get no_grad.
        self._mode: type[AbstractContextManager[Any]] = torch.inference_mode if form == "module" else torch.no_grad
        self._kernels = list(_ATTENTION[attention]) if attention else []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own outputs."""
        if self._accepts is not None:
            self._accepts.check(args, kwargs)
        if not self._kernels:
            with self._mode():
                return self._module(*args, **kwargs)
        with self._mode(), sdpa_kernel(self._kernels, set_priority=True):
            return self._module(*args, **kwargs)

    def audit(self) -> PrecisionAudit | None:
        """Runs one call and weighs every op that PyTorch dispatches. None for a ScriptModule, whose ops are fused out of sight, and for one loaded."""
        if self._inputs is None or isinstance(self._module, torch.jit.ScriptModule):
            return None
        given = self._inputs
        # Not inference_mode: there, composite ops arrive whole and hide the casts inside them.
        with torch.no_grad(), Weigh(tally_for(self.device)) as weigh:
            self._module(*given.args, **given.kwargs)
        tally: Tally = weigh.tally
        return tally.audit(self._precision, "aten dispatch of one call")

    def save(self, folder: Path) -> Mapping[str, str]:
        """The module as an exported program. Raises Unsupported where it cannot be exported."""
        if self._inputs is None:
            raise Unsupported("a bundle that was loaded is not saved again", fix="copy its folder")
        if isinstance(self._module, torch.jit.ScriptModule):
            raise Unsupported("a ScriptModule has no exported program", fix="ship the TorchScript file itself")
        return artifact.save(self._module, self._inputs, self._dynamic, folder)

    def close(self) -> None:
        """Let go of the module and its inputs."""
        self._module = None
        self._inputs = None


def _checked(options: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The preset's settings. Raises UsageError for a preset or an option that does not exist, Unsupported for one that needs a GPU."""
    preset = options.get("preset") or "default"
    if preset not in PRESETS:
        raise UsageError(f"eager has no preset {preset!r}", fix="one of: " + ", ".join(PRESETS))
    for key in options:
        if key not in _OWN:
            raise UsageError(f"eager has no option {key!r}", fix="it takes none")
    if PRESETS[preset].get("attention") == "cudnn" and not device.startswith("cuda"):
        raise Unsupported("cuDNN attention runs on an NVIDIA GPU", fix="leave the preset away")
    return PRESETS[preset]
