"""Masked attention in FlexAttention, as Inductor compiles it for a CPU, against the plain operator in fp64; what it leaves alone, and what a bundle keeps."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpuopt.backends import inductor
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import flex

LENGTH = 150
"""Two blocks of queries and keys, the second not full."""
LAYERS = 2


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(LENGTH)
    return at[:, None], at


def window() -> torch.Tensor:
    i, j = positions()
    return ((i - j).abs() < 9)[None, None]


MASKS: dict[str, Any] = {
    "window": window,
    "causal": lambda: torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril(),
    "padding": lambda: (torch.arange(LENGTH) < torch.tensor([[20], [149]]))[:, None, None, :],
    "rows that see nothing": lambda: window() & (torch.arange(LENGTH)[:, None] > 3),
    "bias of a head": lambda: torch.randn(1, 4, LENGTH, LENGTH),
    "bias of a sample": lambda: torch.randn(2, 1, LENGTH, LENGTH),
    "bias that shuts keys": lambda: torch.zeros(2, 1, 1, LENGTH).index_fill_(-1, torch.arange(40), float("-inf")),
}


class Attending(torch.nn.Module):
    """Two layers over one mask, each of which takes a slice of it, as transformers' do."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        found = []
        for mask in masks:
            out = q
            for _ in range(LAYERS):
                out = F.scaled_dot_product_attention(out, k, v, attn_mask=mask[:, :, :, : k.shape[-2]], scale=0.2)
            found.append(out)
        return tuple(found)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MASKS)
def test_what_is_asked_of_a_score_is_what_plain_attention_does(name: str) -> None:
    """The operator run as products and a softmax, which reads the functions and no table."""
    q, k, v = (torch.randn(2, 4, LENGTH, 16, dtype=torch.float64) for _ in range(3))
    mask = MASKS[name]()
    mask = mask if mask.dtype == torch.bool else mask.double()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    found = flex.attend(q, k, v, mask, flex.blocks(mask, q, k), scale=0.3)
    assert not found.isnan().any() and (found - wanted).norm() / wanted.norm() < 1e-7


def compiled_as_plain(*names: str) -> None:
    q, k, v = (torch.randn(2, 4, LENGTH, 16) for _ in range(3))
    masks = tuple(MASKS[name]() for name in names)
    seen = flex.Flex()
    with torch.no_grad():
        found = torch.compile(Attending(), fullgraph=True, options=seen.settings)(q, k, v, masks)
    wide = tuple(mask if mask.dtype == torch.bool else mask.double() for mask in masks)
    wanted = Attending()(q.double(), k.double(), v.double(), wide)
    assert seen.num_changed == LAYERS * len(masks) and not seen.left
    for name, ours, exact in zip(names, found, wanted, strict=True):
        assert not ours.isnan().any(), name
        assert (ours - exact).norm() / exact.norm() < 2e-6, name


def test_a_compiled_kernel_skips_blocks_and_gives_what_plain_attention_gives() -> None:
    compiled_as_plain("rows that see nothing")


@pytest.mark.slow
def test_every_kind_of_mask_compiles_to_what_plain_attention_gives() -> None:
    compiled_as_plain(*MASKS)


