"""Exported programs: dimensions left open where asked and only there, plain outputs, files that load without the model's code."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from torch import nn

from gpuopt.converters import apply, exported
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Model
from gpuopt.core.spec import Precision, Transforms


def test_an_open_batch_takes_every_size_of_its_range_and_no_other(resnet):
    model, inputs = resnet
    module = exported.export(model, inputs, {"N": (1, 8)}).module()
    for batch in (1, 2, 3, 8):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(module(x)["logits"], model.module(x).logits)
    with pytest.raises(AssertionError):
        module(torch.randn(9, 3, 32, 32))


def test_a_sample_of_batch_one_does_not_fix_the_batch(resnet, inputs):
    model, _ = resnet
    module = exported.export(model, inputs("pixel_values:float32[N,3,32,32]", dims={"N": 1}), {"N": (1, 8)}).module()
    assert module(torch.randn(5, 3, 32, 32))["logits"].shape == (5, 10)


def test_a_sample_below_the_range_is_enlarged_into_it(make, inputs):
    program = exported.export(make(nn.Linear(4, 2)), inputs("x:float32[N,4]", dims={"N": 3}), {"N": (8, 64)})
    assert program.module()(torch.randn(8, 4)).shape == (8, 2)


def test_without_ranges_every_dimension_is_fixed(resnet):
    model, inputs = resnet
    module = exported.export(model, inputs).module()
    with pytest.raises(AssertionError):
        module(torch.randn(3, 3, 32, 32))


def test_inputs_that_share_a_letter_must_agree_and_others_need_not(t5):
    model, inputs = t5
    module = exported.export(model, inputs, {"N": (1, 4), "S": (2, 16), "T": (1, 16)}).module()
    a, b = torch.randint(99, (3, 11)), torch.randint(99, (3, 2))
    torch.testing.assert_close(module(a, decoder_input_ids=b)["logits"], model.module(a, decoder_input_ids=b).logits)
    with pytest.raises((AssertionError, RuntimeError)):
        module(a, decoder_input_ids=b[:2])


def test_a_masked_bert_exports_with_two_open_dimensions(bert, inputs):
    model, _ = bert
    given = inputs("input_ids:int64[N,S]", "attention_mask:int64[N,S]", dims={"N": 1, "S": 7}, high=2)
    module = exported.export(model, given, {"N": (1, 4), "S": (2, 32)}).module()
    ids, mask = torch.randint(99, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    found, wanted = module(ids, attention_mask=mask), model.module(ids, attention_mask=mask)
    torch.testing.assert_close(found["pooler_output"], wanted.pooler_output)


def test_half_precision_and_channels_last_export(resnet):
    model, inputs = resnet
    changed = apply(model, Precision.FP16, Transforms(channels_last=True, fold_batch_norm=True), inputs)
    module = exported.export(changed, inputs.map(lambda t: t.half()), {"N": (1, 8)}).module()
    x = torch.randn(3, 3, 32, 32).half()
    torch.testing.assert_close(module(x)["logits"], changed.module(x).logits)


def test_outputs_are_plain_and_the_module_keeps_no_hook(make, inputs):
    Pair = namedtuple("Pair", "first second")

    class Nested(nn.Module):
        def forward(self, x):
            return {"pair": Pair(x + 1, x + 2), "none": None, "list": [x + 3, {"deep": x + 4}]}

    module = Nested()
    found = exported.export(make(module), inputs("x:float32[N,4]", dims={"N": 2})).module()(torch.zeros(2, 4))
    assert type(found) is dict and type(found["pair"]) is tuple and "none" not in found
    assert found["list"][1]["deep"][0, 0] == 4
    assert not module._forward_hooks


def test_keywords_out_of_order_and_nested_arguments_are_told_apart(make):
    from gpuopt.core.live import Inputs
    from gpuopt.core.spec import TensorSpec

    class Many(nn.Module):
        def forward(self, pair, b, c=None):
            return pair[0].sum() + pair[1]["k"] * 2 + b + c.sum()

    specs = tuple(TensorSpec.parse(s) for s in ("p:float32[N]", "k:float32[M]", "c:float32[N]", "b:float32[M]"))
    given = Inputs(
        args=((torch.randn(3), {"k": torch.randn(5)}),),
        kwargs={"c": torch.randn(3), "b": torch.randn(5)},
        specs=specs,
        dims={"N": 3, "M": 5},
    )
    module = exported.export(make(Many()), given, {"N": (1, 8), "M": (1, 8)}).module()
    pair, b, c = (torch.ones(2), {"k": torch.ones(7)}), torch.ones(7), torch.ones(2)
    torch.testing.assert_close(module(pair, c=c, b=b), Many()(pair, b, c))
    with pytest.raises((AssertionError, RuntimeError)):
        module(pair, c=torch.ones(3), b=b)


def test_a_dimension_the_model_fixes_is_unsupported_with_a_way_out(make, inputs):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(3, -1) @ torch.ones(4, 4) if x.shape[0] == 3 else x

    with pytest.raises(Unsupported) as caught:
        exported.export(make(Fixed()), inputs("x:float32[N,4]", dims={"N": 3}), {"N": (1, 8)})
    assert "--dim N=1" in caught.value.fix and len(caught.value.message) < 500


def test_control_flow_by_values_is_unsupported_with_torchs_reason(make, inputs):
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    module = Branch()
    with pytest.raises(Unsupported, match=r"torch\.export cannot take model: "):
        exported.export(make(module), inputs("x:float32[N,4]", dims={"N": 3}))
    assert not module._forward_hooks


def test_a_letter_no_input_has_is_a_usage_error(resnet):
    with pytest.raises(UsageError, match="dimension Q"):
        exported.export(*resnet, {"Q": (1, 8)})


def test_other_forms_cannot_be_exported_and_an_exported_one_already_is(resnet):
    model, inputs = resnet
    program = exported.export(model, inputs)
    assert exported.export(Model(form="exported", name="p", exported=program), inputs) is program
    with pytest.raises(Unsupported, match="torchscript"):
        exported.export(Model(form="torchscript", name="s"), inputs)


def test_a_file_loads_in_a_process_that_has_never_heard_of_the_model(bert, tmp_path):
    model, inputs = bert
    path = exported.save(exported.export(model, inputs, {"N": (1, 4), "S": (2, 16)}), tmp_path / "m.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    wanted = model.module(torch.arange(6).view(2, 3)).last_hidden_state.sum().item()
    code = (
        "import sys, torch; sys.modules['transformers'] = None\n"
        f"module = torch.export.load({str(path)!r}).module()\n"
        "print(module(torch.arange(6).view(2, 3))['last_hidden_state'].sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert float(said.stdout) == pytest.approx(wanted, abs=1e-3), said.stderr
