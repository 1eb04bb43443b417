"""ModelRef -> Model: finds out what was named and hands it to the one loader of that form. Light: leaf files import torch, this does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.live import Model
from gpuopt.core.registry import resolve
from gpuopt.core.spec import ModelRef
from gpuopt.loaders import named
from gpuopt.trust.policy import POLICY, Format, classify, printable

LOADERS: dict[str, str] = {
    Format.CHECKPOINT: "gpuopt.loaders.pickled:load",
    Format.PICKLE: "gpuopt.loaders.pickled:load",
    Format.TORCHSCRIPT: "gpuopt.loaders.torchscript:load",
    Format.EXPORTED: "gpuopt.loaders.exported:load",
    Format.SAFETENSORS: "gpuopt.loaders.weights:load",
    Format.SHARDED_SAFETENSORS: "gpuopt.loaders.weights:load",
    Format.ONNX: "gpuopt.loaders.onnx:load",
    Format.TRANSFORMERS: "gpuopt.loaders.huggingface:load",
    Format.BUNDLE: "gpuopt.loaders.bundle:load",
}
"""Form -> `module:function` of `(ref, path) -> Model`. A row is all a new format needs here; what opens its files goes into trust/gate.py."""

FACTORY_EXAMPLE = "gpuopt.models:resnet101, or my_model.py:build"
_EXTRAS = {Format.ONNX: "onnx", Format.TRANSFORMERS: "hf"}
_BUILT = {
    Format.AOTI: "name the bundle folder it lies in: gpuopt bench BUNDLE",
    Format.ENGINE: "name the bundle folder it lies in, or compile the source model: gpuopt compile MODEL --backend trt",
}


def load(ref: ModelRef, *, device: str = "cpu") -> Model:
    """The model a reference names, on the CPU and in eval mode. `device`: where one of our own factories may build it instead, as a whole;
    `meta` without its large tensors.

    Tried in this order: `hf:ID@REVISION`, a path that exists, `file.py:factory`, `package.module:factory`. Raises UsageError when nothing of that
    name exists, Untrusted, BadInput, GateFailed (NaN weights) and Unavailable as the form's loader says.
    """
    if ref.text.startswith("hf:"):
        _require_text(ref.text)
        return _call("gpuopt.loaders.huggingface:load_hub", ref, None, extra="hf")
    found = _form(ref.text)
    if found is None:
        from gpuopt.loaders import factory  # imports torch

        return factory.load(ref, device=device)
    return _call(LOADERS[found], ref, Path(ref.text), extra=_EXTRAS.get(found))


def fetched(ref: ModelRef) -> Any:
    """`hf:ID@REVISION` -> `huggingface.Fetched`: its files in the hub's cache, none opened. Raises UsageError, Unavailable without a network or transformers."""
    _require_text(ref.text)
    found = "gpuopt.loaders.huggingface:fetched"
    return resolve({found: found}, found, kind="loader", extra="hf")(ref)


def require(text: str) -> None:
    """Nothing where `text` may name a model; else raises the UsageError or BadInput that `load` would: at once, without opening a model or running anybody's code."""
    if text.startswith("hf:"):
        _require_text(text)
    elif _form(text) is None:
        named.require(text, FACTORY_EXAMPLE)


def _form(text: str) -> Format | None:
    """What lies at a path; None for a factory. Raises UsageError, BadInput."""
    _require_text(text)
    path = Path(text)
    if not _exists(path):
        if ":" in text:
            return None
        classify(path)  # says that there is nothing
    if path.suffix == ".py":
        raise UsageError(f"{printable(text)} is a Python file", fix=f"name the function that builds the model: {printable(text)}:factory")
    found = classify(path)
    if found in _BUILT:
        raise BadInput(f"{printable(path.name)} is {POLICY[found].is_a}: built code without its model", fix=_BUILT[found])
    return found


def _require_text(text: str) -> None:
    if not text or "\0" in text or "\n" in text or "\r" in text:
        raise UsageError(f"{printable(text)!r} names no model", fix="name a file, a folder, hf:ID@REVISION or package.module:factory")


def onnx_model(path: Path, name: str) -> Model:
    """The Model of an ONNX file that was just exported. Raises what `load` raises for ONNX."""
    model: Model = resolve({"onnx": "gpuopt.loaders.onnx:of_file"}, "onnx", kind="loader", extra="onnx")(path, name)
    return model


def _call(target: str, ref: ModelRef, path: Path | None, extra: str | None = None) -> Model:
    loader: Any = resolve({target: target}, target, kind="loader", extra=extra)
    model: Model = loader(ref) if path is None else loader(ref, path)
    return model


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, say
        return False
