"""What moves and what stays, of models of many makes: nothing twice, nothing lost, nothing that others read."""

import gc

import pytest
import torch
from torch import nn

from gpuopt.core.errors import BadInput, Unsupported, UsageError
from gpuopt.core.streaming import ALIGNMENT, EMBEDDING
from gpuopt.streaming.anatomy import dissect

transformers = pytest.importorskip("transformers")


def tiny(name, **changes):
    """A model of transformers' own classes, small, on the meta device."""
    config = getattr(transformers, f"{name[0]}Config")(**changes)
    with torch.device("meta"):
        return getattr(transformers, name[1])(config).eval()


def llama(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny(("Llama", "LlamaForCausalLM"), **{**sizes, "vocab_size": 500, **changes})


def t5(**changes):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 4, "num_heads": 4, "vocab_size": 200}
    return tiny(("T5", "T5ForConditionalGeneration"), **{**sizes, **changes})


def rings(anatomy):
    found = {}
    for unit in anatomy.units:
        found.setdefault(unit.ring, []).append(unit.name)
    return found


def check_whole(model, anatomy):
    """Every name is in one place only, and every byte is counted once."""
    names = [p.name for unit in anatomy.units for p in unit.places] + list(anatomy.fixed) + list(anatomy.host)
    assert len(names) == len(set(names))
    every = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers(remove_duplicate=False)}
    assert set(names) | set(anatomy.tied) == every
    assert set(anatomy.tied.values()) <= set(names) and not set(names) & set(anatomy.tied)
    tensors = [*model.parameters(), *model.buffers()]
    assert anatomy.weight_bytes == sum(t.numel() * t.element_size() for t in tensors)
    firsts = [n for n, _ in model.named_parameters()]
    assert all(p.name in firsts for unit in anatomy.units for p in unit.places)
    for unit in anatomy.units:
        end = 0
        for place in unit.places:
            assert place.offset % ALIGNMENT == 0 and place.offset >= end
            end = place.offset + place.num_bytes
        assert unit.num_bytes >= end and unit.num_bytes % ALIGNMENT == 0
    for ring in rings(anatomy):
        assert [u.order for u in anatomy.units if u.ring == ring] == list(range(len(rings(anatomy)[ring])))


MODELS = {
    "llama": (llama, {"model.layers": 4}),
    "llama, tied head": (lambda: llama(tie_word_embeddings=True), {"model.layers": 4}),
    "t5": (t5, {"encoder.block": 3, "decoder.block": 4}),
    "bert": (
        lambda: tiny(
            ("Bert", "BertForMaskedLM"), hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=300
        ),
        {"bert.encoder.layer": 3},
    ),
    "gpt2": (lambda: tiny(("GPT2", "GPT2LMHeadModel"), n_embd=64, n_layer=3, n_head=4, vocab_size=300), {"transformer.h": 3}),
    "mixtral": (
        lambda: tiny(
            ("Mixtral", "MixtralForCausalLM"),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            num_local_experts=4,
        ),
        {"model.layers": 3},
    ),
    "resnet": (
        lambda: tiny(("ResNet", "ResNetModel"), embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 3, 2]),
        {"encoder.stages": 9},
    ),
    "swin": (
        lambda: tiny(("Swin", "SwinModel"), embed_dim=24, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 8], window_size=7),
        {"encoder.layers": 10},
    ),
    "nn.Transformer": (lambda: nn.Transformer(64, 4, 2, 3, 128, device="meta"), {"encoder.layers": 2, "decoder.layers": 3}),
    "sequential": (lambda: nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU()))), {"root": 4}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("granularity", ["block", "sub"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_every_weight_of_a_model_is_in_one_place(name, granularity):
    build, expected = MODELS[name]
    model = build()
    anatomy = dissect(model, granularity)
    check_whole(model, anatomy)
    assert {ring: len(names) for ring, names in rings(dissect(model)).items()} == expected


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_sub_takes_attention_and_mlp_apart_where_nobody_else_reads_their_weights():
    assert rings(dissect(llama(), "sub"))["model.layers"][:2] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert rings(dissect(t5(), "sub"))["decoder.block"][:3] == [f"decoder.block.0.layer.{i}" for i in range(3)]
    # The encoder layer hands its children's weights to one fused operator: their own forwards never run.
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128), 3)
    assert rings(dissect(encoder, "sub"))["layers"] == ["layers.0", "layers.1", "layers.2"]


def test_a_tied_head_keeps_the_embedding_on_the_device_and_says_so():
    anatomy = dissect(t5(), embed="cpu")
    assert anatomy.reasons["shared.weight"] == "tied to lm_head.weight" and not anatomy.host
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} <= set(anatomy.tied)


def test_an_embedding_of_its_own_may_move_to_the_host():
    model = llama()
    on_device, on_host = dissect(model), dissect(model, embed="cpu")
    assert on_device.reasons["model.embed_tokens.weight"] == EMBEDDING
    assert list(on_host.host) == ["model.embed_tokens.weight"] and "model.embed_tokens.weight" not in on_host.fixed
    assert on_host.weight_bytes == on_device.weight_bytes


