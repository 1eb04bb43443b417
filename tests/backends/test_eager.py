"""Eager is the module itself; its audit sees casts that a model hides from whoever reads its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import eager
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import TensorSpec


class Mlp(torch.nn.Module):
    """Two layers; the second one in fp32 whatever the rest is, when told to."""

    def __init__(self, upcast: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.second = torch.nn.Linear(32, 16)
        self.upcast = upcast

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.first(x))
        if self.upcast:
            return {"y": torch.nn.functional.linear(h.float(), self.second.weight.float()).to(x.dtype)}
        return {"y": self.second(h)}


def model(module: torch.nn.Module, form: str = "module") -> Model:
    return Model(form=form, name="mlp", module=module.eval())


def inputs(dtype: torch.dtype = torch.float32, batch: int = 4) -> Inputs:
    torch.manual_seed(0)
    return Inputs(args=(torch.randn(batch, 16, dtype=dtype),), specs=(TensorSpec.parse("x:float32[N,16]"),), dims={"N": batch})


def test_it_is_a_runner_and_returns_what_the_module_returns() -> None:
    module = Mlp()
    runner = eager.build(model(module), inputs(), {})
    assert isinstance(runner, Runner)
    out = runner(*inputs().args)
    assert torch.equal(out["y"], module(*inputs().args)["y"])
    assert not out["y"].requires_grad
    assert runner.device == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_audit_names_the_dtype_that_ran(dtype: torch.dtype) -> None:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]
    audit = eager.build(model(Mlp().to(dtype)), inputs(dtype), {"precision": name}).audit()
    assert audit is not None and audit.honoured
    assert audit.shares == {str(dtype).removeprefix("torch."): 1.0}


def test_the_audit_catches_a_module_that_upcasts_inside() -> None:
    audit = eager.build(model(Mlp(upcast=True).half()), inputs(torch.float16), {"precision": "fp16"}).audit()
    assert audit is not None and not audit.honoured
    assert audit.shares == pytest.approx({"float16": 0.5, "float32": 0.5})
    assert any("float32" in line for line in audit.exceptions)


def test_the_audit_sees_autocast() -> None:
    class Cast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out: torch.Tensor = self.inner(x)
            return out

    audit = eager.build(model(Cast()), inputs(), {"precision": "fp32"}).audit()
    assert audit is not None and audit.shares == {"bfloat16": 1.0} and not audit.honoured


def test_the_audit_sees_attention_and_the_fused_encoder_layer() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    given = Inputs(args=(torch.randn(2, 5, 16),))
    audit = eager.build(model(layer), given, {"precision": "fp32"}).audit()
    assert audit is not None and audit.shares == {"float32": 1.0} and audit.honoured


def test_a_model_without_products_has_nothing_to_audit() -> None:
    audit = eager.build(model(torch.nn.ReLU()), inputs(), {"precision": "fp16"}).audit()
    assert audit is not None and audit.shares == {} and "no matrix product" in audit.reason


def test_a_scriptmodule_runs_and_is_not_exported(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(torch.nn.Linear(16, 4))
    runner = eager.build(model(scripted, "torchscript"), inputs(), {"precision": "fp32"})
    assert runner(*inputs().args).shape == (4, 4)
    audit = runner.audit()
    assert audit is None or audit.shares == {"float32": 1.0}
    with pytest.raises(Unsupported):
        runner.save(tmp_path)


def test_an_exported_program_runs_and_updates_its_buffers() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return x + self.calls

    program = torch.export.export(Counter(), inputs().args)
    runner = eager.build(Model(form="exported", name="c", module=program.module(), exported=program), inputs(), {})
    first, second = runner(*inputs().args), runner(*inputs().args)
    assert torch.allclose(second, first + 1, atol=1e-5)


def test_what_was_saved_loads_without_the_class_and_gives_the_same_bits(tmp_path: Path) -> None:
    module = Mlp()
    runner = eager.build(model(module), inputs(), {"dynamic": {"N": (1, 8)}})
    files = runner.save(tmp_path)
    again = eager.load(tmp_path, files, {"signed_by_us": True}, "cpu")
    for batch in (1, 4, 8):
        given = inputs(batch=batch)
        assert torch.allclose(again(*given.args)["y"], module(*given.args)["y"], atol=1e-6)
    with pytest.raises(UsageError, match="dimension N is 9"):
        again(*inputs(batch=9).args)
    with pytest.raises(Unsupported):
        again.save(tmp_path)


def test_a_saved_file_holds_no_example_inputs(tmp_path: Path) -> None:
    secret = torch.full((4, 16), 1234.5)
    eager.build(model(Mlp()), Inputs(args=(secret,)), {}).save(tmp_path)
    assert secret.numpy().tobytes()[:64] not in (tmp_path / "model.pt2").read_bytes()


def test_a_forward_that_branches_on_data_runs_but_is_not_saved(tmp_path: Path) -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum().item() > 0 else x - 1

    runner = eager.build(model(Branch()), inputs(), {})
    with pytest.raises(Unsupported, match="cannot take the model"):
        runner.save(tmp_path)


def test_close_twice_is_harmless() -> None:
    runner = eager.build(model(Mlp()), inputs(), {})
    runner.close()
    runner.close()


def test_a_preset_or_option_it_does_not_have_is_refused() -> None:
    for options in ({"preset": "fast"}, {"reduce": True}):
        with pytest.raises(UsageError, match="eager has no"):
            eager.build(model(Mlp()), inputs(), options)
