"""Four-bit linear layers against fp64 of the very weights they hold: the kernel's layout bit by bit, groups, what is left out, ties, and that they export, compile, copy and save."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpuopt.converters import apply, int4, quantised, weights
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import Precision, TensorSpec, Transforms
from gpuopt.programs import artifact, packing
from gpuopt.programs.weigh import Weigh, tally_for

W4 = Precision.W4
SIZES = [(16, 256), (24, 192), (8, 96)]
"""[out, in] of groups of 128, 64 and 32."""


def layer(num_out: int = 48, num_in: int = 256, *, bias: bool = True) -> tuple[int4.Int4WeightLinear, nn.Linear]:
    """(packed, the original)"""
    torch.manual_seed(1)
    source = nn.Linear(num_in, num_out, bias=bias)
    own_bias = nn.Parameter(source.bias.detach().bfloat16()) if bias else None
    return int4.Int4WeightLinear(source.weight.detach(), own_bias, torch.bfloat16), source


def net(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).eval()


def snr_db(reference: Tensor, found: Tensor) -> float:
    wanted, got = reference.detach().cpu().double(), found.detach().cpu().double()
    return float(10 * torch.log10(wanted.square().mean() / (got - wanted).square().mean()))


def run(module: Any, *args: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(*args)
        return out


# --- the stored form


def words_of(values: Tensor, group: int) -> Tensor:
    """`matrix_to_m16n8k16_Bint4_layout` of int4mm.cu, lane by lane, from uint8 pairs with the even column in the high half."""
    num_out, num_in = values.shape
    inner_k_tiles = group // 16
    pairs = (values[:, 0::2].int() << 4 | values[:, 1::2].int()).tolist()
    found = torch.zeros(num_out // 8, num_in // group, 32, inner_k_tiles // 2, dtype=torch.int64)
    for tile in range(num_out // 8):
        for outer in range(num_in // group):
            for lane in range(32):
                for inner in range(0, inner_k_tiles, 2):
                    row = pairs[tile * 8 + lane // 4]
                    base = (outer * inner_k_tiles + inner) * 8
                    v = [row[base + lane % 4 + 4 * i] for i in range(4)]
                    word = (v[3] & 15) << 28 | (v[2] & 15) << 24 | (v[1] & 15) << 20 | (v[0] & 15) << 16
                    word |= (v[3] & 240) << 8 | (v[2] & 240) << 4 | (v[1] & 240) | (v[0] & 240) >> 4
                    found[tile, outer, lane, inner // 2] = word
    return found.to(torch.int32)


@pytest.mark.parametrize("size", SIZES)
def test_weights_lie_as_the_kernel_reads_them_and_come_back(size: tuple[int, int]) -> None:
    group = int4.group_of(size[1])
    assert group is not None
    values = torch.randint(0, 16, size, dtype=torch.uint8)
    found = int4.packed(values, group)
    assert torch.equal(found, words_of(values, group)) and found.is_contiguous()
    assert found.numel() * found.element_size() == values.numel() / 2
    assert torch.equal(int4.unpacked(found).to(torch.uint8), values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=2, max_size=32))
def test_every_weight_comes_back_within_its_groups_step(values: list[float]) -> None:
    row = torch.tensor(values, dtype=torch.float32).repeat(8, 32)[:, :32]
    made = int4.Int4WeightLinear(row, None, torch.bfloat16)
    back, wanted = made.weight.double(), row.double()
    assert bool(torch.isfinite(back).all())
    step = float(made.scale[0, 0, 0])
    # Half a step; the scale in bf16 may fall short of the range by 15 * 2^-9 of a step, and the zero and the result are rounded to bf16.
    room = 0.54 * step + 2.0**-8 * float(wanted.abs().max()) + 2.0**-8 * 8 * step
    assert float((back - wanted).abs().max()) <= room


@pytest.mark.parametrize(("num_in", "group", "least_db"), [(512, 128, 19.5), (192, 64, 20.3), (96, 32, 21.5)])
def test_normal_weights_keep_twenty_decibels_and_smaller_groups_keep_more(num_in: int, group: int, least_db: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, num_in)
    made = int4.Int4WeightLinear(weight, None, torch.bfloat16)
    assert made.group == group and least_db < snr_db(weight, made.weight) < least_db + 1.5


def test_groups_do_not_see_each_other_and_equal_weights_come_back_exactly() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 256)
    loud = weight.clone()
    loud[:, 128:] *= 1e20
    quiet, disturbed = (int4.Int4WeightLinear(w, None, torch.bfloat16).weight for w in (weight, loud))
    assert torch.equal(quiet[:, :128], disturbed[:, :128])
    for value in (0.0, 0.75, -3.0):
        assert bool((int4.Int4WeightLinear(torch.full((8, 64), value), None, torch.bfloat16).weight == value).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_group_that_is_no_number_never_becomes_one(bad: float) -> None:
    weight = torch.randn(8, 256)
    weight[3, 5] = bad
    found = int4.Int4WeightLinear(weight, None, torch.bfloat16).weight
    assert not bool(torch.isfinite(found[3, :128]).any())
    assert bool(torch.isfinite(found[3, 128:]).all()) and bool(torch.isfinite(found[[0, 1, 2, 4, 5, 6, 7]]).all())


# --- one layer


@pytest.mark.parametrize("size", [(48, 256), *SIZES])
def test_a_layer_is_the_product_of_the_weights_it_holds(size: tuple[int, int]) -> None:
    made, _ = layer(*size)
    x = torch.randn(5, 7, size[1]).bfloat16()
    exact = x.double() @ made.weight.double().t() + made.bias.double()
    found = run(made, x)
    assert found.dtype == torch.bfloat16 and found.shape == (5, 7, size[0])
    assert bool(((found.double() - exact).abs() <= 2.0**-8 * exact.abs() * 1.1 + 1e-5).all())


def test_a_layer_is_as_near_to_the_original_as_four_bits_allow() -> None:
    made, source = layer(256, 512)
    x = torch.randn(64, 512)
    reference = run(source.double(), x.bfloat16().double())
    assert 20 <= snr_db(reference, run(made, x.bfloat16())) <= 26


def test_a_vector_and_no_rows_at_all_keep_their_shape() -> None:
    made, _ = layer()
    assert run(made, torch.randn(256).bfloat16()).shape == (48,)
    assert run(made, torch.randn(2, 0, 256).bfloat16()).shape == (2, 0, 48)
    assert "in_features=256, out_features=48, bias=True, group=128" in repr(made)


def test_what_the_kernel_is_given_is_what_it_asks_for_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's branch with a kernel of the same meaning; its own checks are those of int4mm.cu, and what it does not check is checked here."""
    calls: list[int] = []

    def kernel(x: Tensor, words: Tensor, group: int, scale: Tensor) -> Tensor:
        k = x.shape[1]
        assert x.dtype == scale.dtype == torch.bfloat16 and words.dtype == torch.int32
        assert x.is_contiguous() and words.is_contiguous() and scale.is_contiguous() and x.dim() == 2 and x.shape[0] > 0
        assert words.shape == (scale.shape[1] // 8, k // group, 32, group // 32) and scale.shape == (k // group, words.shape[0] * 8, 2)
        calls.append(x.shape[0])
        values = int4.unpacked(words).double() - 8
        wide = values * scale[..., 0].t().double().repeat_interleave(group, 1) + scale[..., 1].t().double().repeat_interleave(group, 1)
        return (x.double() @ wide.bfloat16().double().t()).bfloat16()

    made, _ = layer()
    inputs = [torch.randn(rows, 256).bfloat16() for rows in (1, 16, 17, int4.KERNEL_ROWS)]
    plain = [run(made, x) for x in inputs]
    monkeypatch.setattr(int4, "KERNEL_DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", kernel)
    assert all(snr_db(a, run(made, x)) > 45 for a, x in zip(plain, inputs, strict=True))
    assert calls == [1, 16, 17, int4.KERNEL_ROWS]
    run(made, torch.randn(int4.KERNEL_ROWS + 1, 256).bfloat16())
    run(made, torch.randn(0, 256).bfloat16())
    assert len(calls) == 4, "many rows, and none, take the wide way"
    run(copy.deepcopy(made).half(), torch.randn(256, 3).t())
    assert calls[-1] == 3, "scales and inputs come in bf16 whatever somebody made of them"


def test_the_kernel_exports_with_a_free_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "KERNEL_DEVICES", frozenset({"cpu"}))
    made, _ = layer()
    dims = ({0: torch.export.Dim("N", min=1, max=1024)},)
    program = torch.export.export(made, (torch.randn(8, 256).bfloat16(),), dynamic_shapes=dims)
    assert [str(n.target) for n in program.graph.nodes if "int4" in str(n.target)] == ["aten._weight_int4pack_mm.default"]


