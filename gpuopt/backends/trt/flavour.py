"""What is installed -> the TensorRT module to build with: plain TensorRT, or TensorRT-RTX, whose libraries may lie in a folder of their own."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.trust import packages
from gpuopt.trust.policy import printable

MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Flavour -> its module names. Plain TensorRT comes first: it runs on every GPU it builds for, data-centre ones included."""

RTX_LIBRARIES = ("libcudart.so.13", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
"""What `tensorrt_rtx_bindings` wants to find already loaded, in this order; the wheel of the bindings has none of them."""

LIBRARIES_VARIABLE = "GPUOPT_TRT_RTX_LIBS"

OLDEST = {"tensorrt": (10, 0), "tensorrt_rtx": (1, 7)}
"""Plain TensorRT before 10 has neither int64 nor strongly typed networks that cover transformers; RTX before 1.7 was never tried."""

EXTRA = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One importable TensorRT."""

    name: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    module: Any

    @property
    def is_rtx(self) -> bool:
        """RTX compiles ahead of time for named capabilities without a GPU, has no timing cache, and runs on RTX cards only."""
        return self.name == "tensorrt_rtx"

    @property
    def title(self) -> str:
        """For people: `TensorRT-RTX 1.7.1.116`."""
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities an engine can be built for by name; empty for plain TensorRT, which builds for the GPU it sees."""
        if not self.is_rtx:
            return ()
        names = [name.removeprefix("SM") for name in self.module.ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(f"{name[:-1]}.{name[-1]}" for name in names)

    def capability(self, text: str) -> Any:
        """`8.9` -> the module's ComputeCapability. Raises UsageError for one this flavour does not know."""
        if text not in self.capabilities:
            raise UsageError(
                f"{self.title} does not build for compute capability {text}",
                fix=f"one of {', '.join(self.capabilities)}" if self.is_rtx else "plain TensorRT builds for the GPU of this machine",
            )
        return self.module.ComputeCapability.__members__["SM" + text.replace(".", "")]


_FOUND: dict[str, Flavour] = {}


def find(name: str | None = None) -> Flavour:
    """The flavour asked for, else the first that imports. Raises Unavailable when there is none, or when one is installed and broken; UsageError for an unknown name."""
    if name is not None and name not in MODULES:
        raise UsageError(f"trt has no flavour {name!r}", fix="flavour=tensorrt or flavour=tensorrt_rtx")
    for flavour in [name] if name else list(MODULES):
        if flavour in _FOUND:
            return _FOUND[flavour]
        for module_name in MODULES[flavour]:
            module = _import(module_name)
            if module is not None:
                _FOUND[flavour] = _checked(flavour, module)
                return _FOUND[flavour]
    wanted = " and ".join(MODULES[name]) if name else "TensorRT"
    raise Unavailable(
        f"{wanted} is not installed",
        fix="pip install 'gpuopt[trt]'; without a GPU, 'gpuopt[trt-rtx]' and its libraries build engines for RTX cards",
    )


def _import(name: str) -> Any:
    """The module, or None where it is not installed. A module that is there and does not load is said so, never passed over for another."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        if name == "tensorrt_rtx_bindings":
            _preload()
        return importlib.import_module(name)
    except Exception as error:  # besides ImportError and OSError, placeholders on PyPI raise RuntimeError to say where the real package is
        raise Unavailable(
            f"{name} is installed but does not load: {printable(' '.join(str(error).split()), limit=300) or type(error).__name__}",
            fix=f"its libraries must be in ${LIBRARIES_VARIABLE} or {Path(sys.prefix).name}/trt-rtx"
            if "rtx" in name
            else f"pip install --force-reinstall {name}",
        ) from error


def libraries_folder() -> Path | None:
    """Where the RTX libraries are: $GPUOPT_TRT_RTX_LIBS, else `trt-rtx` beside this environment's packages; None where neither has them."""
    named = os.environ.get(LIBRARIES_VARIABLE)
    for folder in [Path(named)] if named else [Path(sys.prefix, "trt-rtx")]:
        if all((folder / library).is_file() for library in RTX_LIBRARIES):
            return folder
    return None


def _preload() -> None:
    """Load the RTX libraries for everybody to see (RTLD_GLOBAL): the bindings link against their names and carry no search path."""
    folder = libraries_folder()
    if folder is None:
        return  # a system-wide installation may have them; the import says so if it does not
    for library in RTX_LIBRARIES:
        ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)


def _checked(flavour: str, module: Any) -> Flavour:
    version = printable(str(getattr(module, "__version__", "")), limit=40)
    oldest = OLDEST[flavour]
    title = "TensorRT-RTX" if flavour == "tensorrt_rtx" else "TensorRT"
    wanted = f"gpuopt needs {title} {oldest[0]}.{oldest[1]} or later"
    missing = [name for name in ("Builder", "OnnxParser") if not hasattr(module, name)]
    if missing:
        raise Unavailable(
            f"the package {module.__name__} ({version or 'no version'}) is there but is not TensorRT (it has no {missing[0]}); {wanted}",
            fix=f"pip uninstall {module.__name__}, then pip install 'gpuopt[{EXTRA[flavour]}]'",
        )
    if packages.release(version) < oldest:
        raise Unavailable(
            f"{title} {version or 'of no version'} is too old: {wanted}", fix=f"pip install --upgrade 'gpuopt[{EXTRA[flavour]}]'"
        )
    return Flavour(name=flavour, version=version, module=module)
