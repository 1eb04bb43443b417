"""The counter against hand counts of known architectures, built from configuration without weights; PyTorch's counter beside it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
try:
    import architectures
    import flops_table
finally:
    sys.path.pop(0)

TABLE = architectures.table()

PYTORCH_CANNOT_RUN = {
    "DeBERTa-v2": "reads values",
    "XLNet": "makes tensors on the CPU",
    "BART": "reads values",
    "DETR": "reads values",
    "Mixtral": "_grouped_mm knows bfloat16 alone",
    "Qwen2-MoE": "_grouped_mm knows bfloat16 alone",
    "DeepSeek-V3": "_grouped_mm knows bfloat16 alone",
}
PYTORCH_MISSES = {"FNet": "no formula for a Fourier transform"}


@pytest.mark.parametrize("name", TABLE)
def test_the_count_is_the_hand_count(name):
    """The promise is 1%; where the products are the architecture's own, nothing is left over at all."""
    architecture = TABLE[name]
    module = architecture.module()
    found = flops_table.ours(architecture, module)
    assert (found.unknown_ops, found.coverage) == ((), 1.0)
    assert found.method == "aten dispatch, fake tensors", found.notes
    assert found.flops == pytest.approx(architecture.hand, rel=1e-9)
    other = flops_table.theirs(architecture, module)
    if name in PYTORCH_CANNOT_RUN:
        assert other is None or other < architecture.hand  # another version may run it; what it has no formula for is still missing
    elif name in PYTORCH_MISSES:
        assert other < architecture.hand
    else:
        assert other == pytest.approx(architecture.hand, rel=1e-9)


@pytest.mark.parametrize("name", [n for n, a in TABLE.items() if a.published])
def test_hand_counts_are_what_others_published(name):
    """torchvision prints three digits behind the point of a giga-multiply-add."""
    architecture = TABLE[name]
    assert architecture.hand == pytest.approx(architecture.published, rel=1e-3)
    assert architecture.source


def test_the_table_holds_what_was_promised():
    assert len(TABLE) >= 24
    kinds = ("Mixtral", "LSTM tagger", "T5", "RegNetX-400MF", "BERT-large", "ResNet-101", "T5-large", "Llama-3.1-8B")
    assert all(name in TABLE for name in kinds)


def test_a_hand_count_is_no_walk_over_the_module():
    """It is ready before any module is built, and it depends on the sizes alone."""
    built = []
    init = nn.Module.__init__

    def spy(self, *args, **kwargs):
        built.append(type(self).__name__)
        init(self, *args, **kwargs)

    nn.Module.__init__ = spy
    try:
        architectures.table()
    finally:
        nn.Module.__init__ = init
    assert built == []


def test_the_page_shows_every_hand_count():
    rows = {line.split("|")[1].strip(): line for line in (ROOT / "docs" / "flops.md").read_text().splitlines() if line.startswith("| ")}
    for name, architecture in TABLE.items():
        assert f"| {architecture.hand / 1e9:.3f} |" in rows[name], "run `make flops`"
        assert re.search(r"\| [+-]0\.00% \| 100% \|", rows[name]), "run `make flops`"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mixture_of_experts_is_counted_without_weights_in_any_dtype(dtype):
    architecture = TABLE["Mixtral"]
    found = flops_table.ours(architecture, architecture.module().to(dtype))
    assert found.flops == architecture.hand
    assert found.method == "aten dispatch, fake tensors"


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_experts_cost_the_same_however_they_are_run(experts):
    """The eager loop reads which expert each token goes to: one real run, and the same count."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48, vocab_size=31)
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = transformers.MixtralConfig(**sizes, **special, num_local_experts=4, num_experts_per_tok=2, experts_implementation=experts)
    model = transformers.MixtralForCausalLM(config).eval()
    found = flops_table.count(model, flops_table.Inputs(args=(torch.zeros(2, 5, dtype=torch.int64),), kwargs={}))
    rows = 10
    attention = 2 * rows * (2 * 32 * 32 + 2 * 32 * 16) + 4 * 2 * 5 * 5 * 32
    assert found.flops == attention + 2 * rows * 32 * 4 + 2 * rows * 2 * 3 * 32 * 48 + 2 * rows * 32 * 31
    assert found.unknown_ops == ()
    assert ("real run" in found.method) == (experts == "eager")


def theirs(function):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        function()
    return counter.get_total_flops()


q = torch.randn(1, 2, 8, 4)
SILENT_IN_PYTORCH = {
    "nn.LSTM": lambda: nn.LSTM(4, 8).eval()(torch.randn(5, 2, 4)),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()(torch.randn(2, 5, 16)),
    "a Fourier transform": lambda: torch.fft.rfft(torch.randn(8)),
    "a matrix by a vector": lambda: torch.mv(torch.randn(3, 4), torch.randn(4)),
    "a dot product": lambda: torch.dot(torch.randn(4), torch.randn(4)),
    "distances": lambda: torch.cdist(torch.randn(3, 4), torch.randn(5, 4)),
    "bilinear": lambda: nn.functional.bilinear(torch.randn(2, 3), torch.randn(2, 4), torch.randn(5, 3, 4)),
    "attention on a CPU": lambda: nn.functional.scaled_dot_product_attention(q, q, q),
}


@pytest.mark.parametrize("name", SILENT_IN_PYTORCH)
def test_where_pytorchs_counter_is_silent_ours_is_not(name):
    """Why a count of our own: a zero there. When a PyTorch learns one of these, the page's table loses a line."""
    function = SILENT_IN_PYTORCH[name]
    found = flops_table.count(function, flops_table.Inputs(args=(), kwargs={}))
    assert found.flops > 0
    assert theirs(function) in (0, found.flops)
