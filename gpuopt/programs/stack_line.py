"""A Python stack trace as text -> the line of the model's own code in it, `modeling_bert.py:123`. Pure.

Of the innermost `forward`, or of what that calls in its own file: a library's attention function below is somebody's tool, the line that called it is the model's. The same rule
as that of live frames, `profiling/lines.py`.
"""

from __future__ import annotations

import re

_FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\S+))?')
_NOT_THE_MODELS = re.compile(r"[/\\](?:site|dist)-packages[/\\]torch[/\\]|[/\\]gpuopt[/\\]programs[/\\]|^<")
"""Frames of PyTorch, of the wrapper that gpuopt exports through, and of code that was made at run time."""
_FOLDERS = re.compile(r"[/\\]")


def line_of(stack: str) -> str:
    """Frames are `File "model.py", line 12, in forward`, outermost first; "" where none is the model's."""
    frames = [f for f in _FRAME.findall(stack) if not _NOT_THE_MODELS.search(f[0])]
    if not frames:
        return ""
    file = next((path for path, _, function in reversed(frames) if function == "forward"), frames[-1][0])
    number = next(number for path, number, _ in reversed(frames) if path == file)
    return f"{_FOLDERS.split(file)[-1]}:{number}"
