"""Eight-bit linear layers against fp64: scales, saturation, rows that are not numbers, ties, what is left out, and that they export, compile, copy and save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpuopt.converters import apply, quantised, weights
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import Precision, TensorSpec, Transforms
from gpuopt.programs import artifact
from gpuopt.programs.weigh import Weigh, tally_for

ALL = (Precision.FP8, Precision.INT8, Precision.W8)
DYNAMIC = (Precision.FP8, Precision.INT8)


class Block(nn.Module):
    """What a transformer's layer is made of: attention with its four products, two more with a GELU between, residuals and norms. [N, S, 64] -> [N, S, 64]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, s, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, d))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def blocks(num: int = 3, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(num)), nn.Linear(width, 32)).eval()


def layer(to: Precision, num_in: int = 64, num_out: int = 48, *, by_row: bool = True, bias: bool = True) -> tuple[Any, nn.Linear]:
    """(quantised, the original)"""
    torch.manual_seed(1)
    source = nn.Linear(num_in, num_out, bias=bias)
    own_bias = nn.Parameter(source.bias.detach().bfloat16()) if bias else None
    return quantised.LAYERS[to](source.weight.detach(), own_bias, torch.bfloat16, by_row=by_row), source


def snr_db(reference: Tensor, found: Tensor) -> float:
    wanted, got = reference.detach().cpu().double(), found.detach().cpu().double()
    return float(10 * torch.log10(wanted.square().mean() / (got - wanted).square().mean()))


def run(module: Any, *args: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(*args)
        return out


# --- one layer


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("to", ALL)
def test_a_layer_is_the_product_of_what_was_quantised(to: Precision, by_row: bool) -> None:
    """Against fp64 of the very values it multiplies: what is left is one rounding to bf16."""
    made, _ = layer(to, by_row=by_row)
    x = torch.randn(5, 7, 64).bfloat16()
    wide = x.double()
    if to is not Precision.W8:
        scale = quantised.scales(x.reshape(-1, 64), made.limit, by_row=by_row)
        q = quantised.quantised(x.reshape(-1, 64), scale, made.dtype)
        wide = (q.double() * scale.double()).reshape(5, 7, 64)
    exact = wide @ (made.weight_q.double() * made.scale.double()).t() + made.bias.double()
    found = run(made, x)
    assert found.dtype == torch.bfloat16 and found.shape == (5, 7, 48)
    # w8 rounds twice: the product leaves its kernel in bf16, before the scale.
    room = 2.0**-8 * exact.abs() * (1.1 if to is not Precision.W8 else 2.1) + 1e-2 * (to is Precision.W8) + 1e-5
    assert bool(((found.double() - exact).abs() <= room).all())


@pytest.mark.parametrize(("to", "least_db"), [(Precision.FP8, 27.0), (Precision.INT8, 38.0), (Precision.W8, 40.0)])
def test_a_layer_is_as_near_to_the_original_as_its_format_allows(to: Precision, least_db: float) -> None:
    made, source = layer(to, 512, 256)
    x = torch.randn(64, 512)
    reference = run(source.double(), x.bfloat16().double())
    found = snr_db(reference, run(made, x.bfloat16()))
    assert least_db <= found <= least_db + 8


@pytest.mark.parametrize("to", ALL)
def test_a_vector_and_no_rows_at_all_keep_their_shape(to: Precision) -> None:
    made, _ = layer(to)
    assert run(made, torch.randn(64).bfloat16()).shape == (48,)
    assert run(made, torch.randn(2, 0, 64).bfloat16()).shape == (2, 0, 48)


@pytest.mark.parametrize("to", DYNAMIC)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=4, max_size=16))
def test_every_element_of_a_row_comes_back_within_its_formats_rounding(to: Precision, values: list[float]) -> None:
    row = torch.tensor([values], dtype=torch.float32)
    kind = quantised.LAYERS[to]
    scale = quantised.scales(row, kind.limit)
    q = quantised.quantised(row, scale, kind.dtype)
    assert scale.shape == (1, 1) and scale.dtype == torch.float32 and bool(torch.isfinite(scale).all()) and float(scale) > 0
    back = q.double() * scale.double()
    assert bool(torch.isfinite(back).all())
    error = (back - row.double()).abs()
    if to is Precision.INT8:
        assert bool((error <= 0.5001 * scale.double()).all())
    else:  # 4 significant bits; below 2^-6 steps of 2^-9, so half of that
        assert bool((error <= torch.maximum(row.double().abs() * 2.0**-4, scale.double() * 2.0**-10) * 1.0001).all())


