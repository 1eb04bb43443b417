"""A Python frame as torch.profiler names it -> the line a reader knows: `src/infer.py(12): load` -> `src/infer.py:12 in load`; "" for the framework's own and the library's.

The number is the line the function begins at: what is inside it was not recorded.
"""

from __future__ import annotations

import re
import sys

_FRAME = re.compile(r"(?P<file>[^()]+)\((?P<line>\d+)\): (?P<function>.+)")
_INSTALLED = re.compile(r".*[/\\](?:site|dist)-packages[/\\]|.*[/\\]lib[/\\]python3\.\d+[/\\]")
_GENERATED = re.compile(r"torchinductor_|^<|[/\\]torch[/\\]_inductor")
_OWN = frozenset({"torch", "triton", "torchvision", "torchgen", "functorch", "gpuopt", "numpy", "_pytest", "pluggy"})
"""Packages that are never what somebody can change: the profiler cuts the folder of sys.path in front of them."""


def line(name: str) -> str:
    """`transformers/models/bert/modeling_bert.py:210 in forward`; "" where it is no frame to name."""
    match = _FRAME.fullmatch(name)
    if match is None:
        return ""
    file = match["file"]
    installed = _INSTALLED.match(file)
    path = file[installed.end() :] if installed else file
    top = re.split(r"[/\\]", path.lstrip("/\\"), maxsplit=1)[0].removesuffix(".py")
    if top in _OWN or _GENERATED.search(file):
        return ""
    is_standard = top in sys.stdlib_module_names and (installed is not None or not file.startswith("/"))
    return "" if is_standard else f"{path}:{match['line']} in {match['function'][:60]}"
