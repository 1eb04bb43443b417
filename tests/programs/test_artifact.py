"""What is saved here opens without the model's package, and checks its inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import artifact

CHILD = """
import sys, torch
from pathlib import Path
from gpuopt.programs import artifact
folder = Path(sys.argv[1])
module, accepts = artifact.load(folder, {"exported": "model.pt2", "accepts": "accepts.json"}, {"signed_by_us": True})
given = torch.load(folder / "given.pt", weights_only=True)
out = module(input_ids=given["ids"], attention_mask=given["mask"])
torch.testing.assert_close(out["last_hidden_state"], given["wanted"])
print(type(out).__name__, sorted(out), accepts, "transformers" in sys.modules)
"""


def test_a_transformers_model_opens_in_a_process_that_never_imports_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )
    model = transformers.BertModel(config).eval()
    ids, mask = torch.randint(0, 64, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
    specs = (TensorSpec.parse("input_ids:int64[N,8]"), TensorSpec.parse("attention_mask:int64[N,8]"))
    inputs = Inputs(kwargs={"input_ids": ids, "attention_mask": mask}, specs=specs, dims={"N": 2})
    assert artifact.save(model, inputs, {"N": (1, 4)}, tmp_path) == {"exported": "model.pt2", "accepts": "accepts.json"}
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.save({"ids": ids, "mask": mask, "wanted": wanted}, tmp_path / "given.pt")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == ("dict ['last_hidden_state', 'pooler_output'] (input_ids=int64[N,8], attention_mask=int64[N,8]) False")
