"""Python frames above a dispatched op -> the line of the model's own code that led to it, `modeling_bert.py:123`.

The model's own code is a module's `forward` outside torch, and what that calls in its own file: a library's attention function is somebody's tool, the line that called it is
the model's. Walked at every op, so what a file is worth is remembered.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch

_NOT_THE_MODEL = tuple(
    os.path.realpath(folder) + os.sep
    for folder in (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)), sysconfig.get_path("stdlib"))
)
_PACKAGES = tuple({os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("purelib", "platlib")})
"""They may lie inside the standard library's folder, and belong to nobody's standard library."""


def outermost(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`call(*args, **kwargs)`, below a frame that `of_model` looks no further than: what is above it is the caller's code, not the model's."""
    return call(*args, **kwargs)


def of_model() -> str | None:
    """The innermost line of model code that is being run; without any `forward` of its own the innermost line that is nobody's library; None: there is none."""
    frame: FrameType | None = sys._getframe(1)
    inner: dict[str, int] = {}
    while frame is not None and frame.f_code is not _OUTERMOST:
        code = frame.f_code
        file = _known.get(code.co_filename)
        if file is None:
            file = _look_at(code.co_filename)
        if file:
            line = inner.setdefault(file, frame.f_lineno)
            if code.co_name == "forward" and code.co_varnames[:1] == ("self",):
                return f"{os.path.basename(file)}:{line}"
        frame = frame.f_back
    first = next(iter(inner.items()), None)
    return f"{os.path.basename(first[0])}:{first[1]}" if first else None


def joined(places: Iterable[str]) -> str | None:
    """`a.py:3`, `a.py:5`, `b.py:9` -> `a.py:3,5, b.py:9`; None for none."""
    files: dict[str, list[str]] = {}
    for place in places:
        file, _, line = place.rpartition(":")
        files.setdefault(file, []).append(line)
    return ", ".join(f"{file}:{','.join(rows)}" for file, rows in files.items()) or None


_OUTERMOST = outermost.__code__
_known: dict[str, str] = {}
"""File of a code object -> the same, or "" where it cannot be the model's. Not by the code object: those of two files are equal where names, lines and bytecode are."""


def _look_at(file: str) -> str:
    if file.startswith("<"):  # made at run time: no file to open, and a new name each time
        return ""
    real = os.path.realpath(file)
    owner = next((folder for folder in _NOT_THE_MODEL if real.startswith(folder)), None)
    is_models = owner is None or (owner == _NOT_THE_MODEL[2] and real.startswith(_PACKAGES))
    _known[file] = found = file if is_models else ""
    return found