class Reads(nn.Module):
    """Its embedding is its head, without being tied by name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.linear(x, self.embed.weight)


def test_an_embedding_that_its_parent_multiplies_with_stays():
    assert not dissect(Reads(), embed="cpu").host


def stack(num=4, width=64, **options):
    return nn.Sequential(*(nn.Linear(width, width, bias=False, **options) for _ in range(num)))


def test_weights_tied_across_blocks_stay_by_name_by_view_and_by_parameter():
    model = stack(5)
    model[1].weight = model[0].weight
    model[3].weight = nn.Parameter(model[2].weight.detach().view(64, 64))
    anatomy = dissect(model, small_bytes=1)
    assert [unit.name for unit in anatomy.units] == ["4"]
    assert anatomy.reasons == {"0.weight": "tied to 1.weight", "2.weight": "tied to 3.weight"}
    assert anatomy.tied == {"1.weight": "0.weight", "3.weight": "2.weight"}
    check_whole_storage = sum(anatomy.fixed.values())
    assert check_whole_storage == 2 * 64 * 64 * 4


def test_on_meta_one_parameter_is_one_memory_and_two_are_two():
    with torch.device("meta"):
        model = stack(4)
        model[1].weight = model[0].weight
    anatomy = dissect(model, small_bytes=1)
    assert [unit.name for unit in anatomy.units] == ["2", "3"] and anatomy.tied == {"1.weight": "0.weight"}


def test_neighbours_in_one_storage_are_not_tied():
    model = stack(3)
    flat = torch.randn(3 * 64 * 64)
    for index, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[index * 4096 : (index + 1) * 4096].view(64, 64))
    anatomy = dissect(model, small_bytes=1)
    assert len(anatomy.units) == 3 and not anatomy.tied


def test_overlapping_slices_of_one_storage_stay_together():
    model = stack(3)
    flat = torch.randn(3 * 64 * 64)
    model[0].weight = nn.Parameter(flat[:4096].view(64, 64))
    model[1].weight = nn.Parameter(flat[2048:6144].view(64, 64))
    anatomy = dissect(model, small_bytes=1)
    assert [unit.name for unit in anatomy.units] == ["2"]
    assert anatomy.fixed["0.weight"] == 6144 * 4, "the span of both, once"


def test_strides_are_kept_and_what_is_expanded_or_has_gaps_stays():
    model = stack(4)
    model[0].weight = nn.Parameter(torch.randn(64, 64).t())
    model[1].weight = nn.Parameter(torch.randn(1, 64).expand(64, 64))
    model[2].weight = nn.Parameter(torch.randn(64, 128)[:, :64])
    anatomy = dissect(model, small_bytes=1)
    assert [unit.name for unit in anatomy.units] == ["0", "3"]
    assert anatomy.units[0].places[0].stride == (1, 64)
    assert all("expanded" in anatomy.reasons[name] for name in ("1.weight", "2.weight"))
    assert anatomy.fixed["1.weight"] == 64 * 4


class Wrapped(torch.Tensor):
    """A tensor that is more than its bytes."""


def test_a_subclass_stays_with_its_reason():
    model = stack(3)
    model[1].weight = nn.Parameter(torch.randn(64, 64).as_subclass(Wrapped))
    anatomy = dissect(model, small_bytes=1)
    assert [unit.name for unit in anatomy.units] == ["0", "2"]
    assert "Wrapped" in anatomy.reasons["1.weight"]


class Counted(nn.Module):
    """A block with a cache that its forward changes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("cache", torch.zeros(64, 64))

    def forward(self, x):
        self.cache += 1
        return self.linear(x)


def test_buffers_stay_since_a_forward_may_change_them():
    anatomy = dissect(nn.Sequential(Counted(), Counted()), small_bytes=1)
    assert anatomy.reasons["0.cache"] == "a buffer"
    assert [p.name for p in anatomy.units[0].places] == ["0.linear.weight", "0.linear.bias"]


def test_one_block_in_many_places_stays_and_so_do_alberts_groups():
    block = nn.Linear(64, 64)
    anatomy = dissect(nn.ModuleDict({"layers": nn.ModuleList([block] * 6)}), small_bytes=1)
    assert not anatomy.units and "6 places" in anatomy.reasons["layers.0.weight"]
    twice = nn.Linear(64, 64)
    anatomy = dissect(nn.Sequential(twice, nn.Linear(64, 64), twice, nn.Linear(64, 64)), small_bytes=1)
    assert [unit.name for unit in anatomy.units] == ["1", "3"]
    for groups in (1, 3):
        sizes = {"hidden_size": 64, "embedding_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
        model = tiny(("Albert", "AlbertModel"), **sizes, num_hidden_layers=12, num_hidden_groups=groups)
        anatomy = dissect(model)
        assert not [unit for unit in anatomy.units if "albert_layer" in unit.name]
        key = next(name for name in anatomy.reasons if "albert_layer" in name)
        assert ("again and again" if groups == 3 else "one block") in anatomy.reasons[key]
        check_whole(model, anatomy)


class Shared(nn.Module):
    """Blocks that all use one more module, as Zamba's do."""

    def __init__(self):
        super().__init__()
        common = nn.Linear(64, 64, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(64, 64, bias=False), "common": common}) for _ in range(3))


