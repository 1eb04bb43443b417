"""Name of a package -> its module, once it is what its name says and as new as gpuopt needs."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from importlib import metadata
from operator import attrgetter
from typing import Any

from gpuopt.core.errors import Unavailable
from gpuopt.trust.policy import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What gpuopt wants of a package that is an extra."""

    oldest: tuple[int, int]
    """As in the extras of pyproject.toml."""
    has: tuple[str, ...]
    """What the real one has, and an emptied, half-removed or squatted one has not."""
    wheels: tuple[str, ...]
    """Distributions that bring the module; each overwrites the files of the others."""
    install: str
    """What to type where it is missing or too old."""
    repair: str
    """What to type where something else, or half of it, is in its place."""


NEEDS: dict[str, Need] = {
    "onnx": Need(
        oldest=(1, 21),  # the first with the fixes of CVE-2026-27489 and CVE-2026-34445
        has=("ModelProto", "TensorProto", "defs.onnx_opset_version"),
        wheels=("onnx",),
        install="pip install --upgrade 'gpuopt[onnx]'",
        repair="pip uninstall onnx, then pip install 'gpuopt[onnx]'",
    ),
    "onnxruntime": Need(
        oldest=(1, 24),
        has=("InferenceSession", "SessionOptions", "get_available_providers", "capi.onnxruntime_pybind11_state.Fail"),
        wheels=("onnxruntime", "onnxruntime-gpu"),
        install="pip install --upgrade 'gpuopt[onnx]', or 'gpuopt[ort-gpu]' for NVIDIA GPUs, never both",
        repair="pip uninstall onnxruntime onnxruntime-gpu, then pip install 'gpuopt[onnx]' or 'gpuopt[ort-gpu]', never both",
    ),
}


def load(name: str) -> Any:
    """The module of a package in NEEDS. Raises Unavailable where it is missing, broken, a placeholder or too old, with the version found and the one wanted."""
    need = NEEDS[name]
    if name == "onnxruntime":
        # Its wheels write a device id into the user's cache and send events unless told otherwise before they are imported.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise _broken(name, need, error) from error
        raise Unavailable(f"the package {name} is not installed", fix=need.install) from error
    except (
        Exception
    ) as error:  # a foreign package may raise anything while it is imported: TypeError of protobuf, AttributeError of numpy's ABI
        raise _broken(name, need, error) from error
    problem = why_not(module)
    if problem is not None:
        raise Unavailable(problem[0], fix=problem[1])
    return module


def why_not(module: Any) -> tuple[str, str] | None:
    """None for a module that is what its name says and new enough, else what is wrong with it, and what to do."""
    name: str = module.__name__
    need = NEEDS[name]
    found = _version(module)
    wanted = f"gpuopt needs {name} {need.oldest[0]}.{need.oldest[1]} or later"
    for attribute in need.has:
        try:
            attrgetter(attribute)(module)
        except AttributeError:
            return (
                f"the package {name} ({found or 'no version'}) is there but empty or another one: it has no {attribute}; {wanted}",
                need.repair,
            )
    if release(found) < need.oldest:
        return f"{name} {found or 'of no version'} is too old: {wanted}", need.install
    return None


def release(version: str) -> tuple[int, ...]:
    """`1.24.0rc1` -> (1, 24): what versions are compared by. Empty for a text that is none."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return () if match is None else (int(match[1]), int(match[2] or 0))


def installed(name: str) -> str:
    """`onnxruntime 1.31.1`: the distributions that bring this module here, for a message."""
    return " and ".join(f"{wheel} {version}" for wheel in NEEDS[name].wheels if (version := _of_wheel(wheel))) or name


def _version(module: Any) -> str:
    own = getattr(module, "__version__", None)
    if isinstance(own, str):
        return printable(own, limit=40)
    return next((version for wheel in NEEDS[module.__name__].wheels if (version := _of_wheel(wheel))), "")


def _of_wheel(wheel: str) -> str:
    try:
        return metadata.version(wheel)
    except metadata.PackageNotFoundError:
        return ""


def _broken(name: str, need: Need, error: Exception) -> Unavailable:
    said = printable(" ".join(str(error).split()), limit=300)
    return Unavailable(f"{installed(name)} is there and does not import: {type(error).__name__}: {said}", fix=need.repair)


__all__ = ["NEEDS", "Need", "installed", "load", "release", "why_not"]
