"""The most host memory that `gpuopt stream` holds for a transformers folder: the weights once, whatever it does with them.

Each measurement is a process of its own that runs the child's session; what Python, torch and transformers take is measured on the same folder with next to no weights. The device on paper
lies in host memory, so its bytes (residents and slots of the plan's ledger) come on top; on a GPU they do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOM = 24 * 2**20
"""Beyond 1.1 times the weights: outputs, stacks and caches of threads, pieces that are read, memory of kernels."""
LAYERS = 12

SESSION = """
import json, os, sys
from gpuopt.core.spec import Candidate, DimSpec, InputSpec, ModelRef
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.streamed.session import StreamSession

folder, actions = sys.argv[1], sys.argv[2].split(",")
spec = StreamSpec(budget_share=0.5)
session = StreamSession()
asked = InputSpec(dims=(DimSpec(name="N", values=(1,)), DimSpec(name="S", values=(4,))))
candidate = Candidate(model=ModelRef(text=folder), inputs=asked, dims={"N": 1, "S": 4}, device="simulated:link=1e9,block=1ms")
opened = session.load(candidate, StreamRequest(action=actions[0], specs=(spec,)))
plan = session.plan(spec).plan
peaks = {}
for action in actions:
    if action == "run":
        session.bind(spec)
        session.warm()
        session.block(3)
    elif action == "bench":  # several budgets, one after the other, in one child
        for share in (0.5, 0.7, 0.9):
            session.bind(StreamSpec(budget_share=share))
            session.warm()
            session.block(3)
    elif action == "resident":
        session.resident(spec)
        session.warm()
    elif action == "verify":
        found = session.verify(spec, 6)
        assert all(check.passed for check in found.checks if check.passed is not None), found.checks
    elif action == "pack":
        session.pack(spec, sys.argv[3])
    peaks[action] = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
ledger = plan.ledger
print(json.dumps({"peaks": peaks, "weights": opened.weight_bytes, "device": ledger.fixed + ledger.residents + ledger.slots}), flush=True)
session.close()
os._exit(0)  # as the child ends
"""


def saved(folder: Path, hidden: int, layers: int = LAYERS) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20MB")  # type: ignore[operator]
    return folder


def measured(folder: Path, actions: str, *more: str) -> dict[str, Any]:
    words = [sys.executable, "-c", SESSION, str(folder), actions, *more]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def held(folder: Path, tiny: Path, actions: str, packed: Path) -> None:
    """On paper the device is host memory as well: the ledger's bytes, and all weights where everything, or nearly, is resident."""
    found, base = measured(folder, actions, str(packed / "one")), measured(tiny, actions, str(packed / "two"))
    weights = found["weights"]
    for action, peak in found["peaks"].items():
        on_paper = {"plan": 0, "pack": 0, "resident": weights, "bench": weights}.get(action, found["device"])
        limit = {"plan": 0.0, "pack": 0.4}.get(action, 1.1) * weights + on_paper + ROOM
        took = peak - base["peaks"][action]
        assert took <= limit, f"{action}: {took / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights, at most {limit / 1e6:.0f}"


def test_the_host_holds_the_weights_once(tmp_path: Path) -> None:
    held(saved(tmp_path / "model", 400), saved(tmp_path / "tiny", 16), "plan,run,verify", tmp_path)  # 61 MB


@pytest.mark.slow
def test_the_host_holds_600_mb_once(tmp_path: Path) -> None:
    folder, tiny = saved(tmp_path / "model", 1024, 18), saved(tmp_path / "tiny", 16)
    for actions in ("plan", "run", "bench", "resident", "verify", "pack"):
        held(folder, tiny, actions, tmp_path)
