"""The verbs on a live module: the same answers as the command line, and the caller's module as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import gpuopt
from gpuopt import api
from gpuopt.core.errors import GateFailed, Unsupported, UsageError
from gpuopt.core.result import Status
from gpuopt.core.spec import BenchSpec, Tolerance
from gpuopt.devices import info, null
from gpuopt.pipeline import environment, facts

QUICK = BenchSpec(
    min_time_s=0.02, max_time_s=0.3, min_iterations=10, warmup_s=0.01, max_warmup_s=0.05, block_ms=3.0, num_pairs=6, energy_s=0.0
)


class Net(nn.Module):
    """A state that a careless caller would change: statistics, dropout, a cache kept by forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Linear(8, 4)
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.drop(self.norm(self.conv(x))).mean((2, 3))
        out: torch.Tensor = self.last(self.seen)
        return out


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.embed(ids) * mask.unsqueeze(-1)
        return out


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings nothing here can reach: measuring them would take longer than all else."""
    found = facts.Survey(environment=environment.describe(), device=replace(info.describe("cpu"), ceilings=null.CEILINGS))
    monkeypatch.setattr(api, "_survey", lambda device: found)


@pytest.fixture(params=["eval", "training", "partly"])
def net(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A module whose every part is as it was when the test ends."""
    torch.manual_seed(0)
    module = Net().train(request.param == "training")
    if request.param == "partly":
        module.drop.train()
    state = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    ids = [id(p) for p in module.parameters()]
    yield module
    assert [part.training for part in module.modules()] == modes
    assert [id(p) for p in module.parameters()] == ids
    assert module.seen is None, "forward ran on the original"
    for name, value in module.state_dict().items():
        assert value.dtype == state[name].dtype and value.device == state[name].device
        assert value.stride() == state[name].stride()
        assert torch.equal(value, state[name]), name
    module(torch.ones(2, 3, 8, 8)).sum().backward()  # it can still be trained


X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


def test_a_profile_names_the_modules_and_leaves_the_original_alone(net: nn.Module) -> None:
    report = gpuopt.profile(net, X, spec=QUICK)
    (run,) = report.runs
    assert run.status is Status.OK and run.batch == 4
    assert {"conv", "last"} <= {row.name for row in run.modules}
    assert run.waterfall is not None
    assert any("training mode" in note for note in run.notes) == any(part.training for part in net.modules())
    assert run.reproduce == ""


def test_a_bench_compares_backends_and_one_that_cannot_be_is_a_run(net: nn.Module) -> None:
    report = gpuopt.bench(
        net, X, backends=("eager", "null", "null:fail=wrong", "null:fail=unsupported"), precisions=("fp32", "tf32"), spec=QUICK
    )
    found = [(run.backend, run.precision, run.status) for run in report.runs]
    assert found[:2] == [("eager", "fp32", Status.OK), ("null", "fp32", Status.OK)]
    assert [status for _, _, status in found[2:4]] == [Status.ACCURACY_FAIL, Status.UNSUPPORTED]
    assert {status for _, precision, status in found[4:]} == {Status.UNSUPPORTED}
    assert report.runs[1].relative is not None and report.runs[1].relative.num_pairs == 6
    assert all(run.latency_ms is None for run in report.runs[2:])


def test_a_bench_of_nothing_that_works_raises_its_first_reason() -> None:
    with pytest.raises(Unsupported, match="told to be"):
        gpuopt.bench(Net().eval(), X, backends=("null:fail=unsupported",), spec=QUICK)


def test_switches_of_torch_are_as_they_were_after_a_bench_of_several() -> None:
    switch = torch.backends.cuda.matmul
    found = switch.allow_tf32
    switch.allow_tf32 = True
    try:
        gpuopt.bench(Net().eval(), X, backends=("eager", "null"), spec=replace(QUICK, verify="off", num_pairs=1))
        assert switch.allow_tf32 is True
    finally:
        switch.allow_tf32 = found