@pytest.mark.parametrize("to", DYNAMIC)
@settings(max_examples=40, deadline=None)
@given(st.integers(-60, 60), st.integers(0, 1000))
def test_a_row_times_a_power_of_two_changes_its_scale_alone(to: Precision, power: int, seed: int) -> None:
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    kind = quantised.LAYERS[to]
    before, after = (quantised.scales(r, kind.limit) for r in (row, row * 2.0**power))
    assert torch.equal(after, before * 2.0**power)
    assert torch.equal(
        quantised.quantised(row, before, kind.dtype).float(), quantised.quantised(row * 2.0**power, after, kind.dtype).float()
    )


@pytest.mark.parametrize("to", ALL)
def test_rows_do_not_see_each_other(to: Precision) -> None:
    made, _ = layer(to)
    x = torch.randn(6, 64).bfloat16()
    loud = x.clone()
    loud[3] *= 1e30
    quiet, disturbed = run(made, x), run(made, loud)
    rest = [0, 1, 2, 4, 5]
    assert torch.equal(quiet[rest], disturbed[rest])


@pytest.mark.parametrize("to", ALL)
def test_zero_rows_give_the_bias_and_zero_weights_nothing_else(to: Precision) -> None:
    made, _ = layer(to)
    x = torch.randn(3, 64).bfloat16()
    x[1] = 0
    assert torch.equal(run(made, x)[1], made.bias)
    empty = quantised.LAYERS[to](torch.zeros(48, 64), None, torch.bfloat16)
    assert torch.equal(run(empty, x), torch.zeros(3, 48, dtype=torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("to", DYNAMIC)
def test_a_row_that_is_no_number_never_becomes_one(to: Precision, bad: float) -> None:
    made, _ = layer(to)
    x = torch.randn(4, 64).bfloat16()
    x[2, 5] = bad
    found = run(made, x)
    assert not bool(torch.isfinite(found[2]).any())
    assert bool(torch.isfinite(found[[0, 1, 3]]).all())


@pytest.mark.parametrize("to", DYNAMIC)
def test_the_largest_activations_of_bf16_do_not_overflow(to: Precision) -> None:
    made, source = layer(to, bias=False)
    largest = torch.finfo(torch.bfloat16).max
    x = torch.zeros(2, 64).bfloat16()
    x[0, 0], x[0, 1], x[1] = largest, -largest, largest / 64
    reference = x.double() @ source.weight.double().t()
    found = run(made, x)
    assert bool(torch.isfinite(found[reference.abs() < largest * 0.9]).all())
    assert snr_db(reference[0] / largest, found[0].double() / largest) > 20
    # The row's own maximum is the limit, neither NaN past it nor less.
    q = quantised.quantised(x, quantised.scales(x, made.limit), made.dtype)
    assert bool((q.float().abs().amax(-1) == made.limit).all()) and bool(
        (q[0, :2].float() == torch.tensor([made.limit, -made.limit])).all()
    )


def test_weights_come_back_dequantised_for_code_that_reads_them_past_the_layer() -> None:
    for to in ALL:
        made, source = layer(to)
        assert made.weight.dtype == torch.bfloat16 and made.weight.shape == (48, 64)
        assert snr_db(source.weight.detach(), made.weight) > 25
        assert "in_features=64, out_features=48" in repr(made)


def test_int8_pads_few_rows_for_a_gpu_and_no_more_than_it_must() -> None:
    assert [quantised._missing(n, 17) for n in (1, 16, 17, 400)] == [16, 1, 0, 0]
    assert quantised._missing(1, 0) == 0


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_int8_pads_in_an_exported_graph_on_both_sides_of_the_limit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = layer(Precision.INT8)
    x = torch.randn(rows, 64).bfloat16()
    plain = run(made, x)
    monkeypatch.setitem(quantised.SMALLEST_INT_MM, "cpu", 17)
    assert torch.equal(run(made, x), plain)
    sizes: list[int] = []
    program = torch.export.export(made, (torch.randn(8, 64).bfloat16(),), dynamic_shapes=({0: torch.export.Dim("N", min=1, max=64)},))

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func) == "aten._int_mm.default":
                sizes.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        again = run(program.module(), x)
    assert torch.equal(again, plain) and sizes == [max(rows, 17)]


# --- a model


@pytest.mark.parametrize(("to", "least_db"), [(Precision.FP8, 22.0), (Precision.INT8, 30.0), (Precision.W8, 32.0)])
def test_a_small_transformer_keeps_its_signal(to: Precision, least_db: float) -> None:
    module = blocks()
    x = torch.randn(2, 16, 64)
    reference = run(copy.deepcopy(module).double(), x.double())
    twin = copy.deepcopy(module)
    notes = quantised.quantise(twin, to)
    assert least_db <= snr_db(reference, run(twin, x.bfloat16())) <= least_db + 12
    assert any(note.startswith("13 linear layers") for note in notes), notes
    kinds = [type(part) for part in twin.modules() if isinstance(part, (nn.Linear, quantised.EightBitLinear))]
    assert kinds == [quantised.LAYERS[to]] * 13


@pytest.mark.parametrize("to", ALL)
def test_weights_are_quantised_from_what_they_were_and_scales_stay_in_fp32(to: Precision) -> None:
    module = blocks(1)
    twin = copy.deepcopy(module)
    quantised.quantise(twin, to)
    made, source = twin[0].up, module[0].up
    scale = quantised.scales(source.weight.detach(), made.limit)
    assert made.scale.dtype == torch.float32 and torch.equal(made.scale, scale)
    assert torch.equal(made.weight_q.float(), quantised.quantised(source.weight.detach(), scale, made.dtype).float())
    assert made.weight_q.element_size() == 1 and not made.weight_q.requires_grad
    assert made.bias.dtype == twin[0].norm1.weight.dtype == torch.bfloat16
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in module.parameters())