# --- a model


def test_sizes_the_kernel_does_not_take_stay_with_their_reasons() -> None:
    module = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 100), nn.Linear(100, 128), nn.Linear(128, 24), nn.Linear(64, 40))
    notes = quantised.quantise(module, W4)
    assert [type(part).__name__ for part in module] == ["Int4WeightLinear", "Linear", "Linear", "Linear", "Int4WeightLinear"]
    assert "left in bfloat16: 1, 2 (sizes that are no multiples of 8 out and 32 in)" in notes
    assert "left in bfloat16: 3 (narrower than 32)" in notes
    assert "2 linear layers with weights alone in int4, one scale and zero a group of 128 (in 1 of 64); bfloat16 between them" in notes


def test_too_little_to_pack_is_refused_with_a_fix() -> None:
    with pytest.raises(Unsupported, match="w4 is made for linear layers") as caught:
        quantised.quantise(nn.Sequential(nn.Linear(100, 100)), W4)
    assert "no multiples of 8 out and 32 in" in str(caught.value.message) and caught.value.fix == "--precision bf16"


def test_ties_hold_and_a_head_tied_to_its_embedding_stays() -> None:
    module = nn.Module()
    module.embed, module.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
    module.head.weight = module.embed.weight
    module.a, module.b = nn.Linear(128, 64), nn.Linear(128, 64)
    module.b.weight = module.a.weight
    module.again = module.a
    notes = quantised.quantise(module, W4)
    assert "left in bfloat16: head (tied to embed)" in notes and module.head.weight is module.embed.weight
    assert module.a.weight_q is module.b.weight_q and module.a.scale is module.b.scale and module.again is module.a
    twin = copy.deepcopy(module)
    assert twin.a.weight_q is twin.b.weight_q and twin.a.weight_q is not module.a.weight_q


