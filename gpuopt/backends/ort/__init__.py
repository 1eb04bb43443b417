"""ONNX file + inputs -> Runner, by ONNX Runtime's CPU or CUDA provider, with the tensors bound in place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpuopt.backends.ort.runner import OrtRunner
from gpuopt.backends.ort.session import available
from gpuopt.backends.ort.settings import PRESETS, Settings, kind_of, settings_of, sizes
from gpuopt.core.errors import BadInput, Unavailable
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import Precision

FORMS = frozenset({"onnx"})


def supports(form: str, precision: Precision | None, device: str) -> str | None:
    """None, or why this form at this precision can never run on this kind of device."""
    if form not in FORMS:
        return f"takes ONNX files, not {form}"
    if precision is Precision.TF32 and not device.startswith("cuda"):
        return "TF32 exists on NVIDIA GPUs only"
    if precision is not None and precision.is_quantised:
        return f"{precision} comes from quantize and dequantize nodes in the ONNX file; ask for no precision to run such a file as it is"
    return None


def build(model: Model, inputs: Inputs, options: Mapping[str, Any]) -> Runner:
    """Session on the device of the inputs. Dimensions outside `dynamic` are fixed at the inputs' own.

    Raises Unavailable when the provider is missing, Unsupported when an operator has no kernel, OutOfMemory, UsageError.
    """
    assert model.path is not None, "an onnx model has a path"
    given = [t for t in (*inputs.args, *inputs.kwargs.values()) if isinstance(t, torch.Tensor)]
    device = str(options.get("device") or (given[0].device if given else "cpu"))
    settings = settings_of(options, device, *sizes(model, inputs, options.get("dynamic") or {}))
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
    if settings.provider != kind_of(device):
        raise Unavailable(
            f"the bundle was built for ONNX Runtime on {settings.provider}, not for {device}", fix=f"--device {settings.provider}"
        )
    return OrtRunner(folder / files["onnx"], settings, device, layer_flops=options.get("layer_flops") or {})


__all__ = ["FORMS", "PRESETS", "available", "build", "load", "supports"]
