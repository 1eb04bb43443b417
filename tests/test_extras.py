"""A missing extra costs only its backend: everything else is imported and works without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
for name in {missing!r}:
    sys.modules[name] = None  # importing it fails as if it were not installed
import torch
import gpuopt
from gpuopt.core.errors import Unavailable
model, x = torch.nn.Linear(4, 4).eval(), torch.randn(2, 4)
half = gpuopt.convert(model, x, precision="bf16")
assert half.weight.dtype is torch.bfloat16
from gpuopt.pipeline.session import Session
assert {{cell.backend for cell in Session().matrix("cpu").cells}} >= {{"eager", "inductor", "ort", "trt"}}
try:
    gpuopt.bench(model, x, backends=("ort",))
except Unavailable as error:
    assert "gpuopt[" in (error.fix or ""), error.fix
    print("told")
"""


@pytest.mark.parametrize("missing", [("onnx", "onnxscript"), ("onnxruntime",), ("transformers",)])
def test_a_missing_extra_costs_only_its_own_backend(missing: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(missing=missing)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("told" in done.stdout) == (missing != ("transformers",))
