"""CUDA graphs of units on a CPU: a stand-in records a tape of operations at fixed addresses. What only a GPU can say is in test_graphed_gpu.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gpuopt.core.errors import OutOfMemory, ResourceError, Unsupported, UsageError
from gpuopt.core.streaming import Ledger
from gpuopt.streaming import arguments, graphed
from gpuopt.streaming.bound import bind
from gpuopt.streaming.engines.simulated import SimulatedEngine

sys.path.insert(0, str(Path(__file__).parents[1]))

from tapes import FakeRecorder, Stream


def recorded(bound: Any, recorder: FakeRecorder | None = None, reserved_bytes: Callable[[], int] = lambda: 0) -> FakeRecorder:
    recorder = recorder or FakeRecorder()
    bound.record(graphed.Graphs(bound.module, bound.plan, bound.engine.device, recorder=recorder, reserved_bytes=reserved_bytes))  # type: ignore[arg-type]
    return recorder


class Chain(nn.Module):
    """Blocks of one class, called with whatever the model is called with."""

    def __init__(self, block: Callable[[], nn.Module], num_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, **more)
        return x


def chain(block: Callable[[], nn.Module], num_blocks: int = 4) -> Chain:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return Chain(block, num_blocks).eval()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        y = self.linear(x) * scale
        return x + torch.tanh(y if mask is None else y.masked_fill(mask, 0.0))


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_a_device_that_is_no_gpu_is_refused_before_anything_is_bound(stack, planned):
    module = stack()
    attributes = {name: sorted(vars(each)) for name, each in module.named_modules()}
    with pytest.raises(Unsupported, match="CUDA graphs run on an NVIDIA GPU") as raised:
        bind(module, planned(module, graphs=True), SimulatedEngine(1e9))
    assert "--graphs" in raised.value.fix
    assert {name: sorted(vars(each)) for name, each in module.named_modules()} == attributes


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
def test_replays_give_the_bits_of_everything_resident_and_results_that_stay_as_they_are(stack, planned, schedule):
    module = stack()
    inputs = [torch.randn(3, 8) for _ in range(20)]
    want = [module(x) for x in inputs]
    with bind(module, planned(module, resident=("blocks.2",)), SimulatedEngine(1e9, schedule=schedule), poison=True) as bound:
        recorder = recorded(bound)
        got = [module(x) for x in inputs]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), "also the first ones, after all others"
        assert bound.engine.races == [] and bound.streamer.demand_fetches == 0
        assert len(recorder.tapes) == 6 and recorder.replays == 6 * 18
        assert bound.graphs.graphed == tuple(f"blocks.{i}" for i in range(6)) and not bound.graphs.refused
        assert bound.notes == (f"CUDA graphs of 6 of 6 units: 6 graphs, {2 * 3 * 16 * 4} B of device memory",), "buffers are shared"
    assert all(tape.resets == 1 for tape in recorder.tapes)
    assert torch.equal(module(inputs[0]), want[0])


def test_results_that_blocks_hand_on_are_nobody_elses_memory(planned):
    module = chain(Block)
    seen: list[torch.Tensor] = []
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorded(bound)
        hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in module.blocks]
        for _ in range(5):
            module(torch.randn(2, 16))
        kept = [tensor.clone() for tensor in seen]
        module(torch.randn(2, 16))
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(seen, kept)) and len(seen) == 24


def test_each_shape_constant_and_mode_has_a_graph_of_its_own(planned):
    module = chain(Block, 2)
    x, mask = torch.randn(2, 16), torch.rand(2, 16) > 0.5
    calls = [((x,), {}), ((x[:1],), {}), ((x,), {"mask": mask}), ((x,), {"scale": 2.0}), ((x,), {"scale": 0.5})]
    want = [module(*a, **k) for a, k in calls]
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        for _ in range(4):
            for (a, k), expected in zip(calls, want, strict=True):
                assert torch.equal(module(*a, **k), expected)
        assert len(recorder.tapes) == 2 * len(calls)
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(3):
                assert torch.equal(module(x.clone()), want[0])
        assert torch.equal(module(x), want[0])
        assert len(recorder.tapes) == 2 * len(calls) + 2


def test_more_shapes_than_are_kept_run_without_and_are_told(planned):
    module = chain(Block, 2)
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        for length in range(1, 20):
            x = torch.randn(length, 16)
            first = module(x)
            assert torch.equal(module(x), first)
        assert len(recorder.tapes) == 2 * graphed.SHAPES
        assert "more than 8 shapes" in bound.notes[1] and "blocks.0 and 1 more" in bound.notes[1]


class Cache:
    """An object that a unit changes while it is used."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []


