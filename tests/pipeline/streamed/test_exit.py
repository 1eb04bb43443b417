"""A program that streams a module and ends without closing it ends as any other."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch, gpuopt
from torch import nn

model = nn.Sequential(*(nn.Sequential(nn.Linear(600, 600)) for _ in range(8))).eval()
big = gpuopt.stream(model, budget="60%", inputs=torch.zeros(1, 600), device="simulated:link=1e9,block=0.1ms")
print(big(torch.zeros(1, 600)).shape)
"""


def test_it_ends_with_zero_and_no_word_of_torchs() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "torch.Size([1, 600])\n"), done.stderr