def test_convert_gives_a_changed_copy(net: nn.Module) -> None:
    half = gpuopt.convert(net, X, precision="bf16", channels_last=True, fold_batch_norm=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(isinstance(part, nn.BatchNorm2d) for part in half.modules())
    wanted = copy.deepcopy(net).eval()(X)
    with torch.no_grad():
        assert torch.allclose(half(X.bfloat16()).float(), wanted, atol=0.05)


def test_convert_outside_the_gate_raises() -> None:
    module = Net().eval()
    with pytest.raises(GateFailed) as caught:
        gpuopt.convert(module, X, precision="bf16", tolerance=Tolerance(max_error=1e-9))
    assert caught.value.fix


@pytest.mark.parametrize("inputs", ["positional", "named"])
def test_a_compiled_bundle_comes_back_takes_either_call_and_refuses_other_shapes(inputs: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Words().eval()
    ids, mask = torch.tensor([[1, 2, 49], [4, 5, 6]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    given: Any = (ids, mask) if inputs == "positional" else {"ids": ids, "mask": mask}
    report = gpuopt.compile(module, given, backend="null", output=tmp_path / "b", spec=QUICK)
    assert report.output == "b" and report.runs[0].status is Status.OK
    fast = gpuopt.load(tmp_path / "b")
    assert torch.allclose(fast(ids, mask), module(ids, mask))
    if inputs == "named":
        assert torch.allclose(fast(ids, mask=mask), module(ids, mask))
        assert torch.allclose(fast(mask=mask, ids=ids), module(ids, mask))
    for wrong in ((ids[:1], mask[:1]), (ids, mask.double()), (ids,), (ids, mask, mask)):
        with pytest.raises(UsageError):
            fast(*wrong)
    fast.close()
    fast.close()


class Answer(NamedTuple):
    words: torch.Tensor
    more: Any


class Nested(Words):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        out = super().forward(ids, mask)
        return Answer(words=out, more={"sum": out.sum(-1), "nothing": None})


@pytest.mark.parametrize("backend", ["null", "ort"])
def test_a_bundle_returns_the_nest_of_its_model(backend: str, tmp_path: Path) -> None:
    """As `gpuopt.optimize(...).model` does: an ONNX graph alone would give tensors by name."""
    if backend == "ort":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = Nested().eval()
    given = (torch.tensor([[1, 2, 49]]), torch.ones(1, 3))
    gpuopt.compile(module, given, backend=backend, output=tmp_path / "b", spec=QUICK)
    fast = gpuopt.load(tmp_path / "b")
    out, wanted = fast(*given), module(*given)
    assert type(out) is Answer and list(out.more) == ["sum", "nothing"] and out.more["nothing"] is None
    assert torch.allclose(out.words, wanted.words, atol=1e-5) and torch.allclose(out.more["sum"], wanted.more["sum"], atol=1e-5)
    fast.close()
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert "outputs.json" in {f["name"] for f in manifest["files"]}


def test_a_bundle_is_verified_again_on_the_callers_own_tensors(tmp_path: Path) -> None:
    """Random ids would be drawn from 0 and 1, and the reference was taken on these."""
    from gpuopt.core.spec import Candidate, ModelRef
    from gpuopt.pipeline.session import Session

    ids, mask = torch.tensor([[41, 42, 49]]), torch.full((1, 3), 0.5)
    gpuopt.compile(Words().eval(), (ids, mask), backend="null", output=tmp_path / "b", spec=QUICK)
    session = Session()
    session.load(Candidate(model=ModelRef(text=str(tmp_path / "b")), device="cpu"))
    session.build()
    accuracy = session.verify(Tolerance()).accuracy
    session.close()
    assert accuracy.passed, accuracy.reason
    (folder,) = tmp_path.iterdir()
    assert folder.name == "b"


@pytest.mark.parametrize("backend", ["null:fail=wrong", "null:fail=dtype_lie", "null:fail=disk_full,at=save"])
def test_a_compile_that_fails_leaves_nothing(backend: str, tmp_path: Path) -> None:
    with pytest.raises((GateFailed, Unsupported, OSError)):
        gpuopt.compile(Net().eval(), X, backend=backend, precision="fp32", output=tmp_path / "b", spec=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_module_no_tensor_and_no_bundle_is_a_usage_error(tmp_path: Path) -> None:
    for model, inputs in ((lambda x: x, X), (Net(), 3), (Net(), {"x": "y"}), (Net(), [X, None])):
        with pytest.raises(UsageError):
            gpuopt.profile(model, inputs, spec=QUICK)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        gpuopt.load(tmp_path / "nothing")
    (tmp_path / "m.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(2, 2)\n")
    with pytest.raises(UsageError, match="bundle"):
        gpuopt.load(f"{tmp_path / 'm.py'}:net")


def test_the_callers_tensors_are_not_written_into() -> None:
    class Writer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1.0) * 2

    x = torch.zeros(2, 2)
    report = gpuopt.bench(Writer(), x, spec=QUICK)
    assert report.runs[0].status is Status.OK, report.runs[0].reason
    assert torch.equal(x, torch.zeros(2, 2))