class Language(nn.Module):
    """An embedding tied to the head, as GPT-2 and BERT tie theirs."""

    def __init__(self, *, same_parameter: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight if same_parameter else nn.Parameter(self.embed.weight.detach())

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(ids)))
        return out


@pytest.mark.parametrize("same_parameter", [True, False])
def test_a_head_tied_to_its_embedding_stays_tied_and_is_named(same_parameter: bool) -> None:
    module = Language(same_parameter=same_parameter)
    notes = quantised.quantise(module, Precision.FP8)
    assert type(module.head) is nn.Linear and module.head.weight.data_ptr() == module.embed.weight.data_ptr()
    assert module.head.weight.dtype == torch.bfloat16
    assert "left in bfloat16: head (tied to embed)" in notes
    assert run(module, torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_two_linear_layers_of_one_weight_share_what_was_made_of_it_and_so_does_a_layer_with_two_names() -> None:
    module = nn.Module()
    module.a, module.b = nn.Linear(64, 64), nn.Linear(64, 64)
    module.b.weight = module.a.weight
    module.again = module.a
    quantised.quantise(module, Precision.INT8)
    assert module.a.weight_q is module.b.weight_q and module.again is module.a
    assert not torch.equal(module.a.bias, module.b.bias)
    twin = copy.deepcopy(module)
    assert twin.a.weight_q is twin.b.weight_q and twin.a.weight_q is not module.a.weight_q


def test_what_a_layer_does_not_fit_is_told_by_reason() -> None:
    class Own(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 40), nn.Linear(40, 8), Own(8, 64), nn.Linear(64, 64))
    module[4].register_forward_hook(lambda *_: None)
    notes = quantised.quantise(module, Precision.FP8)
    assert "left in bfloat16: 1 (sizes that are no multiples of 16)" in notes
    assert "left in bfloat16: 2 (narrower than 32)" in notes
    assert "left in bfloat16: 3 (a Own, not a plain linear layer)" in notes
    assert "left in bfloat16: 4 (with hooks of its own)" in notes
    assert [type(part).__name__ for part in module] == ["Fp8Linear", "Linear", "Linear", "Own", "Linear"]
    # int8 takes steps of eight, weights alone any.
    for to, changed in ((Precision.INT8, 40), (Precision.W8, 41)):
        other = nn.Sequential(nn.Linear(64, changed))
        quantised.quantise(other, to)
        assert isinstance(other[0], quantised.LAYERS[to])


def test_int8_sums_that_could_leave_int32_are_not_made() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(quantised.LARGEST_INT8_SUM // 8 * 8, 64), nn.Linear(quantised.LARGEST_INT8_SUM // 8 * 8 + 8, 32))
    notes = quantised.quantise(module, Precision.INT8)
    assert [type(part).__name__ for part in module] == ["Int8Linear", "Linear"] and any("int32" in note for note in notes)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Sequential(nn.Conv2d(16, 256, 3), nn.Linear(32, 32)), "1 Conv2d"),
        (nn.Sequential(nn.Linear(30, 30)), "narrower than 32"),
        (nn.Sequential(nn.LSTM(64, 64)), "1 LSTM"),
        (nn.Sequential(nn.LayerNorm(8)), "nothing would stay"),
    ],
)
def test_a_model_with_too_little_to_quantise_is_refused_with_the_reason(module: nn.Module, named: str) -> None:
    with pytest.raises(Unsupported, match="linear layers") as caught:
        quantised.quantise(module, Precision.FP8)
    assert named in str(caught.value.message) and caught.value.fix == "--precision bf16"


