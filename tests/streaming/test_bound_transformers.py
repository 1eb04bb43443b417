"""Models people run, tiny and with random weights, give the same bits streamed, with `generate()` and a cache of keys and values too."""

import pytest
import torch

from gpuopt.streaming.bound import bind
from gpuopt.streaming.engines.simulated import SimulatedEngine

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.inference_mode(False):
        return transformers.LlamaForCausalLM(config).eval()


def tiny_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    with torch.inference_mode(False):
        return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("granularity", ["block", "sub"])
@pytest.mark.parametrize("schedule", ["late", "random"])
def test_llama_generates_the_same_tokens_and_logits(planned, schedule, granularity):
    model = tiny_llama()
    prompt = torch.randint(1, 64, (2, 7))
    asked = dict(max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True)
    want = model.generate(prompt, **asked)
    plan = planned(model, granularity=granularity)
    device = SimulatedEngine(1e9, schedule=schedule)
    with bind(model, plan, device, poison=True) as bound:
        for _ in range(2):
            got = model.generate(prompt, **asked)
            assert torch.equal(got.sequences, want.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
        assert device.races == []
        # Halves of a block, norms among them, run in another order than they are registered in; which, the first forward tells.
        assert (bound.streamer.demand_fetches == 0) == (granularity == "block") and bound.streamer.demand_fetches <= len(plan.binding)
        assert bound.streamer.forwards == 32 == len(device.forwards)
    assert torch.equal(model.generate(prompt, **asked).sequences, want.sequences)


def test_t5_has_two_rings_and_generates_the_same_tokens(planned):
    model = tiny_t5()
    prompt = torch.randint(1, 64, (2, 7))
    want = model.generate(prompt, max_new_tokens=16, do_sample=False)
    plan = planned(model)
    assert set(plan.slots) == {"encoder.block", "decoder.block"}
    device = SimulatedEngine(1e9, schedule="late")
    with bind(model, plan, device, poison=True) as bound:
        for _ in range(2):
            assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), want)
        assert device.races == [] and bound.streamer.demand_fetches == 0
        state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), want)


def test_bert_is_the_same_with_some_layers_resident(planned):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4)
    with torch.inference_mode(False):
        model = transformers.BertModel(config).eval()
    tokens, mask = torch.randint(0, 64, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    want = model(tokens, attention_mask=mask)
    with bind(model, planned(model, resident=("encoder.layer.1", "encoder.layer.3")), SimulatedEngine(1e9), poison=True):
        for _ in range(3):
            got = model(tokens, attention_mask=mask)
            assert torch.equal(got.last_hidden_state, want.last_hidden_state) and torch.equal(got.pooler_output, want.pooler_output)


def test_resnet_is_the_same_with_its_statistics_resident(planned):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic")
    with torch.inference_mode(False):
        model = transformers.ResNetModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    want = model(pixels)
    plan = planned(model)
    assert len(plan.binding) >= 2 and all("running_mean" not in p.name for u in plan.anatomy.units for p in u.places)
    with bind(model, plan, SimulatedEngine(1e9, schedule="random"), poison=True) as bound:
        for _ in range(3):
            assert torch.equal(model(pixels).last_hidden_state, want.last_hidden_state)
        assert bound.engine.races == []


def test_llama_saved_while_streamed_is_the_model(planned, tmp_path):
    model = tiny_llama()
    prompt = torch.randint(1, 64, (1, 7))
    want = model(prompt).logits
    with bind(model, planned(model, resident=("model.layers.2",)), SimulatedEngine(1e9), poison=True):
        model(prompt)
        model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(prompt).logits, want)


def test_llama_compiled_block_by_block_is_the_same(planned):
    model = tiny_llama()
    prompt = torch.randint(1, 64, (1, 7))
    want = model(prompt, use_cache=False).logits
    torch._dynamo.reset()
    with bind(model, planned(model), SimulatedEngine(1e9), poison=True) as bound:
        bound.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(model(prompt, use_cache=False).logits, want)
        assert bound.engine.races == []


def test_a_cache_that_grows_compiles_each_block_three_times_at_most_and_never_copies_a_weight(planned):
    """A prompt, a token, and a token at any length: weights are arguments, so a slot's next block needs no code of its own."""
    model = tiny_llama()
    model.model.layers = model.model.layers[:3]
    prompt = torch.randint(1, 64, (1, 7))
    options = {"do_sample": False, "pad_token_id": 0}
    want = model.generate(prompt, min_new_tokens=12, max_new_tokens=12, **options)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        assert not list(graph.parameters()) and not any(t.numel() > 64 for t in graph.buffers()), (
            "a weight in the graph is one that is never copied to again"
        )
        graphs.append(sum(1 for one in inputs if isinstance(one, torch.nn.Parameter)))
        return graph.forward

    plan = planned(model, resident=("model.layers.1",))
    with bind(model, plan, SimulatedEngine(1e9), poison=True) as bound:
        bound.compile(backend=backend)
        assert torch.equal(model.generate(prompt, min_new_tokens=12, max_new_tokens=12, **options), want)
        assert len(graphs) <= 3 * len(plan.anatomy.units) and min(graphs) > 0
        graphs.clear()
        model.generate(prompt, min_new_tokens=20, max_new_tokens=20, **options)
        assert not graphs
