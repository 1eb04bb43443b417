"""What is exported here opens without the model's package, keeps its input names, and holds none of the user's data."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.trust import portable

Point = namedtuple("Point", "a b")


@dataclass
class Box:
    first: Any
    second: Any = None


def test_outputs_become_plain_containers_without_their_nones() -> None:
    t = torch.zeros(1)
    found = portable.plain({"box": Box(t), "point": Point(t, 3), "list": [t, None], "none": None})
    assert set(found) == {"box", "point", "list"}
    assert type(found["box"]) is dict and set(found["box"]) == {"first"}
    assert type(found["point"]) is tuple and found["point"][1] == 3
    assert found["list"][1] is None


def test_an_output_nobody_can_read_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="object"):
        portable.plain({"x": object()})


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None, *, scale: torch.Tensor | None = None) -> Any:
        y = self.inner(pixels)
        return {"y": y if scale is None else y * scale, "mask": mask}


def named(batch: int = 3) -> Inputs:
    specs = tuple(TensorSpec.parse(f"{name}:float32[N,4]") for name in ("pixels", "scale"))
    return Inputs(args=(torch.randn(batch, 4),), kwargs={"scale": torch.randn(batch, 4)}, specs=specs, dims={"N": batch})


def test_names_positions_and_keywords_are_kept() -> None:
    program = portable.export(Named().eval(), named())
    assert program.graph_signature.user_inputs == ("pixels", "scale")
    assert set(program.module()(*named().args, **named().kwargs)) == {"y"}


def test_unnamed_and_repeated_inputs_get_names() -> None:
    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    specs = (TensorSpec.parse("float32[2]"), TensorSpec(name="class", dtype="float32", shape=(2,)))
    program = portable.export(Two(), Inputs(args=(torch.ones(2), torch.ones(2)), specs=specs))
    assert program.graph_signature.user_inputs == ("input_0", "input_1")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_range_from_one_holds_whatever_batch_it_was_traced_with(batch: int) -> None:
    module = Named().eval()
    program = portable.export(module, named(batch), {"N": (1, 16)})
    for n in (1, 2, 16):
        given = named(n)
        with torch.no_grad():
            assert torch.allclose(program.module()(*given.args, **given.kwargs)["y"], module(*given.args, **given.kwargs)["y"], atol=1e-6)


def test_widening_keeps_the_memory_order() -> None:
    x = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    wide = portable.widened(Inputs(args=(x,), specs=(TensorSpec.parse("x:float32[N,3,4,5]"),)), {"N": (1, 8)}).args[0]
    assert wide.shape == (2, 3, 4, 5) and wide.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(wide[0], x[0]) and torch.equal(wide[1], x[0])


def test_an_exported_program_can_be_exported_again() -> None:
    module = Named().eval()
    first = torch.export.export(module, named().args, dict(named().kwargs))
    again = portable.export(first.module(), named())
    given = named()
    with torch.no_grad():
        assert torch.allclose(again.module()(*given.args, **given.kwargs)["y"], module(*given.args, **given.kwargs)["y"], atol=1e-6)


def test_zeros_are_accepted_by_what_they_were_made_for() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    specs = (TensorSpec.parse("x:float32[N,3,4,5]"), TensorSpec.parse("ids:int64[N,7]"))
    accepts = Accepts.of(Inputs(args=(x,), kwargs={"ids": ids}, specs=specs), {"N": (1, 6)})
    args, kwargs = portable.zeros(accepts)
    accepts.check(args, kwargs)
    assert args[0].shape[0] == 6 and not args[0].any()


CHILD = """
import sys, torch
from pathlib import Path
from gpuopt.trust import portable
folder = Path(sys.argv[1])
module, accepts = portable.load(folder, {"exported": "model.pt2", "accepts": "accepts.json"}, {"signed_by_us": True})
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
    assert portable.save(model, inputs, {"N": (1, 4)}, tmp_path) == {"exported": "model.pt2", "accepts": "accepts.json"}
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.save({"ids": ids, "mask": mask, "wanted": wanted}, tmp_path / "given.pt")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == ("dict ['last_hidden_state', 'pooler_output'] (input_ids=int64[N,8], attention_mask=int64[N,8]) False")