def test_a_module_that_several_blocks_share_stays():
    shared = Shared()
    for layer in shared.layers:  # a container has no forward; a block has one
        layer.__class__ = type("Layer", (nn.ModuleDict,), {"forward": lambda self, x: x})
    anatomy = dissect(shared, small_bytes=1)
    assert [p.name for unit in anatomy.units for p in unit.places] == [f"layers.{i}.own.weight" for i in range(3)]
    assert list(anatomy.fixed) == ["layers.0.common.weight"]


def test_a_part_of_a_block_that_is_called_from_outside_stays_and_a_second_name_of_a_block_is_only_that():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)) for _ in range(3))
            self.first = self.layers[0]
            self.last_half = self.layers[2][1]

    model = Alias()
    anatomy = dissect(model)
    check_whole(model, anatomy)
    assert [[p.name for p in unit.places] for unit in anatomy.units] == [
        ["layers.0.0.weight", "layers.0.1.weight"],
        ["layers.1.0.weight", "layers.1.1.weight"],
        ["layers.2.0.weight"],
    ]
    assert anatomy.reasons == {"layers.2.1.weight": "tied to last_half.weight"}


def test_a_module_without_lists_moves_its_larger_children():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
            self.three = nn.Linear(64, 64)
            self.own = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return nn.functional.linear(self.two(self.one(x)), self.three.weight)

    anatomy = dissect(Plain())
    assert [unit.name for unit in anatomy.units] == ["one", "two"]
    assert anatomy.reasons["own"] == "outside every block" and anatomy.reasons["three.weight"] == "read by Plain itself"


def test_lists_side_by_side_are_one_ring_and_an_encoder_and_a_decoder_are_two():
    class Flux(nn.Module):
        def __init__(self, one, other):
            super().__init__()
            self.add_module(one, nn.ModuleList(nn.Linear(64, 64) for _ in range(2)))
            self.add_module(other, nn.ModuleList(nn.Linear(64, 32) for _ in range(3)))

    assert {ring: len(names) for ring, names in rings(dissect(Flux("pairs", "singles"))).items()} == {"pairs+singles": 5}
    assert list(rings(dissect(Flux("encoder_layers", "decoder_layers")))) == ["encoder_layers", "decoder_layers"]


def test_experts_are_not_a_ring_since_a_router_calls_them():
    class Layer(nn.Module):
        def __init__(self, num):
            super().__init__()
            self.gate = nn.Linear(64, num)
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(num))

        def forward(self, x):
            return self.experts[0](x)

    model = nn.Sequential(Layer(1), Layer(1), Layer(8), Layer(8))
    assert [unit.name for unit in dissect(model).units] == ["0", "1", "2", "3"]


def test_a_single_layer_has_nothing_to_move():
    anatomy = dissect(nn.Linear(64, 64))
    assert not anatomy.units and set(anatomy.fixed) == {"weight", "bias"}


def test_what_is_small_stays_at_a_mebibyte_or_in_proportion():
    with torch.device("meta"):
        large = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(4)))
    assert {p.name for unit in dissect(large).units for p in unit.places} == {f"{i}.weight" for i in range(4)}
    assert set(dissect(large).fixed) == {f"{i}.bias" for i in range(4)} and not dissect(large).reasons
    assert len(dissect(stack(4, 8)).units) == 4


@pytest.mark.parametrize(("arguments", "error"), [({"granularity": "layer"}, UsageError), ({"embed": "disk"}, UsageError)])
def test_unknown_words_are_refused(arguments, error):
    with pytest.raises(error):
        dissect(stack(2), **arguments)


def test_lazy_and_scripted_modules_are_refused_with_what_to_do():
    with pytest.raises(BadInput, match="lazy"):
        dissect(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)))
    scripted = torch.jit.script(stack(2))
    with pytest.raises(Unsupported, match="TorchScript"):
        dissect(scripted)


def test_dissecting_reads_nothing_and_holds_on_to_nothing():
    model = stack(3)
    before = [p.data_ptr() for p in model.parameters()]
    anatomy = dissect(model)
    assert [p.data_ptr() for p in model.parameters()] == before
    del model
    gc.collect()
    assert anatomy == dissect(stack(3)), "the same model, the same anatomy"


def test_a_model_of_many_layers_and_experts_is_dissected_in_a_second():
    import time

    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(*(nn.Linear(64, 64) for _ in range(20))) for _ in range(100)))
    began = time.perf_counter()
    anatomy = dissect(model)
    assert len(anatomy.units) == 100 and len(anatomy.units[0].places) == 20, "small as they are, they are all the block has"
    assert time.perf_counter() - began < 2
