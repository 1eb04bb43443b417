"""`package.module:factory` or `file.py:factory` -> Model. The user's own code, which they named: it runs as it is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import GpuoptError, Unavailable, UsageError
from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef
from gpuopt.loaders import FACTORY_EXAMPLE, describe
from gpuopt.loaders.named import did_you_mean
from gpuopt.programs.hollow import hollow
from gpuopt.trust import consent
from gpuopt.trust.policy import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a factory gave."""

    module: nn.Module
    function: Any
    """The factory itself, which may carry `input_specs`."""
    file: Path | None
    """The Python file that was named, where one was."""
    notes: tuple[str, ...] = ()


def load(ref: ModelRef, *, on_meta: bool = False, device: str = "cpu") -> Model:
    """Import, call without arguments, and describe. Raises UsageError when the name or its result does not fit, Unavailable for a missing package.

    on_meta: without weights, on the meta device; a factory that reads what it made raises UsageError then. device: where a factory that offers `on_device` is asked to
    build; all others build on the CPU.
    """
    built = build(ref.text, on_meta=on_meta, device=device)
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(built.module.named_parameters(), ref.text)
    notes = list(built.notes)
    if ref.arch:
        notes.append(f"--arch {ref.arch} is not used: {ref.text} is a factory itself")
    return describe.of_module(
        built.module,
        name=ref.text.rpartition(":")[2],
        signature=describe.declared_signature(built.function),
        sha256=consent.sha256_of(built.file) if built.file else None,
        notes=notes,
    )


def build(text: str, *, on_meta: bool = False, device: str = "cpu") -> Built:
    """Call the factory that `text` names. Raises UsageError, Unavailable."""
    target, file = named(text, "factory", FACTORY_EXAMPLE)
    if isinstance(target, nn.Module):
        result: Any = target
    elif on_meta:
        result = hollow(lambda: _call(text, target))
    else:
        result = _call(text, target, device)
    if not isinstance(result, nn.Module):
        raise UsageError(f"{text} gave a {type(result).__name__}, not an nn.Module", fix="let the factory return the module itself")
    return Built(module=result, function=target, file=file)


def places(text: str) -> bool:
    """Whether `text`, which was loaded before, names a factory that builds on the device it is told, and the same weights every time."""
    where, _, attribute = text.rpartition(":")
    return bool(where and attribute) and not Path(text).exists() and _places(named(text, "factory", FACTORY_EXAMPLE, reuse=True)[0])


def _places(target: Any) -> bool:
    return hasattr(target, "on_device") and hasattr(target, "input_specs")  # models.factory.Factory


def named(text: str, what: str, example: str, *, reuse: bool = False) -> tuple[Any, Path | None]:
    """`package.module:name` or `file.py:name` -> the object it names, and the file where one was named. Raises UsageError, Unavailable.

    `reuse`: a file that was imported before is not run again: a metric beside its model's factory sees the same classes.
    """
    where, _, attribute = text.rpartition(":")
    if not where or not attribute:
        raise UsageError(f"{printable(text)!r} is not of the form package.module:{what}", fix=example)
    file = Path(where) if where.endswith(".py") else None
    module = (_imported(file) if reuse and file else None) or (_import_file(file) if file else _import_module(where))
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise UsageError(f"{where} has no {part!r}", fix=did_you_mean(part, _own(target)))
        target = getattr(target, part)
    return target, file


def _call(text: str, target: Any, device: str = "cpu") -> Any:
    if not callable(target):
        raise UsageError(f"{text} is a {type(target).__name__}, not a function", fix="name a function that returns the module")
    try:
        needed = [
            p.name
            for p in inspect.signature(target).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # a builtin without a signature
        needed = []
    if needed:
        raise UsageError(
            f"{text} wants the arguments {', '.join(needed)}",
            fix=f"write a function without arguments that returns {text.rpartition(':')[2]}(…)",
        )
    try:
        return target.on_device(device) if device != "cpu" and _places(target) else target()
    except (GpuoptError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise _missing(text, error) from error
    except Exception as error:  # the user's own code: whatever it raises is theirs to read, not a bug of ours
        raise UsageError(
            f"{text} raised {type(error).__name__}: {printable(str(error), limit=300)}", fix="run the factory by itself to see where"
        ) from error


def _import_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at the end: a file here never replaces a library
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise UsageError(f"there is no module {printable(missing)!r}", fix=did_you_mean(missing, _siblings(missing))) from error
        raise _missing(name, error) from error
    except (TypeError, ValueError) as error:  # a relative or empty name
        raise UsageError(f"{printable(name)!r} is no module name", fix="package.module:factory, or file.py:factory") from error
    except ImportError as error:
        raise _missing(name, error) from error
    except Exception as error:  # the user's own code, see _call
        raise UsageError(
            f"importing {name} raised {type(error).__name__}: {printable(str(error), limit=300)}",
            fix=f"python -c 'import {name}' shows where",
        ) from error


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        nearby = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise UsageError(f"there is no file {printable(str(file))}", fix=did_you_mean(file.name, nearby))
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file.absolute())
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} cannot be imported", fix="give it the suffix .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # what the file imports from beside itself
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    try:
        spec.loader.exec_module(module)
    except (GpuoptError, MemoryError):
        raise
    except ImportError as error:
        raise _missing(str(file), error) from error
    except Exception as error:  # the user's own code, see _call
        line = error.lineno if isinstance(error, SyntaxError) else None
        raise UsageError(
            f"{file}{f' line {line}' if line else ''} raised {type(error).__name__}: {printable(str(error), limit=300)}",
            fix=f"python {file} shows where",
        ) from error
    return module


def _module_name(file: Path) -> str:
    return "gpuopt_factory_" + describe.printable_name(file.stem).replace("-", "_").replace(".", "_")


def _imported(file: Path) -> ModuleType | None:
    found = sys.modules.get(_module_name(file))
    return found if found is not None and getattr(found, "__file__", None) == str(file.absolute()) else None


def _missing(what: str, error: ImportError) -> GpuoptError:
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package:
        return Unavailable(f"{what} needs the package {package!r}: {error}", fix=f"pip install {package}")
    return UsageError(f"importing {what} failed: {printable(str(error), limit=300)}", fix="import it by itself to see where")


def _own(target: object) -> list[str]:
    """Public names of a module or class that it defines itself and that can be called; all public ones where it has none: what it imports is no factory."""
    names = [n for n in dir(target) if not n.startswith("_")]
    home = getattr(target, "__name__", None)
    return [n for n in names if callable(found := getattr(target, n, None)) and getattr(found, "__module__", None) == home] or names


def _siblings(name: str) -> list[str]:
    """Modules beside the one that was not found."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return [p.stem for p in Path.cwd().glob("*.py")] + ["gpuopt.models"]
    try:
        package = importlib.import_module(parent)
    except ImportError:
        return []
    return [f"{parent}.{info.name}" for info in pkgutil.iter_modules(getattr(package, "__path__", []))]