def test_modules_kept_in_fp32_keep_their_layers() -> None:
    module = net()
    quantised.quantise(module, W4, ("3",))
    assert type(module[3]) is nn.Linear and module[3].weight.dtype == torch.float32 and isinstance(module[1], int4.Int4WeightLinear)
    assert run(module, torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="no module is called"):
        quantised.quantise(net(), W4, ("nowhere",))


def test_a_model_without_weights_takes_the_same_form() -> None:
    with torch.device("meta"):
        module = net()
    quantised.quantise(module, W4)
    assert module[1].weight_q.is_meta and module[1].weight_q.shape == (32, 1, 32, 2) and module[1].weight.shape == (256, 64)


def test_parameters_are_counted_as_the_author_counts_them() -> None:
    from gpuopt.profiling import count

    module, before = net(), packing.num_weights(net())
    quantised.quantise(module, W4)
    assert packing.num_weights(module) == before == sum(p.numel() for p in net().parameters())
    assert count.count(module, Inputs(args=(torch.randn(2, 64).bfloat16(),))).num_parameters == before


def test_bytes_are_half_a_weight_and_its_groups_and_flops_those_of_bf16() -> None:
    from gpuopt.profiling import bounds, count

    module = net(128)
    num = 2 * 128 * 512
    quantised.quantise(module, W4)
    counted = count.count(module, Inputs(args=(torch.randn(6, 128).bfloat16(),)))
    outside = bounds.external(module, Inputs(), None, counted)
    others = sum(p.numel() for p in module.parameters() if p.dim() == 1)
    assert outside.by_dtype == {"int32": num / 2, "bfloat16": 4 * num / 128 + 2 * others}
    assert counted.coverage == 1.0 and counted.method == "aten dispatch, fake tensors"
    assert counted.flops_by_dtype == {"bfloat16": 2.0 * 6 * num}


def test_a_decode_step_reads_half_a_byte_a_weight() -> None:
    from gpuopt.generation import reading

    module = net(128)
    num = 2 * 128 * 512
    quantised.quantise(module, W4)
    x = torch.randn(1, 128).bfloat16()
    size, flops = reading.read(module, lambda: module(x))
    assert size == num / 2 + 4 * num / 128 + 2 * sum(p.numel() for p in module.parameters() if p.dim() == 1)
    assert flops == 2.0 * num


def test_a_live_audit_sees_the_four_bits_and_names_what_is_wider() -> None:
    module = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 100), nn.GELU())
    quantised.quantise(module, W4)
    with torch.no_grad(), Weigh(tally_for("cpu")) as weigh:
        module(torch.randn(3, 128).bfloat16())
    audit = weigh.tally.audit("w4", "test")
    assert audit.honoured and audit.reason.startswith(f"{128 / 228:.2%} of the weights that products read are stored in int4")
    assert set(audit.shares) == {"bfloat16"} and len(audit.exceptions) == 1
    assert not weigh.tally.audit("w8", "test").honoured


# --- through the converter


def model_and_inputs(make: Any, module: nn.Module) -> tuple[Any, Inputs]:
    spec = TensorSpec.parse("x:float32[N,64]")
    torch.manual_seed(3)
    return make(module, signature=(spec,)), Inputs(args=(torch.randn(4, 64),), specs=(spec,), dims={"N": 4})


