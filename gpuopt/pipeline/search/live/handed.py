"""A live module and its inputs -> files that a child can load as if somebody had saved them; or the reason why only this process can run it.

A child unpickles the module by the names of its classes. What a process did to them since (a method replaced, a hook registered) does not travel, so a
module that shows any of it stays here. What does travel is verified once more in the caller's process before it takes the module's place (`standin`).
"""

from __future__ import annotations

import fcntl
import importlib.machinery
import inspect
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from torch import nn

from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs, Model
from gpuopt.pipeline import isolate, packs
from gpuopt.trust import consent, gate

ROOM = 1.5
"""Free space wanted, as a multiple of the module's size."""
OLD_S = 3600.0
"""A folder of another search that is younger may not have its lock yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """What a child is told."""

    path: Path
    inputs: Path
    sha256: str
    """Of the module's file: the consent to load it, given by whoever called with that very module."""
    environment: dict[str, str]
    """Where a child finds the classes: this process's own `sys.path`."""


class CannotHand(Exception):
    """Why the module stays in this process, in a few words."""


@contextmanager
def handed(model: Model, inputs: Inputs) -> Iterator[Handed]:
    """The files, until the block ends. Their names come from their content: the same module asked for twice is the same search to --resume. Raises CannotHand."""
    named = _named(model.module, inputs)
    _require_plain(model.module)
    root = isolate.cache_root() / "live"
    root.mkdir(mode=0o700, exist_ok=True)
    _sweep(root)
    _require_room(root, model.module)
    folder = Path(tempfile.mkdtemp(prefix="new-", dir=root))
    lock = _locked(folder)
    try:
        path = folder / f"{model.name}.pt"
        try:
            torch.save(model.module, path)
        except Exception as error:  # whatever a class's own way of being saved raises: a reason to stay here, and no failure
            raise CannotHand(f"it cannot be saved: {_first_line(error)}") from error
        _require_importable(path)
        given = folder / packs.write_inputs(named, folder)
        sha256 = consent.sha256_of(path)
        final = root / f"{sha256[:16]}{consent.sha256_of(given)[:16]}"
        if _cleared(final):
            folder = folder.rename(final)  # else the same search runs in another process, and its files stay its own
        yield Handed(
            path=folder / path.name,
            inputs=folder / given.name,
            sha256=sha256,
            environment={"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _named(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs under the names of forward's parameters: files have no positions. Raises CannotHand."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError) as error:
        raise CannotHand("its forward has no readable signature") from error
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(inputs.args) > len(by_position):
        raise CannotHand("its forward takes *args, and files name their arrays")
    known = {p.name for p in parameters}
    stranger = next((name for name in inputs.kwargs if name not in known), None)
    if stranger is not None:
        raise CannotHand(f"its forward takes {stranger!r} by **kwargs alone")
    names = [*by_position[: len(inputs.args)], *inputs.kwargs]
    values = dict(zip(names, [*inputs.args, *inputs.kwargs.values()], strict=True))
    unusual = next((n for n, v in values.items() if v.layout is not torch.strided or v.is_quantized), None)
    if unusual is not None:
        raise CannotHand(f"its input {unusual!r} is no plain tensor")
    return Inputs(
        kwargs=values, specs=tuple(replace(spec, name=name) for spec, name in zip(inputs.specs, names, strict=True)), dims=inputs.dims
    )


def _require_plain(module: nn.Module) -> None:
    for name, part in module.named_modules():
        where = name or type(part).__name__
        if "forward" in vars(part):
            raise CannotHand(f"the forward of {where} was replaced on the object itself")
        if part._forward_hooks or part._forward_pre_hooks:
            raise CannotHand(f"{where} has forward hooks")
        forward = type(part).forward
        owner = next(cls for cls in type(part).__mro__ if "forward" in vars(cls))
        if owner is not nn.Module and getattr(forward, "__qualname__", "") != f"{owner.__qualname__}.forward":
            raise CannotHand(f"the forward of {type(part).__name__} was replaced on its class")


def _require_importable(path: Path) -> None:
    """Every global that the file names, from a module that another process finds under the same name and in the same file."""
    try:
        names = gate.inspect_checkpoint(path).names
    except BadInput as error:
        raise CannotHand(f"it cannot be read back: {error.message}") from error
    for name in sorted(names):
        where, what = _home(name)
        if not _is_found(where):
            reason = "which only this process has" if where == "__main__" else "which another process would not find"
            raise CannotHand(f"{what or name} lives in {where}, {reason}")


def _home(name: str) -> tuple[str, str]:
    """`package.module.Class.inner` -> the longest part that is a module, and the rest."""
    parts = name.replace(":", ".").replace(" ", ".").split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        if module in sys.modules:
            return module, ".".join(parts[count:])
    return parts[0], ".".join(parts[1:])


def _is_found(name: str) -> bool:
    if name in sys.builtin_module_names or name in ("builtins", "__builtin__"):
        return True
    module = sys.modules.get(name)
    if module is None or name == "__main__":
        return False
    parent, _, _ = name.rpartition(".")
    paths: Sequence[str] | None = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if parent and paths is None:
        return False
    found = importlib.machinery.PathFinder.find_spec(name, list(paths) if paths is not None else None)
    own = getattr(module, "__file__", None)
    if found is None:
        return own is None and not parent  # frozen into the interpreter
    return found.origin is None or own is None or Path(found.origin).resolve() == Path(own).resolve()


def _require_room(root: Path, module: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    free = shutil.disk_usage(root).free
    if size * ROOM > free:
        raise CannotHand(f"it takes {size / 2**30:.1f} GiB on the disk, which has {free / 2**30:.1f} GiB left")


def _sweep(root: Path) -> None:
    """Remove what killed processes left."""
    for folder in root.iterdir():
        if time.time() - folder.lstat().st_mtime > OLD_S:
            _cleared(folder)


def _cleared(folder: Path) -> bool:
    """Whether nothing is there (any more): a folder whose lock nobody holds was left by a process that was killed."""
    if not folder.exists():
        return True
    lock = open(folder / ".lock", "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    finally:
        lock.close()


def _locked(folder: Path) -> IO[bytes]:
    lock = open(folder / ".lock", "ab")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
