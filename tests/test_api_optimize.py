"""`gpuopt.optimize` on a live module: in processes of its own where it can be handed over, else here; the winner called in the module's place; its bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpuopt
from gpuopt.core.errors import GateFailed, UsageError
from gpuopt.core.spec import BenchSpec, Candidate, InputSpec, ModelRef, Precision, Tolerance
from gpuopt.devices import info, null
from gpuopt.pipeline import environment, facts, isolate, livemodel
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.search.live import handed, searched, standin

QUICK = BenchSpec(
    min_time_s=0.02, max_time_s=1.5, min_iterations=1, warmup_s=0.01, max_warmup_s=0.05, block_ms=3.0, num_pairs=15, energy_s=0.0
)
"""Fifteen short pairs rather than six long ones: the interval of six is their extremes, and on a shared machine one sleep in six ends late."""
SOURCE = '''
import time
import torch
from torch import nn


class Slow(nn.Module):
    """Slow in float32 alone, so that a narrower precision is faster on any machine."""

    def __init__(self, ms=5.0):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.ms = nn.Linear(16, 16), ms

    def forward(self, x, scale):
        time.sleep((self.ms if x.dtype == torch.float32 else self.ms / 10) / 1e3)
        return {"y": self.lin(x) * scale}


def other(self, x, scale):
    return {"y": x}
'''
X = (torch.linspace(-1, 1, 64).reshape(4, 16), torch.full((16,), 2.0))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of Python that another process finds by its name."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "small_slow_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path / "source"))
    import small_slow_models  # type: ignore[import-not-found]

    yield small_slow_models
    del sys.modules["small_slow_models"]


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = facts.Survey(environment=environment.describe(), device=replace(info.describe("cpu"), ceilings=null.CEILINGS))
    monkeypatch.setattr(machines, "survey", lambda *_, **__: found)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    def stays(*_: Any) -> Any:
        raise handed.CannotHand("a test")

    monkeypatch.setattr(handed, "handed", stays)


def optimize(model: Any, inputs: Any = X, **more: Any) -> searched.Optimized:
    found = gpuopt.optimize(model, inputs, **{"backends": ("eager",), "precisions": ("bf16",), "rewrites": (), "spec": QUICK} | more)
    assert isinstance(found, searched.Optimized)
    return found


def test_the_winner_is_called_like_the_module_and_its_bundle_ships(
    modules: Any, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = modules.Slow().eval()
    found = optimize(model, output=tmp_path / "fast")
    assert not found.keeps_input and found.candidate.precision is Precision.BF16
    assert found.search.choice is not None and found.search.choice.speedup is not None and found.search.choice.speedup > 2
    assert [f.code for f in found.report.findings] == ["not-isolated"]
    wanted, got = model(*X), found.model(*X)
    assert set(got) == {"y"} and got["y"].dtype == torch.float32, "the module's own nest and dtype"
    assert 0 < float((got["y"] - wanted["y"]).detach().abs().max()) < 0.1
    with pytest.raises(UsageError, match=r"input_0.*\[3,16\]"):
        found.model(X[0][:3], X[1])
    with pytest.raises(UsageError, match="was not built for this call"):
        found.model(X[0], scale=X[1])
    costs = found.search.economics
    assert costs is not None and costs.artifact_bytes and costs.build_s is not None and costs.build_peak_host_bytes is None
    found.close()

    # The bundle alone, in a process that has neither the class nor this test.
    text = (
        f"import gpuopt, torch; fast = gpuopt.load({str(tmp_path / 'fast')!r});"
        "x = torch.linspace(-1, 1, 64).reshape(4, 16).bfloat16(); print(float(fast(x, torch.full((16,), 2.0).bfloat16())['y'].float().sum()))"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) == pytest.approx(float(wanted["y"].detach().sum()), abs=0.5)

    # And `gpuopt bench fast/`.
    from gpuopt.cli import app

    monkeypatch.chdir(tmp_path)
    words = ["bench", "fast/", "--min-time", "0.02", "--max-time", "0.2", "--json", "bench.json"]
    monkeypatch.setattr(sys, "argv", ["gpuopt", *words])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code in (0, None)
    (run,) = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert run["status"] == "ok" and run["backend"] == "eager" and run["precision"] == "bf16" and run["accuracy"]["passed"]
    assert run["build_peak_host_bytes"] > 2**26, "a process with torch in it takes more than 64 MiB"


def test_nothing_faster_keeps_the_very_module(modules: Any, here: None) -> None:
    model = modules.Slow(1.0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    switches = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    found = optimize(model, backends=("null:sleep_ms=20",), precisions=("fp32",))
    assert found.keeps_input and found.model is model and found.search.choice is not None
    assert found.search.choice.because.startswith("keep what you have")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision) == switches
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(run.reproduce for run in found.report.runs), "no command line names a live module"
    found.close()
    model(*X)


def test_a_wrong_candidate_never_wins(modules: Any, here: None) -> None:
    found = optimize(modules.Slow().eval(), backends=("null:fail=wrong",))
    assert found.keeps_input
    (trial,) = [t for t in found.search.trials if t.label.startswith("bf16")]
    assert trial.outcome == "accuracy_fail", trial


def test_a_time_budget_of_nothing_plans_and_a_bad_one_is_refused(modules: Any, here: None) -> None:
    model = modules.Slow(1.0).eval()
    found = optimize(model, time_budget=0)
    assert found.keeps_input and found.model is model and [t.seconds is not None for t in found.search.trials] == [True, False]
    for wrong in ({"time_budget": "soon"}, {"goal": "beauty"}, {"precisions": ("fp7",)}, {"rewrites": ("nothing",)}, {"resume": True}):
        with pytest.raises((UsageError, ValueError)):
            optimize(model, **wrong)


def test_what_goes_with_a_pipeline_and_what_with_a_module_is_told(modules: Any) -> None:
    model = modules.Slow()
    with pytest.raises(UsageError, match="inputs of a call"):
        gpuopt.optimize(model)
    with pytest.raises(UsageError, match="goes with one module"):
        gpuopt.optimize(model, X, run=lambda: None)
    with pytest.raises(UsageError, match=r"torch\.nn\.Module is wanted"):
        gpuopt.optimize("model.pt", X)
    with pytest.raises(UsageError, match="is a list, not a tensor"):
        gpuopt.optimize(model, ([1.0],))


# -- handing over ---------------------------------------------------------------------------------------------------------------------


def test_a_module_whose_classes_can_be_imported_is_searched_by_children(modules: Any) -> None:
    """One child does what each does: load it by its hash, build, verify; with the inputs under the names of forward."""
    model, bound = livemodel.handles(modules.Slow().eval(), X)
    with handed.handed(model, bound) as files:
        base = Candidate(
            model=ModelRef(text=str(files.path), trust=(files.sha256,)), inputs=InputSpec(file=str(files.inputs)), precision=Precision.BF16
        )
        with isolate.Child(environment=files.environment) as child:
            loaded = child.call("load", facts.Loaded, timeout_s=60, candidate=base)
            assert loaded.name == "Slow" and [text.partition(":")[0] for text in loaded.inputs] == ["x", "scale"]
            made = child.call("build", facts.Built, timeout_s=60)
            assert made.host_peak_bytes is not None and made.host_peak_bytes > 2**26
            assert child.call("verify", facts.Verified, timeout_s=60, tolerance=Tolerance(), mode="precision").accuracy.passed
        with handed.handed(model, bound) as again:
            assert again.sha256 == files.sha256 and again.path != files.path, "two at once do not share files"
    with handed.handed(*livemodel.handles(modules.Slow().eval(), X)) as later:
        assert later.path == files.path, "the same module is the same search, for --resume"
    assert not list((isolate.cache_root() / "live").iterdir()), "nothing is left"


def test_what_a_process_did_to_a_module_keeps_it_there(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x

    def why(module: nn.Module, inputs: Any = X) -> str:
        with pytest.raises(handed.CannotHand) as stays, handed.handed(*livemodel.handles(module.eval(), inputs)):
            pass
        return str(stays.value)

    assert "cannot be saved" in why(Local())
    hooked = modules.Slow()
    hooked.lin.register_forward_hook(lambda *_: None)
    assert "lin has forward hooks" in why(hooked)
    own = modules.Slow()
    own.forward = own.forward
    assert "replaced on the object" in why(own)
    assert "**kwargs" in why(modules.Slow(), {"y": X[0]}) or "takes 'y'" in why(modules.Slow(), {"y": X[0]})
    assert "*args" in why(modules.Slow(), (*X, *X))
    monkeypatch.setattr(modules.Slow, "forward", modules.other)
    assert "replaced on its class" in why(modules.Slow())
    monkeypatch.undo()
    del sys.modules["small_slow_models"]
    del_names = "small_slow_models"
    sys.modules[del_names] = modules
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("source")])
    assert "another process would not find" in why(modules.Slow())


def test_a_winner_that_another_process_saw_otherwise_is_none(modules: Any, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise GateFailed("built in this process it is outside the accuracy gate: y", fix="")

    monkeypatch.setattr(standin, "way", never)
    model = modules.Slow().eval()
    found = optimize(model)
    assert found.keeps_input and found.model is model
    assert {f.code for f in found.report.findings} == {"not-isolated", "winner-not-reproduced"}


@pytest.mark.slow
def test_a_search_by_children_is_resumed_for_the_same_module_alone(modules: Any, tmp_path: Path) -> None:
    model = modules.Slow().eval()
    first = optimize(model, output=tmp_path / "fast")
    assert not first.keeps_input and not first.report.findings and first.search.resumed == 0
    costs = first.search.economics
    assert costs is not None and costs.build_peak_host_bytes is not None and costs.build_peak_host_bytes > 2**26
    again = optimize(model, output=tmp_path / "fast", resume=True)
    assert again.search.resumed == len(again.search.trials) + 3, "two screened, two explained, one final"
    assert again.search.choice == first.search.choice and again.model(*X)["y"].dtype == torch.float32
    with torch.no_grad():
        model.lin.weight += 1
    with pytest.raises(UsageError, match="of another search"):
        optimize(model, output=tmp_path / "fast", resume=True)
