"""The order of changes, the forms that cannot be changed, and that the given model never is."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from gpuopt.converters import apply, exported
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Model
from gpuopt.core.spec import Precision, TensorSpec, Transforms


def test_nothing_to_change_copies_nothing(resnet):
    model, inputs = resnet
    assert apply(model, None, Transforms(), inputs) is model
    assert apply(model, Precision.FP32, Transforms(), inputs) is model


def test_a_model_in_training_mode_is_put_into_eval_mode_and_says_so(make):
    module = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model = make(module)
    changed = apply(model, None, Transforms())
    assert not any(part.training for part in changed.module.modules()) and module.training
    assert any(note.startswith("eval mode: 3 modules") for note in changed.notes)


def test_channels_last_weights_keep_their_layout_through_a_cast(resnet):
    model, inputs = resnet
    changed = apply(model, Precision.FP16, Transforms(channels_last=True, fold_batch_norm=True), inputs)
    convs = [part for part in changed.module.modules() if isinstance(part, nn.Conv2d)]
    wide = [part for part in convs if part.weight.shape[1] > 1 and part.kernel_size != (1, 1)]
    assert wide and all(part.weight.is_contiguous(memory_format=torch.channels_last) for part in convs)
    assert not any(part.weight.is_contiguous() for part in wide)
    seen = []
    wide[-1].register_forward_hook(lambda module, args, output: seen.append(output.is_contiguous(memory_format=torch.channels_last)))
    changed.module(inputs.args[0].half())
    assert seen == [True]


def test_channels_last_is_refused_where_it_would_do_nothing(bert):
    with pytest.raises(Unsupported, match="none"):
        apply(bert[0], None, Transforms(channels_last=True))


def test_the_signature_follows_the_cast_and_integers_stay(make):
    specs = tuple(TensorSpec.parse(s) for s in ("x:float32[N,2]", "ids:int64[N]"))
    model = make(nn.Linear(2, 2), signature=specs)
    changed = apply(model, Precision.BF16, Transforms())
    assert [str(s) for s in changed.signature] == ["x:bfloat16[N,2]", "ids:int64[N]"]
    assert [str(s) for s in model.signature] == ["x:float32[N,2]", "ids:int64[N]"]


def test_a_module_that_cannot_be_copied_is_unsupported(make):
    module = nn.Linear(2, 2)
    module.lock = threading.Lock()
    with pytest.raises(Unsupported, match="cannot be copied"):
        apply(make(module), Precision.FP16, Transforms())


# -- TorchScript ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(inputs):
    module = torch.jit.trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval(), torch.randn(2, 4))
    return Model(form="torchscript", name="scripted", module=module, dtype="float32"), inputs("x:float32[N,4]", dims={"N": 3})


def test_a_script_is_cast_on_a_copy(scripted):
    model, inputs = scripted
    changed = apply(model, Precision.FP16, Transforms(), inputs)
    assert {p.dtype for p in changed.module.parameters()} == {torch.float16} and changed.dtype == "float16"
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert changed.module(inputs.args[0].half()).dtype == torch.float16


def test_a_frozen_script_cannot_be_cast(scripted):
    model, inputs = scripted
    model.module = torch.jit.freeze(model.module)
    with pytest.raises(Unsupported, match="frozen"):
        apply(model, Precision.FP16, Transforms(), inputs)


def test_a_script_that_breaks_when_cast_is_unsupported_not_a_crash_later(inputs):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.mm(self.linear(x), torch.ones(4, 4, dtype=torch.float32))

    model = Model(form="torchscript", name="fixed", module=torch.jit.trace(Fixed().eval(), torch.randn(2, 4)), dtype="float32")
    with pytest.raises(Unsupported, match="does not run in fp16"):
        apply(model, Precision.FP16, Transforms(), inputs("x:float32[N,4]", dims={"N": 3}))


@pytest.mark.parametrize("transforms", [Transforms(fold_batch_norm=True), Transforms(keep_fp32=("0",))])
def test_a_script_cannot_be_folded_or_kept_apart(scripted, transforms):
    with pytest.raises(Unsupported):
        apply(scripted[0], Precision.FP16, transforms)


# -- exported programs ------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x, scale=None):
        y = torch.relu(self.linear(x))
        return y if scale is None else y * scale


def program_of(module, inputs, make, dynamic=None):
    program = exported.export(make(module.eval()), inputs, dynamic)
    return Model(form="exported", name="program", module=program.module(), exported=program, dtype="float32")


def test_an_exported_program_is_cast_by_exporting_it_again(make, inputs):
    module = Plain()
    given = inputs("x:float32[N,4]", "scale:float32[N,8]", dims={"N": 3})
    model = program_of(module, given, make, {"N": (1, 16)})
    changed = apply(model, Precision.FP16, Transforms(), given)
    assert changed.form == "exported" and changed.dtype == "float16"
    assert {t.dtype for t in changed.exported.state_dict.values()} == {torch.float16}
    assert {t.dtype for t in model.exported.state_dict.values()} == {torch.float32}
    for batch in (1, 5, 16):
        x, scale = torch.randn(batch, 4), torch.randn(batch, 8)
        found = changed.module(x.half(), scale=scale.half())
        torch.testing.assert_close(found.float(), module(x, scale), rtol=2e-2, atol=2e-2)
    with pytest.raises(AssertionError):
        changed.module(torch.randn(17, 4).half(), scale=torch.randn(17, 8).half())


def test_a_dtype_written_into_the_graph_is_named(make, inputs):
    class Fixed(Plain):
        def forward(self, x):
            return self.linear(x) + torch.ones(8, dtype=torch.float32)

    model = program_of(Fixed(), inputs("x:float32[N,4]", dims={"N": 3}), make)
    with pytest.raises(Unsupported, match="float32 written into its graph"):
        apply(model, Precision.FP16, Transforms())


def test_an_exported_program_at_its_own_precision_is_passed_on(make, inputs):
    model = program_of(Plain(), inputs("x:float32[N,4]", dims={"N": 3}), make)
    assert apply(model, Precision.FP32, Transforms()) is model
    with pytest.raises(Unsupported, match="fixed"):
        apply(model, None, Transforms(fold_batch_norm=True))


# -- files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "bundle"])
def test_a_file_stays_as_it_was_written(form, tmp_path):
    model = Model(form=form, name="file", path=tmp_path / "x", dtype="float32")
    assert apply(model, Precision.FP32, Transforms()) is model
    assert apply(model, None, Transforms()) is model
    with pytest.raises(Unsupported, match="stays as it was written"):
        apply(model, Precision.FP16, Transforms())
    with pytest.raises(Unsupported, match="stays as it was written"):
        apply(model, None, Transforms(channels_last=True))
