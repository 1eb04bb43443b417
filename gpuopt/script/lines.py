"""The stack -> the source line that matters, as `file.py:12`. Paths are shown from the folder the program was started in, or from the package on: never the machine's."""

from __future__ import annotations

import builtins
import linecache
import os
import re
import sys
import sysconfig
from functools import cache
from itertools import islice
from types import CodeType, FrameType

import torch

_START = os.getcwd()
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STANDARD = tuple(os.path.abspath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
_CALLEE = re.compile(r"([A-Za-z_][\w.]*)\(")
_PACKAGES = ("site-packages" + os.sep, "dist-packages" + os.sep)


@cache
def kind(filename: str) -> str:
    """`inside` (this package, torch, the interpreter), `library` (installed) or `user`."""
    if filename.startswith(("<frozen", _HERE, _TORCH)):
        return "inside"
    if any(part in filename for part in _PACKAGES):
        return "library"
    return "inside" if filename.startswith(_STANDARD) else "user"


def caller(frame: FrameType | None, *, nearest: bool = False) -> tuple[str, FrameType | None]:
    """(line, its frame) of whoever is responsible for what `frame` does: the innermost line of the user's own; "" where there is none.

    nearest: a library's line counts too, for what happens inside a model that came from one.
    """
    fallback: FrameType | None = None
    while frame is not None:
        found = kind(frame.f_code.co_filename)
        if found == "user" or (nearest and found == "library"):
            return line(frame.f_code, frame.f_lineno), frame
        if found == "library" and fallback is None:
            fallback = frame
        frame = frame.f_back
    return (line(fallback.f_code, fallback.f_lineno), fallback) if fallback is not None else ("", None)


@cache
def line(code: CodeType, number: int) -> str:
    """`infer.py:12`."""
    return f"{shown(code.co_filename)}:{number}"


def shown(filename: str) -> str:
    """A path without the machine."""
    for part in _PACKAGES:
        if part in filename:
            return filename.rpartition(part)[2]
    path = os.path.abspath(filename) if not filename.startswith("<") else filename
    if path.startswith(_START + os.sep):
        return path[len(_START) + 1 :]
    return os.path.basename(path)


def name_of(start: FrameType | None, found: FrameType | None) -> str:
    """What the source at `found` calls the thing it calls: `model`, `self.model`; "" where a library lies between, or it is no plain name.

    Read from the source text: a frame's f_locals would keep every variable of it alive until the frame ends.
    """
    frame = start
    while frame is not None and frame is not found:
        if kind(frame.f_code.co_filename) != "inside":
            return ""
        frame = frame.f_back
    if frame is None:
        return ""
    position = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), None)
    if position is None or position[0] is None or position[2] is None:
        return ""
    text = linecache.getline(frame.f_code.co_filename, position[0], frame.f_globals).encode()[position[2] :].decode(errors="replace")
    match = _CALLEE.match(text)
    if match is None or hasattr(builtins, match[1].partition(".")[0]):  # map(model, batches): the model is called from C
        return ""
    return match[1]


def here(depth: int = 1) -> FrameType | None:
    """The caller's frame."""
    return sys._getframe(depth + 1)