def test_modules_kept_in_fp32_keep_their_layers_and_get_fp32() -> None:
    module = blocks(2)
    quantised.quantise(module, Precision.FP8, ("1",))
    assert type(module[1].up) is nn.Linear and module[1].up.weight.dtype == torch.float32
    assert isinstance(module[0].up, quantised.Fp8Linear) and isinstance(module[2], quantised.Fp8Linear)
    assert run(module, torch.randn(1, 4, 64).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="no module is called"):
        quantised.quantise(blocks(1), Precision.FP8, ("nowhere",))


def test_a_gpt2_s_conv1d_is_a_linear_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    source = Conv1D(96, 64)
    module = nn.Sequential(copy.deepcopy(source))
    quantised.quantise(module, Precision.INT8)
    x = torch.randn(3, 5, 64)
    assert module[0].weight_q.shape == (96, 64) and module[0].weight_q.is_contiguous()
    assert snr_db(run(source, x), run(module, x.bfloat16())) > 30


def test_torchs_fused_encoder_layer_does_not_go_round_the_quantised_ones() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 8, 64), torch.tensor([[False] * 8, [False] * 5 + [True] * 3])
    reference = run(copy.deepcopy(encoder).double(), x.double())
    notes = quantised.quantise(encoder, Precision.FP8)
    assert any("NonDynamicallyQuantizableLinear" in note for note in notes)
    with torch.no_grad(), Weigh(tally_for("cpu")) as weigh:
        found = encoder(x.bfloat16())
    assert snr_db(reference, found) > 20
    assert weigh.tally.flops["float8_e4m3fn"] == 2 * 2 * 16 * 2 * 64 * 256
    assert weigh.tally.audit("fp8", "test").honoured
    assert encoder(x.bfloat16(), src_key_padding_mask=mask).shape == x.shape


# --- through the converter


def model_and_inputs(make: Any, module: nn.Module) -> tuple[Any, Inputs]:
    spec = TensorSpec.parse("x:float32[N,S,64]")
    torch.manual_seed(3)
    return make(module, signature=(spec,)), Inputs(args=(torch.randn(2, 16, 64),), specs=(spec,), dims={"N": 2, "S": 16})


@pytest.mark.parametrize("to", ALL)
def test_the_converter_hands_on_a_copy_in_the_carrier_and_names_what_it_did(to: Precision, make: Any) -> None:
    module = blocks(1)
    model, inputs = model_and_inputs(make, module)
    changed = apply(model, to, Transforms(), inputs)
    assert changed.dtype == "bfloat16" and str(changed.signature[0]) == "x:bfloat16[N,S,64]"
    assert all(type(part) is not quantised.LAYERS[to] for part in module.modules()) and module[0].up.weight.dtype == torch.float32
    assert any("linear layers" in note for note in changed.notes)


def test_a_model_in_fp16_is_told_that_its_carrier_is_bf16(make: Any) -> None:
    model, inputs = model_and_inputs(make, blocks(1).half())
    assert any("came in float16" in note for note in apply(model, Precision.FP8, Transforms(), inputs).notes)
    model, inputs = model_and_inputs(make, blocks(1))
    assert not any("came in" in note for note in apply(model, Precision.FP8, Transforms(), inputs).notes)


def test_programs_whose_graph_is_fixed_are_refused(make: Any) -> None:
    from dataclasses import replace

    model, _ = model_and_inputs(make, blocks(1))
    for form, named in (("exported", "an exported program"), ("torchscript", "a TorchScript program"), ("onnx", "an ONNX file")):
        with pytest.raises(Unsupported, match=named):
            apply(replace(model, form=form), Precision.FP8, Transforms())


@pytest.mark.parametrize("to", ALL)
def test_it_exports_with_a_free_batch_is_saved_and_gives_the_same_bits_again(to: Precision, make: Any, tmp_path: Path) -> None:
    model, inputs = model_and_inputs(make, blocks(1))
    changed = apply(model, to, Transforms(), inputs)
    sample = inputs.map(lambda t: t.bfloat16())
    files = artifact.save(changed.module, sample, {"N": (1, 8)}, tmp_path)
    again, _ = artifact.load(tmp_path, files, {"signed_by_us": True})
    for size in (1, 5):
        x = torch.randn(size, 16, 64).bfloat16()
        assert torch.equal(run(again, x), run(changed.module, x))


