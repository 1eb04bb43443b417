"""CUDA graphs of streamed units on a GPU: the bits of everything resident, replayed, within the budget, and nothing left behind. Small models: under a minute together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpuopt.core.errors import ResourceError
from gpuopt.core.streaming import Ledger
from gpuopt.streaming.bound import bind
from gpuopt.streaming.engines.cuda import CudaEngine

pytestmark = pytest.mark.gpu
WIDTH = 256
FORWARDS = 20


class Block(nn.Module):
    """Attention and an MLP: cuBLAS, a fused attention, reductions and elementwise kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(x if bias is None else x + bias)))


class Waits(Block):
    """Waits for the stream, past PyTorch's operations: only CUDA notices."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        torch.cuda.current_stream().synchronize()
        return super().forward(x, bias)


class Net(nn.Module):
    def __init__(self, kinds: list[type[Block]]) -> None:
        super().__init__()
        self.inlet = nn.Linear(32, WIDTH)
        self.blocks = nn.ModuleList(kind() for kind in kinds)
        self.outlet = nn.Linear(WIDTH, 16)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x, bias=bias)
        return self.outlet(x)


def net(*kinds: type[Block]) -> Net:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return Net(list(kinds) or [Block] * 6).eval().to(torch.bfloat16)


def inputs(count: int = FORWARDS, length: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, length, 32, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def resident(module: nn.Module, call: Callable[[], Any]) -> Any:
    """What `call` gives with everything on the device; the module is on the CPU again afterwards."""

    def move(device: str) -> None:
        with torch.inference_mode(False), torch.no_grad():
            module.to(device)

    move("cuda")
    try:
        return call()
    finally:
        torch.cuda.synchronize()
        move("cpu")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each graph that CUDA is asked to run."""
    seen: list[Any] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(self: Any) -> None:
        seen.append(self)
        original(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return seen


@pytest.mark.parametrize("num_slots", [2, 3])
def test_graphs_give_the_bits_of_everything_resident_with_half_of_it_streamed(planned, replays, num_slots):
    module, xs = net(), inputs()
    want = resident(module, lambda: [module(x) for x in xs])
    plan = planned(module, num_slots=num_slots, resident=("blocks.1", "blocks.3", "blocks.5"), graphs=True)
    with bind(module, plan, CudaEngine(sleeps=num_slots), poison=True) as bound:
        got = [module(x) for x in xs]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), "the first results too, after all others"
        assert bound.graphs.num_graphs == 6 and bound.graphs.refused == {}, bound.notes
        # Once when it is recorded, and in each forward after that.
        assert len(replays) == 6 * (FORWARDS - 1) and len(set(map(id, replays))) == 6
        assert bound.streamer.demand_fetches == 0
    assert torch.equal(resident(module, lambda: module(xs[0])), want[0]), "the weights are the module's own again"


def test_everything_resident_has_graphs_too(planned, replays):
    module, xs = net(), inputs(6)
    want = resident(module, lambda: [module(x) for x in xs])
    plan = planned(module, resident=tuple(f"blocks.{i}" for i in range(6)), graphs=True)
    with bind(module, plan, CudaEngine()) as bound:
        assert all(torch.equal(module(x), w) for x, w in zip(xs, want, strict=True))
        assert bound.graphs.num_graphs == 6 and len(replays) == 6 * 5


def test_shapes_arguments_and_modes_take_turns(planned):
    module = net()
    short, long = inputs(1, 5)[0], inputs(1, 33)[0]
    bias = torch.randn(WIDTH, device="cuda", dtype=torch.bfloat16)
    calls = [(short, None), (long, None), (long, bias), (long.transpose(0, 1).contiguous().transpose(0, 1), None)]
    want = resident(module, lambda: [module(x, bias=b) for x, b in calls])
    with bind(module, planned(module, graphs=True), CudaEngine(sleeps=1), poison=True) as bound:
        for _ in range(4):
            for (x, b), w in zip(calls, want, strict=True):
                assert torch.equal(module(x, bias=b), w)
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(4):
                assert torch.equal(module(short.clone()), want[0])
        assert torch.equal(module(short), want[0])
        assert bound.graphs.num_graphs >= 6 * 4 and bound.graphs.refused == {}, bound.notes


