"""Custom ATen-level operators of ours, one file each: `torch.ops.gpuopt.<name>`, with a plain composite for a CPU and a shape rule for tracing.

A saved program names its operators and does not bring them: `register()` must have run before one is loaded.
"""

from __future__ import annotations

import importlib

OPS: dict[str, str] = {
    "attend_one": "gpuopt.programs.ops.attend_one",
    "conv_relu": "gpuopt.programs.ops.conv",
    "gated_matvec": "gpuopt.programs.ops.gated_matvec",
    "linear_gelu": "gpuopt.programs.ops.linear_gelu",
    "matvecs": "gpuopt.programs.ops.matvec",
}
"""Name of the operator -> the module that registers it on import."""


def register() -> None:
    """Make every operator of ours known to torch in this process. Harmless twice."""
    for target in OPS.values():
        importlib.import_module(target)