@pytest.mark.parametrize("name", [name for name, make in MASKS.items() if make().dtype == torch.bool])
def test_tables_name_each_block_that_is_read_and_no_other(name: str) -> None:
    mask = MASKS[name]()
    query = torch.zeros(2, 4, LENGTH, 16)
    tables = flex.blocks(mask, query, query)
    assert tables is not None
    partly, which, wholly, full = tables
    dense = F.pad(mask.expand(-1, -1, LENGTH, LENGTH), (0, 256 - LENGTH) * 2)
    for b in range(mask.shape[0]):
        for row in range(2):
            tested = set(which[b, 0, row, : partly[b, 0, row]].tolist())
            untested = set(full[b, 0, row, : wholly[b, 0, row]].tolist())
            for column in range(2):
                block = dense[b, 0, row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
                assert (column in untested) == bool(block.all())
                assert (column in tested) == (bool(block.any()) and not block.all())


def test_layers_that_slice_one_mask_share_its_tables() -> None:
    graph = traced(Attending(), torch.zeros(1, 2, 32, 16), window()[..., :32, :32])
    flex.Flex()(graph)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets.count(flex.attend) == 2 and targets.count(flex.blocks) == 1


def test_a_mask_that_is_turned_around_is_another_one() -> None:
    class Turned(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: tuple[torch.Tensor, ...]) -> torch.Tensor:
            order = torch.arange(31, -1, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[0])
            return F.scaled_dot_product_attention(out, k, v, attn_mask=masks[0][:, :, order])

    graph = traced(Turned(), torch.zeros(1, 2, 32, 16), window()[..., :32, :32])
    flex.Flex()(graph)
    assert [node.target for node in graph.nodes].count(flex.blocks) == 2


def traced(module: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.fx.Graph:
    """As Dynamo hands it to Inductor."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(module, backend=keep, fullgraph=True)(x, x, x, (mask,))
    return found[0].graph


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x, m: F.scaled_dot_product_attention(x, x, x), "without a mask"),
        (lambda x, m: F.scaled_dot_product_attention(x, x, x, is_causal=True), "without a mask"),
        (lambda x, m: F.scaled_dot_product_attention(x[..., :8], x[..., :8], x[..., :8], attn_mask=m), "narrower than 16"),
        (lambda x, m: F.scaled_dot_product_attention(x[0], x[0], x[0], attn_mask=m[0]), "four dimensions"),
        (lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m[..., :1]), "same for every key"),
        (lambda x, m: x + m.sum(), "no scaled_dot_product_attention"),
    ],
)
def test_what_it_is_not_for_stays_and_says_why(call: Any, reason: str) -> None:
    class Calls(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: tuple[torch.Tensor, ...]) -> torch.Tensor:
            out: torch.Tensor = call(q, masks[0])
            return out

    graph = traced(Calls(), torch.zeros(1, 2, 32, 16), window()[..., :32, :32])
    before = [node.target for node in graph.nodes]
    seen = flex.Flex()
    seen(graph)
    assert not seen.num_changed and reason in seen.why() and [node.target for node in graph.nodes] == before


def _t5() -> Any:
    import transformers as hf

    config = hf.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, use_cache=False)
    return hf.T5Model(config), {"input_ids": torch.randint(3, 99, (2, 40)), "decoder_input_ids": torch.randint(3, 99, (2, 24))}, 4


def _windowed() -> Any:
    import transformers as hf

    config = hf.Qwen2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=99, use_cache=False,
        use_sliding_window=True, sliding_window=16, max_window_layers=0,
    )  # fmt: skip
    return hf.Qwen2Model(config), {"input_ids": torch.randint(3, 99, (2, 160))}, 2


@pytest.mark.parametrize("make", [_t5, _windowed])
def test_models_with_a_bias_or_a_window_give_what_they_gave(make: Any) -> None:
    """As Dynamo hands their graphs to Inductor, run op by op. T5's cross attention has no mask and stays."""
    module, inputs, least = make()
    module, seen = module.double().eval(), flex.Flex()

    def backend(graph: torch.fx.GraphModule, given: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        seen(graph.graph)
        graph.recompile()
        return aot_eager(graph, given)

    with torch.no_grad():
        wanted = module(**inputs)[0]
        found = torch.compile(module, backend=backend, fullgraph=True)(**inputs)[0]
    assert seen.num_changed >= least, (seen.num_changed, seen.why())
    assert (found - wanted).norm() / wanted.norm() < 1e-6


class Net(torch.nn.Module):
    def __init__(self, *, is_masked: bool = True) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)
        self.is_masked = is_masked

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        mask = mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if self.is_masked else None)
        return out.transpose(1, 2).reshape(x.shape)


def given() -> Inputs:
    specs = (TensorSpec.parse("x:float32[N,40,64]"), TensorSpec.parse("mask:bool[N,40]"))
    mask = torch.arange(40) < torch.tensor([[13], [40]])
    return Inputs(args=(torch.randn(2, 40, 64), mask), specs=specs, dims={"N": 2})


def build(net: torch.nn.Module, **options: Any) -> inductor.InductorRunner:
    return inductor.build(Model(form="module", name="net", module=net), given(), {"precision": "fp32", "flex": True, **options})


def test_the_backend_builds_it_counts_it_and_brings_it_back_from_a_bundle(tmp_path: Path) -> None:
    net, inputs = Net().eval(), given()
    runner = build(net)
    with torch.no_grad():
        wanted = net(*inputs.args)
    assert torch.allclose(runner(*inputs.args), wanted, atol=1e-6)
    audit = runner.audit()
    assert audit is not None and audit.honoured and "higher_order" not in audit.reason
    files = runner.save(tmp_path)
    again = inductor.load(tmp_path, files, {"precision": "fp32", "flex": True, "signed_by_us": True}, "cpu")
    assert again._flex is not None and again._flex.num_changed == 1, "an exported program names the operator in another way"
    assert torch.allclose(again(*inputs.args), wanted, atol=1e-6)


def test_the_fp32_twin_of_a_candidate_keeps_it() -> None:
    assert inductor.structural({"preset": "max-autotune-graphed", "flex": True, "streams": 2}) == {"preset": "default", "flex": True}


def test_where_there_is_nothing_to_change_it_is_refused_and_not_run_unchanged() -> None:
    with pytest.raises(Unsupported, match="flex=true has nothing to change: attention without a mask has faster kernels"):
        build(Net(is_masked=False).eval())


def test_a_slice_of_a_mask_is_the_mask_only_where_it_takes_all_of_it() -> None:
    graph = torch.fx.Graph()
    mask = graph.placeholder("mask")
    mask.meta["example_value"] = torch.zeros(1, 1, 4, 4)
    everything = (slice(None), slice(None), slice(None), slice(None, 4))
    whole = graph.call_function(operator.getitem, (mask, everything))
    whole.meta["example_value"] = torch.zeros(1, 1, 4, 4)
    part = graph.call_function(operator.getitem, (mask, (*everything[:3], slice(None, 3))))
    part.meta["example_value"] = torch.zeros(1, 1, 4, 3)
    assert flex._unsliced(whole) is mask and flex._unsliced(part) is part