class Caching(Block):
    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        if cache is not None:
            cache.kept.append(x)
        return super().forward(x)


class WritesInput(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return super().forward(x)


class WritesZeros(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, :0].mul_(2)
        x.mul_(1)
        return super().forward(x)


class Counts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Notes(Block):
    """Puts something into a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(1)
        return super().forward(x) * len(self.seen)


class Remembers(Block):
    """The same in a dictionary, whose keys stay."""

    def __init__(self) -> None:
        super().__init__()
        self.last = {"calls": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last["calls"] = self.last["calls"] + 1
        return super().forward(x) * self.last["calls"]


class CountsInABuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return super().forward(x) * self.calls


class Hidden(Block):
    """Reads a tensor that somebody may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [torch.ones(16)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.held[0]


class Random(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0 * torch.rand(16)


class Asks(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if float(x.sum()) > 0 else 3.0)


class ReturnsView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> Any:
        return x[:, 1:]


class ReturnsSiblings(Block):
    def forward(self, x: Any) -> Any:
        both = torch.cat([super().forward(x if isinstance(x, torch.Tensor) else x[0])] * 2)
        return both[:2], both[2:]


class ReturnsObject(Block):
    def forward(self, x: Any) -> Any:
        found = Cache()
        found.kept.append(super().forward(x if isinstance(x, torch.Tensor) else x.kept[0]))
        return found


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (WritesInput, "writes into its arguments"),
        (WritesZeros, "writes into an argument"),
        (Counts, "sets calls, and a replay runs no Python"),
        (Notes, "sets seen, and a replay runs no Python"),
        (Remembers, "sets last, and a replay runs no Python"),
        (CountsInABuffer, "writes into an argument or a weight"),
        (Hidden, "reads memory that is neither an argument nor a weight"),
        (Random, "draws random numbers"),
        (Asks, "needs a value from the device"),
        (ReturnsView, "returns a view of an argument"),
        (ReturnsSiblings, "returns several views of the same memory"),
        (ReturnsObject, "returns a Cache"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_unit_that_a_replay_would_not_repeat_runs_as_it_is_and_says_why(planned, block, reason):
    module, twin = chain(block, 2), chain(block, 2)
    torch.manual_seed(1)
    inputs = [torch.randn(2, 16) for _ in range(4)]

    def answers(model: nn.Module) -> list[Any]:
        torch.manual_seed(2)
        found = []
        for x in inputs:
            given = x.clone()
            found.append((model(given), given))
        return found

    want = answers(twin)
    plan = planned(module)
    with bind(module, plan, SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        got = answers(module)
        for (a, given_a), (b, given_b) in zip(got, want, strict=True):
            assert torch.equal(given_a, given_b)
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)
        assert not recorder.tapes
        assert any(reason in note and "blocks.0" in note for note in bound.notes), bound.notes
        assert bound.notes[0] == "CUDA graphs of 0 of 2 units"


def test_a_cache_object_is_told_and_calls_without_it_have_graphs(planned):
    module = chain(Caching)
    x = torch.randn(2, 16)
    want = module(x)
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        for _ in range(3):
            cache = Cache()
            assert torch.equal(module(x, cache=cache), want) and len(cache.kept) == 4
        assert not recorder.tapes
        assert bound.notes[1].endswith("it is called with a Cache, which is neither a tensor nor a plain value")
        for _ in range(3):
            assert torch.equal(module(x), want)
        assert len(recorder.tapes) == 4


def test_a_hook_within_a_unit_runs_whenever_it_is_there(planned):
    module = chain(Block)
    x = torch.randn(2, 16)
    want = module(x)
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        for _ in range(3):
            module(x)
        assert recorder.replays == 4
        seen: list[Any] = []
        hook = module.blocks[1].linear.register_forward_hook(lambda m, a, out: seen.append(out))
        assert torch.equal(module(x), want) and len(seen) == 1 and recorder.replays == 7
        hook.remove()
        assert torch.equal(module(x), want) and recorder.replays == 11
        assert "blocks.1: one of its parts has a forward hook" in bound.notes[1]


def test_an_argument_that_a_unit_hands_on_is_that_argument(planned):
    class Hands(Block):
        def forward(self, pair: Any) -> Any:
            x, bias = pair
            return super().forward(x) + bias, bias

    module = chain(Hands, 3)
    x, bias = torch.randn(2, 16), torch.randn(16)
    want, _ = module((x, bias))
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        for _ in range(4):
            got, same = module((x, bias))
            assert torch.equal(got, want) and same is bias
        assert len(recorder.tapes) == 3


def test_what_was_one_tensor_for_two_arguments_may_be_two_in_the_next_call(planned):
    """Which argument a unit hands on is no secret of the first call."""

    class Hands(Block):
        def forward(self, pair: Any) -> Any:
            x, left = pair
            return super().forward(x), left

    module, twin = chain(Hands, 1), chain(Hands, 1)
    x, other = torch.randn(2, 16), torch.randn(2, 16)
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        for second in (x, x, other, other, x, other):
            got, left = module((x, second))
            want, _ = twin((x, second))
            assert torch.equal(got, want) and left is second
        assert len(recorder.tapes) == 2, "one for each way the arguments are shared"


def test_graphs_over_the_budget_raise_with_the_numbers_and_leave_the_model_usable(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    plan = replace(planned(module), budget_bytes=3 * 2**20, ledger=Ledger(slots=2 * 2**20))
    taken = iter(range(0, 2**40, 2**20))
    with bind(module, plan, SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound, reserved_bytes=lambda: next(taken))
        assert torch.equal(module(x), want)
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"CUDA graphs take 2\.0+ MiB|CUDA graphs take 2") as raised:
                module(x)
            assert "3 MiB of the budget" in raised.value.message and "--graphs" in raised.value.fix
        assert recorder.tapes[-1].resets == 1 and bound.graphs.num_graphs == 0


def test_a_plan_that_measured_its_graphs_does_not_count_them_twice(stack, planned):
    module = stack(num_blocks=2)
    plan = replace(planned(module), budget_bytes=8 * 2**20, ledger=Ledger(slots=2 * 2**20, activations=6 * 2**20))
    taken = iter(range(0, 2**40, 2**20))
    with bind(module, plan, SimulatedEngine(1e9)) as bound:
        recorded(bound, reserved_bytes=lambda: next(taken))
        for _ in range(3):
            module(torch.randn(3, 8))
        assert bound.graphs.num_graphs == 2 and bound.graphs.num_bytes >= 4 * 2**20


class Refusing(FakeRecorder):
    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.error = error

    def record(self, call: Any, watch: Any) -> Any:
        raise self.error


def test_what_cuda_refuses_while_recording_runs_as_it_is_and_is_told(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorded(bound, Refusing(RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")))
        for _ in range(4):
            assert torch.equal(module(x), want)
        assert bound.notes[0] == "CUDA graphs of 0 of 6 units"
        assert "CUDA cannot record it: CUDA error: operation not permitted when stream is capturing" in bound.notes[1]


def test_running_out_of_memory_while_recording_says_what_graphs_hold(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    with bind(module, planned(module), SimulatedEngine(1e9)) as bound:
        recorded(bound, Refusing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")))
        module(x)
        with pytest.raises(OutOfMemory, match=r"CUDA graph of blocks\.0 does not fit: 0 graphs hold .* Tried to allocate 1 GiB"):
            module(x)


def test_an_error_of_the_forward_is_not_taken_for_cudas(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    with bind(module, planned(module), SimulatedEngine(1e9)) as bound:
        recorded(bound, Refusing(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
        module(x)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            module(x)


def test_another_stream_waits_for_the_one_whose_buffers_it_takes(stack, planned):
    module = stack(num_blocks=2)
    x = torch.randn(3, 8)
    with bind(module, planned(module), SimulatedEngine(1e9)) as bound:
        recorder = recorded(bound)
        for _ in range(3):
            module(x)
        first, recorder.stream = recorder.stream, Stream("second")
        module(x)
        assert recorder.stream.waited == [first.name] and first.waited == []


def test_compiled_units_are_recorded_as_compiled(planned):
    module = chain(Block)
    x = torch.randn(2, 16)
    want = module(x)
    torch._dynamo.reset()
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    with bind(module, planned(module, resident=("blocks.1",)), SimulatedEngine(1e9), poison=True) as bound:
        bound.compile(backend=backend, fullgraph=True)
        recorder = Again()
        recorded(bound, recorder)
        for _ in range(5):
            assert torch.equal(module(x), want)
        # Its first call, the one before the recording, the recording, and each replay, which here is a call.
        assert recorder.recordings == 4 and recorder.again == 3 * 4 and len(calls) == 3 * 4 + recorder.again
        with pytest.raises(UsageError, match="CUDA graphs"):
            bound.compile()


class Again(FakeRecorder):
    """Calls again: compiled code does not run under a tape."""

    recordings = again = 0

    def record(self, call: Any, watch: Any) -> Any:
        self.recordings += 1
        recorder = self

        class Called:
            def replay(self) -> None:
                recorder.again += 1
                call()

            def reset(self) -> None:
                pass

        call()
        return Called(), None


def test_units_that_are_called_in_another_order_still_give_the_same_bits(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    with bind(module, planned(module), SimulatedEngine(1e9, schedule="random"), poison=True) as bound:
        recorded(bound)
        orders = [list(range(6)), [5, 4, 3, 2, 1, 0], [0, 0, 3, 3, 1], [2]]
        for order in orders * 4:
            module.order = order
            got = module(x)
            hidden = torch.nn.functional.linear(x, module.inlet.weight, module.inlet.bias)
            state = module.state_dict()
            for index in order:
                hidden = torch.nn.functional.gelu(
                    torch.nn.functional.linear(hidden, state[f"blocks.{index}.0.weight"], state[f"blocks.{index}.0.bias"])
                )
            assert torch.equal(got, module.outlet(hidden))
        assert bound.graphs.num_graphs == 6 and bound.engine.races == []


class Constant(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(super().forward(x) > 0, x, torch.tensor(0.5))


def test_a_constant_made_within_a_forward_is_no_foreign_memory(planned):
    module = chain(Constant)
    x = torch.randn(2, 16)
    want = module(x)
    with bind(module, planned(module), SimulatedEngine(1e9), poison=True) as bound:
        recorded(bound, Again())
        for _ in range(3):
            assert torch.equal(module(x), want)
        assert bound.graphs.num_graphs == 4 and not bound.graphs.refused


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=64, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode(False):
        return transformers.LlamaForCausalLM(config).eval()


def test_a_llama_has_graphs_without_a_cache_and_a_note_with_one(planned):
    model = tiny_llama()
    prompt = torch.randint(1, 64, (2, 7))
    want = model(prompt, use_cache=False).logits
    asked = dict(max_new_tokens=6, do_sample=False)
    tokens = model.generate(prompt, **asked)
    with bind(model, planned(model, resident=("model.layers.1",)), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        assert torch.equal(model.generate(prompt, **asked), tokens)
        assert not recorder.tapes and "model.layers.0 and 3 more: it is called with a DynamicCache" in bound.notes[1]
        for _ in range(4):
            assert torch.equal(model(prompt, use_cache=False).logits, want)
        assert bound.graphs.graphed == tuple(f"model.layers.{i}" for i in range(4)) and recorder.replays == 8


def test_with_attention_and_mlp_apart_the_mlp_has_graphs_while_a_cache_grows(planned):
    model = tiny_llama()
    prompt = torch.randint(1, 64, (1, 7))
    asked = dict(max_new_tokens=12, do_sample=False)
    tokens = model.generate(prompt, **asked)
    with bind(model, planned(model, granularity="sub"), SimulatedEngine(1e9), poison=True) as bound:
        recorder = recorded(bound)
        assert torch.equal(model.generate(prompt, **asked), tokens)
        assert {f"model.layers.{i}.mlp" for i in range(4)} <= set(bound.graphs.graphed)
        assert not any(name.endswith("self_attn") for name in bound.graphs.graphed) and recorder.replays > 4 * 8


def test_a_bert_has_graphs(planned):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    with torch.inference_mode(False):
        model = transformers.BertModel(config).eval()
    ids, mask = torch.randint(0, 64, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    want = model(ids, attention_mask=mask).last_hidden_state
    with bind(model, planned(model), SimulatedEngine(1e9), poison=True) as bound:
        recorded(bound)
        for _ in range(4):
            assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, want)
        assert bound.graphs.num_graphs == 3, bound.notes


# -- arguments ------------------------------------------------------------------------------------------------------------------------------------------


def plain_values() -> st.SearchStrategy[Any]:
    leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.just(torch.float16))
    tensors = st.builds(lambda n: torch.arange(n), st.integers(0, 4))
    return st.recursive(
        st.one_of(leaf, tensors),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one is other
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


@settings(max_examples=150, deadline=None)
@given(plain_values())
def test_values_come_apart_and_together_again(value: Any):
    found: list[torch.Tensor] = []
    spec = arguments.flat(value, found)
    hash(spec)
    assert equal(arguments.filled(spec, found), value)


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, 1.0), (0.0, -0.0), ([1], (1,)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (None, "None")]
)
def test_values_that_a_forward_can_tell_apart_are_apart(one: Any, other: Any):
    assert arguments.flat(one, []) != arguments.flat(other, [])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float16, torch.float32, torch.bool, torch.int64]),
)
def test_a_copy_lies_in_memory_as_what_it_is_a_copy_of(shape: list[int], rng: Any, dtype: torch.dtype):
    whole = torch.randint(0, 2, [2 * n for n in shape]).to(dtype)
    view = whole[tuple(slice(rng.randrange(n), None, rng.choice([1, 2])) for n in shape)]
    order = list(range(len(shape)))
    rng.shuffle(order)
    view = view.permute(order)
    if rng.random() < 0.5:
        view = view.unsqueeze(0).expand(3, *view.shape)
    cpu = torch.device("cpu")
    layout = arguments.Layout.of(view, cpu)
    assert not layout.overlaps
    made = layout.copy(view)
    assert torch.equal(made, view) and arguments.Layout.of(made, cpu) == layout


def test_tensors_that_overlap_themselves_have_no_copy_like_them():
    window = torch.arange(8.0).unfold(0, 4, 1)
    layout = arguments.Layout.of(window, torch.device("cpu"))
    assert layout.overlaps
    with pytest.raises(arguments.Refused):
        layout.empty("cpu")
