"""Model form x backend -> the way there, or the reason why there is none."""

from __future__ import annotations

from typing import Any

from gpuopt.core.errors import Unavailable, Unsupported
from gpuopt.core.spec import Precision

TORCH_FORMS = frozenset({"module", "exported"})
"""Forms that the ONNX exporter takes."""


def find(form: str, backend: Any, name: str) -> str:
    """`direct` or `via ONNX`. Raises Unsupported when a backend cannot take this form."""
    if form in backend.FORMS:
        return "direct"
    if form in TORCH_FORMS and "onnx" in backend.FORMS:
        return "via ONNX"
    takes = ", ".join(sorted(backend.FORMS | (TORCH_FORMS if "onnx" in backend.FORMS else frozenset())))
    able = "; --backend ort and --backend trt take it" if form == "onnx" else ""
    raise Unsupported(f"{name} cannot take a model of form {form!r}: it takes {takes}", fix=f"gpuopt backends MODEL shows what can{able}")


def check(form: str, backend: Any, name: str, precision: Precision, device: str, *, build_only: bool = False) -> str:
    """The way, after asking the backend whether it can run here. Raises Unavailable or Unsupported with the reason."""
    way = find(form, backend, name)
    reached = form if way == "direct" else "onnx"
    reason = backend.supports(reached, precision, device)
    if reason:
        raise Unsupported(f"{name} at {precision}: {reason}", fix="another --precision or --backend; gpuopt backends MODEL shows what can")
    reason = backend.available(device)
    if reason and not build_only:
        raise Unavailable(f"{name} cannot run here: {reason}", fix="gpuopt backends shows what can, and what to install")
    return way
