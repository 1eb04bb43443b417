"""torch.compile read back: dtypes, graph breaks, presets and what it silently gives up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from gpuopt.backends import inductor
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import TensorSpec
from gpuopt.programs.plain import copied

pytestmark = pytest.mark.skipif(inductor.available("cpu") is not None, reason=str(inductor.available("cpu")))


class Mlp(torch.nn.Module):
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


def model(module: torch.nn.Module) -> Model:
    return Model(form="module", name="mlp", module=module.eval())


def inputs(dtype: torch.dtype = torch.float32, batch: int = 4) -> Inputs:
    torch.manual_seed(0)
    return Inputs(args=(torch.randn(batch, 16, dtype=dtype),), specs=(TensorSpec.parse("x:float32[N,16]"),), dims={"N": batch})


def test_the_build_compiles_and_a_call_does_not() -> None:
    module = Mlp()
    runner = inductor.build(model(module), inputs(), {"precision": "fp32"})
    assert isinstance(runner, Runner)
    before = counters["stats"]["unique_graphs"]
    out = runner(*inputs().args)
    assert counters["stats"]["unique_graphs"] == before
    assert torch.allclose(out["y"], module(*inputs().args)["y"], atol=1e-5)
    audit = runner.audit()
    assert audit is not None and audit.honoured and audit.shares == {"float32": 1.0} and audit.method == "post-grad graph"
    assert runner.notes == []
    runner.close()
    runner.close()


def test_the_audit_catches_a_module_that_upcasts_inside_and_names_it() -> None:
    audit = inductor.build(model(Mlp(upcast=True).bfloat16()), inputs(torch.bfloat16), {"precision": "bf16"}).audit()
    assert audit is not None and not audit.honoured
    assert audit.shares == pytest.approx({"bfloat16": 0.5, "float32": 0.5})
    assert len(audit.exceptions) == 1 and "float32, 50.0%" in audit.exceptions[0]


def test_a_second_build_in_the_same_process_is_read_as_well() -> None:
    module = Mlp()
    for _ in range(2):
        audit = inductor.build(model(module), inputs(), {"precision": "fp32"}).audit()
        assert audit is not None and audit.shares == {"float32": 1.0}


def test_graph_breaks_are_counted_and_explained() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner(x)
            torch._dynamo.graph_break()
            out: torch.Tensor = self.inner(x)
            return out

    runner = inductor.build(model(Broken()), inputs(), {"precision": "fp32"})
    assert any("graph break" in note for note in runner.notes)
    audit = runner.audit()
    assert audit is not None and "between graph breaks" in audit.reason
    assert audit.shares == {"float32": 1.0}
    with pytest.raises(torch._dynamo.exc.Unsupported):
        inductor.build(model(Broken()), inputs(), {"fullgraph": True})


def test_a_module_it_cannot_look_into_is_unsupported_and_not_silently_eager() -> None:
    class Hidden(torch.nn.Module):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.T

    with pytest.raises(Unsupported, match="captured no graph"):
        inductor.build(model(Hidden()), inputs(), {})


def test_freezing_folds_and_stays_right() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.norm = torch.nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.norm(self.conv(x))
            return out

    torch.manual_seed(1)
    module = Block()
    for parameter in (module.norm.running_mean, module.norm.running_var):
        assert parameter is not None
        parameter.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    runner = inductor.build(model(module), Inputs(args=(x,)), {"preset": "freezing", "precision": "fp32"})
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(x.double())
    assert torch.allclose(runner(x).double(), wanted, atol=1e-5)
    audit = runner.audit()
    assert audit is not None and audit.shares == {"float32": 1.0}


def test_a_dynamic_dimension_compiles_once_for_all_its_sizes() -> None:
    module = Mlp()
    given = inputs(batch=4)
    runner = inductor.build(model(module), given, {"dynamic": {"N": (2, 64)}})
    before = counters["stats"]["unique_graphs"]
    for batch in (2, 5, 64):
        x = inputs(batch=batch).args
        assert torch.allclose(runner(*x)["y"], module(*x)["y"], atol=1e-5)
    assert counters["stats"]["unique_graphs"] == before
    assert not hasattr(given.args[0], "_dynamo_dynamic_indices")


def test_presets_are_settings_that_inductor_knows() -> None:
    known = torch._inductor.config.get_config_copy()
    for preset, settings in inductor.PRESETS.items():
        assert set(settings) <= set(known), preset
        if preset in torch._inductor.list_mode_options():
            assert settings == torch._inductor.list_mode_options(preset), preset


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="no preset 'fastest'"):
        inductor.build(model(Mlp()), inputs(), {"preset": "fastest"})
    with pytest.raises(UsageError, match="no option 'epilogue_fusio'"):
        inductor.build(model(Mlp()), inputs(), {"epilogue_fusio": False})


def test_cuda_graph_presets_on_a_cpu_say_so() -> None:
    with pytest.raises(Unsupported, match="CUDA graphs"):
        inductor.build(model(Mlp()), inputs(), {"preset": "reduce-overhead"})
    settings, notes = inductor._settings({"preset": "max-autotune"}, "cpu")
    assert "triton.cudagraphs" not in settings and settings["max_autotune"]
    assert notes == ["max-autotune without CUDA graphs: the model is on cpu"]


@pytest.mark.parametrize("preset", [name for name in inductor.PRESETS if name.endswith("graphed")])
def test_presets_that_record_refuse_a_cpu_and_inductors_own_graphs(preset: str) -> None:
    with pytest.raises(Unsupported, match=f"preset {preset} means CUDA graphs, and the model is on cpu"):
        inductor.build(model(Mlp()), inputs(), {"preset": preset})
    settings, notes = inductor._settings({"preset": preset}, "cuda:0")
    assert settings["triton.cudagraphs"] is False and not notes
    with pytest.raises(UsageError, match="records the graph itself"):
        inductor._settings({"preset": preset, "triton.cudagraphs": True}, "cuda:0")


def test_outputs_of_graph_memory_are_copied_in_every_nesting() -> None:
    memory = torch.zeros(3)
    out = copied({"a": memory, "b": [memory, (memory, None)], "c": 1})
    memory.add_(1)
    assert out["a"].sum() == 0 and out["b"][0].sum() == 0 and out["b"][1][0].sum() == 0
    assert out["b"][1][1] is None and out["c"] == 1


def test_what_was_saved_compiles_again_and_checks_its_inputs(tmp_path: Path) -> None:
    module = Mlp()
    runner = inductor.build(model(module), inputs(), {"precision": "fp32"})
    files = runner.save(tmp_path)
    again = inductor.load(tmp_path, files, {"signed_by_us": True, "precision": "fp32"}, "cpu")
    assert torch.allclose(again(*inputs().args)["y"], module(*inputs().args)["y"], atol=1e-5)
    audit = again.audit()
    assert audit is not None and audit.shares == {"float32": 1.0}
    assert "compiled again from the exported program of the bundle" in again.notes
    with pytest.raises(UsageError, match="dimension 0 was built for 4 alone"):
        again(*inputs(batch=5).args)


def test_the_fp32_stage_builds_the_same_program_without_searching_for_its_kernels() -> None:
    options = {
        "preset": "max-autotune-freezing-graphed",
        "precision": "fp32",
        "dynamic": {},
        "epilogue_fusion": False,
        "max_autotune": True,
    }
    assert inductor.structural(options) == {"preset": "freezing", "precision": "fp32", "dynamic": {}, "epilogue_fusion": False}
    assert inductor.structural({"preset": "reduce-overhead"}) == inductor.structural({"preset": None}) == {"preset": "default"}


@pytest.mark.parametrize("wanted", [False, True])
def test_wide_rows_ask_for_rows_in_one_piece_up_to_their_limit_and_only_while_compiling(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Inductor asks of its choices, with the graph it asks about made up: a CPU's code has no such choice."""
    import sympy
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    from gpuopt.programs.wide_rows import WideRows, wide_rows

    class Rows:
        def __init__(self, length: int, hint: ReductionHint = ReductionHint.INNER) -> None:
            self.reduction_numel, self.numel, self._hint = sympy.Integer(length), sympy.Integer(64), hint

        def get_reduction_hint(self) -> ReductionHint:
            return self._hint

    class Graph:
        class sizevars:
            @staticmethod
            def statically_known_leq(left: Any, right: int) -> bool:
                return bool(left <= right)

            @staticmethod
            def optimization_hint(size: Any) -> int:
                return int(size)

    with V.set_graph_handler(Graph()), wide_rows(wanted):
        assert isinstance(V.choices, WideRows) is wanted
        one_piece = {n: V.choices.should_use_persistent_reduction(Rows(n), False) for n in (512, 4096, 8192, 8193)}
        assert one_piece == {512: True, 4096: wanted, 8192: wanted, 8193: False}
        assert not V.choices.should_use_persistent_reduction(Rows(4096, ReductionHint.OUTER), False)
        assert not V.choices.should_use_persistent_reduction(Rows(4096), True)
    assert type(V.choices) is InductorChoices


def test_wide_rows_compile_and_are_no_setting_of_inductors() -> None:
    given = Inputs(args=(torch.randn(4, 16),))
    runner = inductor.build(Model(form="module", name="n", module=torch.nn.Linear(16, 8).eval()), given, {"wide_rows": True})
    assert runner(*given.args).shape == (4, 8)