def test_two_streams_in_turns_read_their_own_results(planned):
    module, xs = net(), inputs()
    want = resident(module, lambda: [module(x) for x in xs])
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    with bind(module, planned(module, graphs=True), CudaEngine(), poison=True):
        got = []
        for number, x in enumerate(xs):
            with torch.cuda.stream(streams[number % 2]):
                got.append(module(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_units_are_recorded_as_compiled(planned, replays):
    torch._dynamo.reset()
    module, xs = net(Block, Block, Block), inputs()
    eager = resident(module, lambda: [module(x) for x in xs])
    plan = planned(module, resident=("blocks.1",), graphs=True, compile=True)
    with bind(module, plan, CudaEngine(sleeps=2), poison=True) as bound:
        first = module(xs[0])  # compiled, and not recorded yet
        for _ in range(3):
            assert torch.equal(module(xs[0]), first)
        got = [module(x) for x in xs]
        assert torch.equal(got[0], first)
        assert bound.graphs.num_graphs == 3 and bound.graphs.refused == {} and len(replays) == 3 * (3 + FORWARDS)
    for a, b in zip(got, eager, strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=128, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode(False):
        return transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)


def test_a_llama_without_a_cache(planned, replays):
    model = tiny_llama()
    prompt = torch.randint(1, 128, (2, 24), device="cuda")
    want = resident(model, lambda: model(prompt, use_cache=False).logits)
    with bind(
        model, planned(model, resident=("model.layers.1", "model.layers.3"), graphs=True), CudaEngine(sleeps=3), poison=True
    ) as bound:
        got = [model(prompt, use_cache=False).logits for _ in range(FORWARDS)]
        assert all(torch.equal(logits, want) for logits in got)
        assert bound.graphs.num_graphs == 4 and len(replays) == 4 * (FORWARDS - 1), bound.notes


@pytest.mark.parametrize("granularity", ["block", "sub"])
def test_a_llama_with_a_cache_that_grows_gives_the_same_tokens_and_says_what_has_no_graph(planned, granularity):
    model = tiny_llama()
    prompt = torch.randint(1, 128, (1, 12), device="cuda")
    asked = dict(max_new_tokens=FORWARDS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    want = resident(model, lambda: model.generate(prompt, **asked))
    with bind(model, planned(model, granularity=granularity, graphs=True), CudaEngine(sleeps=4), poison=True) as bound:
        for _ in range(2):
            got = model.generate(prompt, **asked)
            assert torch.equal(got.sequences, want.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
        assert any("DynamicCache" in reason for reason in bound.graphs.refused), bound.notes
        mlps = {f"model.layers.{i}.mlp" for i in range(4)}
        assert mlps <= set(bound.graphs.graphed) if granularity == "sub" else bound.graphs.num_graphs == 0


def test_what_cuda_cannot_record_runs_as_it_is_and_the_others_have_graphs(planned):
    module, xs = net(Block, Waits, Block, Block), inputs()
    want = resident(module, lambda: [module(x) for x in xs])
    with bind(module, planned(module, graphs=True), CudaEngine(), poison=True) as bound:
        assert all(torch.equal(module(x), w) for x, w in zip(xs, want, strict=True))
        assert bound.graphs.graphed == ("blocks.0", "blocks.2", "blocks.3"), bound.notes
        (reason,) = bound.graphs.refused
        assert "CUDA cannot record it" in reason and bound.graphs.refused[reason] == ("blocks.1",)


def test_a_budget_that_graphs_exceed_is_an_error_with_the_numbers(planned):
    module, xs = net(), inputs(3)
    plan = replace(planned(module, graphs=True), budget_bytes=2**20, ledger=Ledger(slots=2**19))
    with bind(module, plan, CudaEngine()) as bound:
        module(xs[0])
        with pytest.raises(ResourceError, match=r"CUDA graphs take .* more than the 1\.?0* MiB of the budget"):
            module(xs[1])
        assert bound.graphs.num_graphs == 0


def test_closing_leaves_nothing_of_a_graph_on_the_device(planned):
    module, xs = net(), inputs(4)
    held = []
    for _ in range(3):
        with bind(module, planned(module, graphs=True), CudaEngine()) as bound:
            for x in xs:
                module(x)
            assert bound.graphs.num_graphs == 6
        del bound
        gc.collect()  # what other tests left, too
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[0] == held[1] == held[2], "but for workspaces, which libraries keep once"