def test_the_converter_hands_on_a_copy_and_refuses_fixed_graphs(make: Any) -> None:
    module = net()
    model, inputs = model_and_inputs(make, module)
    changed = apply(model, W4, Transforms(), inputs)
    assert (
        changed.dtype == "bfloat16" and str(changed.signature[0]) == "x:bfloat16[N,64]" and changed.num_parameters == model.num_parameters
    )
    assert type(module[1]) is nn.Linear and module[1].weight.dtype == torch.float32
    for form in ("exported", "torchscript", "onnx"):
        with pytest.raises(Unsupported, match="w4 replaces layers"):
            apply(replace(model, form=form), W4, Transforms())


def test_it_exports_with_a_free_batch_is_saved_and_gives_the_same_bits_again(make: Any, tmp_path: Path) -> None:
    model, inputs = model_and_inputs(make, net())
    changed = apply(model, W4, Transforms(), inputs)
    files = artifact.save(changed.module, inputs.map(lambda t: t.bfloat16()), {"N": (1, 8)}, tmp_path)
    again, _ = artifact.load(tmp_path, files, {"signed_by_us": True})
    for size in (1, 5):
        x = torch.randn(size, 64).bfloat16()
        assert torch.equal(run(again, x), run(changed.module, x))


def test_it_is_copied_saved_and_loaded_by_state_dict_and_as_safetensors(make: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, inputs = model_and_inputs(make, net())
    changed = apply(model, W4, Transforms(), inputs)
    x = torch.randn(3, 64).bfloat16()
    other = apply(make(nn.Sequential(*(copy.deepcopy(part) for part in net())).apply(_zero)), W4, Transforms(), inputs).module
    torch.save(changed.module.state_dict(), tmp_path / "w.pt")
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(run(other, x), run(changed.module, x)) and torch.equal(run(copy.deepcopy(other), x), run(other, x))
    found = load_file(weights.save(changed, tmp_path / "w.safetensors"))
    assert found["1.weight_q"].dtype == torch.int32 and found["1.scale"].shape == (1, 256, 2) and found["1.scale"].dtype == torch.bfloat16


def _zero(part: nn.Module) -> None:
    for parameter in part.parameters(recurse=False):
        nn.init.zeros_(parameter)


def test_it_compiles_into_one_graph_that_reads_four_bits(make: Any) -> None:
    from gpuopt.backends import inductor

    model, inputs = model_and_inputs(make, nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)).eval())
    changed = apply(model, W4, Transforms(), inputs)
    runner = inductor.build(changed, inputs.map(lambda t: t.bfloat16()), {"precision": "w4", "fullgraph": True})
    audit = runner.audit()
    assert audit is not None and audit.honoured and audit.reason.startswith("100.00% of "), audit
    x = inputs.args[0].bfloat16()
    assert snr_db(run(changed.module, x), runner(x)) > 35
    runner.close()


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_weights_lie_as_its_own_packing_lays_them(size: tuple[int, int]) -> None:
    group = int4.group_of(size[1])
    assert group is not None
    values = torch.randint(0, 16, size, dtype=torch.uint8)
    pairs = (values[:, 0::2] << 4 | values[:, 1::2]).contiguous().cuda()
    assert torch.equal(torch.ops.aten._convert_weight_to_int4pack(pairs, group // 16).cpu(), int4.packed(values, group))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 256])
@pytest.mark.parametrize("size", [(128, 512), (40, 192), (64, 96)])
def test_on_a_gpu_the_kernel_gives_what_the_cpu_gives_within_rounding(
    size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = layer(*size)
    x = torch.randn(rows, size[1]).bfloat16()
    here = run(made, x)
    moved = copy.deepcopy(made).cuda()
    for limit in (0, 1024):  # widened first, and as they lie
        monkeypatch.setattr(int4, "KERNEL_ROWS", limit)
        there = run(moved, x.cuda())
        assert there.dtype == torch.bfloat16 and snr_db(here, there) > 45
    assert torch.equal(moved.weight.cpu(), made.weight)


@pytest.mark.gpu
def test_on_a_gpu_it_compiles_and_exports_on_both_sides_of_the_limit(make: Any, tmp_path: Path) -> None:
    torch._dynamo.reset()  # the tests above compiled nn.Sequential.forward too, and one function may be compiled eight times in a process
    model, inputs = model_and_inputs(make, nn.Sequential(nn.Linear(64, 64)).eval())
    module = apply(model, W4, Transforms(), inputs).module.cuda()
    files = artifact.save(module, inputs.map(lambda t: t.bfloat16().cuda()), {"N": (1, 512)}, tmp_path)
    again, _ = artifact.load(tmp_path, files, {"signed_by_us": True})
    compiled = torch.compile(module, fullgraph=True)
    for size in (1, 16, 17, 256):
        x = torch.randn(size, 64, device="cuda").bfloat16()
        assert snr_db(run(module, x), run(again, x)) > 45 and snr_db(run(module, x), run(compiled, x)) > 40