@pytest.mark.parametrize("to", ALL)
def test_it_compiles_into_one_graph_that_reads_eight_bits(to: Precision, make: Any) -> None:
    model, inputs = model_and_inputs(make, nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)))
    from gpuopt.backends import inductor

    changed = apply(model, to, Transforms(), inputs)
    runner = inductor.build(changed, inputs.map(lambda t: t.bfloat16()), {"precision": to.value, "fullgraph": True})
    audit = runner.audit()
    assert audit is not None and audit.honoured and audit.reason.startswith("100.00% of "), audit
    x = inputs.args[0].bfloat16()
    assert snr_db(run(changed.module, x), runner(x)) > 35
    runner.close()


@pytest.mark.parametrize("to", ALL)
def test_a_live_audit_sees_the_eight_bits(to: Precision) -> None:
    module = Language()
    quantised.quantise(module, to)
    with torch.no_grad(), Weigh(tally_for("cpu")) as weigh:
        module(torch.tensor([[1, 2, 3]]))
    audit = weigh.tally.audit(to.value, "test")
    assert audit.honoured and f"{128 * 128 / (128 * 128 + 96 * 64):.2%}" in audit.reason and len(audit.exceptions) == 1
    assert set(audit.shares) == ({"bfloat16"} if to is Precision.W8 else {to.dtype, "bfloat16"})


@pytest.mark.parametrize("to", ALL)
def test_the_bytes_a_call_must_read_are_one_a_weight(to: Precision) -> None:
    from gpuopt.profiling import bounds, count

    module = blocks(2)
    num = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    quantised.quantise(module, to)
    given = Inputs(args=(torch.randn(2, 16, 64).bfloat16(),))
    counted = count.count(module, given)
    outside = bounds.external(module, Inputs(), None, counted)
    rows = sum(part.out_features for part in module.modules() if isinstance(part, quantised.EightBitLinear))
    assert outside.by_dtype[to.dtype] == num and outside.by_dtype["float32"] == 4 * rows
    assert counted.coverage == 1.0 and counted.method == "aten dispatch, fake tensors"
    products = 2.0 * 32 * num
    assert counted.flops_by_dtype["bfloat16" if to is Precision.W8 else to.dtype] == products + (counted.flops - products) * (
        to is Precision.W8
    )


def test_weights_are_written_with_their_scales(make: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, inputs = model_and_inputs(make, blocks(1))
    changed = apply(model, Precision.FP8, Transforms(), inputs)
    found = load_file(weights.save(changed, tmp_path / "w.safetensors"))
    assert found["0.up.weight_q"].dtype == torch.float8_e4m3fn and found["0.up.scale"].shape == (256, 1)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 256])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("to", ALL)
def test_on_a_gpu_the_kernels_give_what_the_cpu_gives_within_rounding(to: Precision, by_row: bool, rows: int) -> None:
    if to is Precision.FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    made, _ = layer(to, 256, 128, by_row=by_row)
    x = torch.randn(rows, 256).bfloat16()
    here = run(made, x)
    there = run(copy.deepcopy(made).cuda(), x.cuda())
    # int32 sums are exact, fast accumulation keeps 13 bits or so of each sum.
    assert snr_db(here, there) > 45


@pytest.mark.gpu
@pytest.mark.parametrize("to", ALL)
def test_on_a_gpu_it_compiles_and_exports_with_batches_on_both_sides_of_sixteen_rows(to: Precision, make: Any, tmp_path: Path) -> None:
    if to is Precision.FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    spec = TensorSpec.parse("x:float32[N,64]")
    inputs = Inputs(args=(torch.randn(8, 64),), specs=(spec,), dims={"N": 8})
    changed = apply(make(nn.Sequential(nn.Linear(64, 64)), signature=(spec,)), to, Transforms(), inputs)
    module = changed.module.cuda()
    files = artifact.save(module, inputs.map(lambda t: t.bfloat16().cuda()), {"N": (1, 64)}, tmp_path)
    again, _ = artifact.load(tmp_path, files, {"signed_by_us": True})
    compiled = torch.compile(module, fullgraph=True)
    for size in (1, 16, 17, 64):
        x = torch.randn(size, 64, device="cuda").bfloat16()
        assert snr_db(run(module, x), run(again, x)) > 45 and snr_db(run(module, x), run(compiled, x)) > 40
