"""What must stay in fp32, found in real models on this CPU: overflows of several kinds, a quantised layer with outliers, and precisions that are not at fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core import codec
from gpuopt.core.errors import Unsupported
from gpuopt.core.result import Sensitivity, Status
from gpuopt.core.spec import Tolerance
from gpuopt.pipeline.session import Session

SOURCE = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Stack(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.layers = nn.ModuleList([Block() for _ in range(depth)])
        self.last = nn.Linear(32, 8)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class Square(nn.Module):
    """Its own sum of squares is too large for fp16; what it hands on is not."""

    def forward(self, x):
        large = (x * 1000.0).pow(2)
        return large / large.sum(-1, keepdim=True)


class Silent(nn.Module):
    """The same, and nothing shows: what is divided by Inf is zero, in every backend."""

    def forward(self, x):
        return x / (x * 1000.0).pow(2).sum(-1, keepdim=True)


class Cancel(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return (x + self.by) - self.by


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 16), Square(), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


class Bare(nn.Module):
    """Overflows in its own forward, outside any module."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(16, 8)

    def forward(self, x):
        x = self.line(x)
        return (x * 1e4).pow(2).sqrt()


def made(build):
    torch.manual_seed(0)
    return build().eval()


def stack():
    return made(Stack)


def handed_on():
    """What `up` hands on in layer 3 is too large for fp16: the whole block has to be kept."""
    model = made(Stack)
    with torch.no_grad():
        model.layers[3].up.weight *= 1e6
        model.layers[3].down.weight /= 1e6
    return model


def inside():
    model = made(Stack)
    model.layers[4].act = Square()
    return model


def silent():
    return nn.Sequential(made(Stack), Silent())


def tied():
    return made(Tied)


def bare():
    return made(Bare)


def outliers():
    """One hidden feature of layer 2 is huge and counts for nothing: the others are rounded away beside it in int8."""
    model = made(Stack)
    with torch.no_grad():
        layer = model.layers[2]
        layer.up.weight[0] *= 1e4
        layer.down.weight *= 20
        layer.down.weight[:, 0] = 0
    return model


def cancels():
    """What two parts add and take away again is rounded to what a narrow type can tell apart."""
    model = made(Stack)
    model.layers[1].act = Cancel(100.0)
    model.layers[4].act = Cancel(30.0)
    return model


for f in (silent, stack, cancels, handed_on, inside, bare, outliers):
    f.input_specs = ("x:float32[N,16]",)
tied.input_specs = ("ids:int64[N,S]<50",)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sensitive") / "nets.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


def found(session: Session, candidate: Any, tolerance: Tolerance | None = None, **limits: Any) -> Sensitivity:
    session.load(candidate)
    result = session.sensitivity(tolerance or Tolerance(), **limits)
    assert codec.from_json(Sensitivity, codec.to_json(result)) == result, "it crosses a process"
    return result


def passes(candidate: Any, kept: tuple[str, ...], tolerance: Tolerance | None = None) -> bool:
    """What verification itself says about a candidate that keeps these."""
    session = Session()
    try:
        session.load(replace(candidate, transforms=replace(candidate.transforms, keep_fp32=kept)))
        session.build()
        return session.verify(tolerance or Tolerance()).accuracy.passed
    finally:
        session.close()


@pytest.mark.parametrize(
    ("model", "kept", "first"),
    [("inside", ("layers.4.act",), "layers.4.act"), ("handed_on", ("layers.3",), "layers.3.up"), ("tied", ("norm",), "norm")],
)
def test_an_overflow_is_found_and_what_is_kept_passes_verification(
    model: str, kept: tuple[str, ...], first: str, session: Session, tools: Any, file: Path
) -> None:
    candidate = tools.candidate(f"{file}:{model}", "eager", "fp16", N=4)
    assert not passes(candidate, ())
    result = found(session, candidate)
    assert result.kept == kept and result.is_minimal
    assert result.first_nonfinite == first
    assert result.error_before is None and result.error is not None and result.error <= 1
    assert result.evaluations <= 12
    assert passes(candidate, kept)
    assert result.parameters_kept is not None and 0 <= result.parameters_kept < 0.5


def test_an_answer_that_the_precision_lost_without_a_word_fails_and_is_found(session: Session, tools: Any, file: Path) -> None:
    """Eager in fp16 gives the same zeros, so no ratio to it says anything."""
    candidate = tools.candidate(f"{file}:silent", "null", "fp16", N=4)
    session.load(candidate)
    session.build()
    accuracy = session.verify(Tolerance()).accuracy
    assert not accuracy.passed and "too narrow for this model" in accuracy.reason
    result = session.sensitivity(Tolerance())
    assert result.kept == ("1",) and result.first_nonfinite is None


def test_a_set_chosen_by_error_passes_the_limit_that_was_asked_for(session: Session, tools: Any, file: Path) -> None:
    """Nothing overflows, and the user's own limit lies between bf16's error and fp32's."""
    candidate = tools.candidate(f"{file}:cancels", "eager", "bf16", N=16)
    limit = Tolerance(max_error=0.012)
    result = found(session, candidate, limit, budget=120)
    assert result.kept == ("layers.1.act", "layers.4.act"), result
    assert result.error_before is not None and result.error_before > 1
    assert result.error is not None and result.error <= 1
    assert passes(candidate, result.kept, limit)
    assert not passes(candidate, (), limit)
    if result.is_minimal:
        for name in result.kept:
            assert not passes(candidate, tuple(k for k in result.kept if k != name), limit)
    worst = [row.error for row in result.ranking if row.error is not None]
    assert worst == sorted(worst, reverse=True)


def test_a_precision_that_passes_says_that_it_is_not_at_fault(session: Session, tools: Any, file: Path) -> None:
    result = found(session, tools.candidate(f"{file}:stack", "null:fail=slightly_wrong", "fp16", N=4))
    assert result.kept == () and result.evaluations == 1
    assert "not the precision's" in result.note


def test_an_overflow_outside_every_module_has_no_set(session: Session, tools: Any, file: Path) -> None:
    result = found(session, tools.candidate(f"{file}:bare", "eager", "fp16", N=4))
    assert result.kept is None and result.error is None
    assert "not inside a module" in result.note


def test_a_quantised_layer_with_outliers_is_the_one_that_is_kept(session: Session, tools: Any, file: Path) -> None:
    candidate = tools.candidate(f"{file}:outliers", "eager", "int8", N=16)
    assert not passes(candidate, ())
    result = found(session, candidate, budget=100)
    assert result.kept is not None and any(name.startswith("layers.2") for name in result.kept), result
    assert len(result.kept) <= 3
    assert passes(candidate, result.kept)


def test_a_budget_is_kept(session: Session, tools: Any, file: Path) -> None:
    result = found(session, tools.candidate(f"{file}:handed_on", "eager", "fp16", N=4), budget=2)
    assert result.evaluations <= 2 and not result.is_minimal
    assert found(session, tools.candidate(f"{file}:handed_on", "eager", "fp16", N=4), seconds=0.0).evaluations == 0


def test_forms_whose_modules_cannot_be_cast_are_refused(session: Session, tools: Any, file: Path, tmp_path: Path) -> None:
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4)).eval())
    scripted.save(str(tmp_path / "m.pt"))
    candidate = tools.candidate(str(tmp_path / "m.pt"), N=2)
    ref = replace(candidate.model, trust=(str(tmp_path / "m.pt"),))
    session.load(replace(candidate, model=ref, inputs=replace(candidate.inputs, tensors=tensor("x:float32[N,4]"))))
    with pytest.raises(Unsupported, match="torchscript"):
        session.sensitivity(Tolerance())


def tensor(text: str) -> Any:
    from gpuopt.core.spec import TensorSpec

    return (TensorSpec.parse(text),)


def test_it_crosses_to_a_worker_and_leaves_the_model_as_it_was(tools: Any, file: Path) -> None:
    from gpuopt.pipeline import facts, isolate

    with isolate.Child() as child:
        candidate = tools.candidate(f"{file}:inside", "eager", "fp16", N=4)
        child.call("load", facts.Loaded, timeout_s=60.0, candidate=candidate)
        child.call("build", facts.Built, timeout_s=60.0)
        before = child.call("verify", facts.Verified, timeout_s=60.0, tolerance=Tolerance()).accuracy
        assert before.status is Status.NAN
        result = child.call("sensitivity", Sensitivity, timeout_s=60.0, tolerance=Tolerance(), budget=32)
        assert result.kept == ("layers.4.act",)
        assert child.call("verify", facts.Verified, timeout_s=60.0, tolerance=Tolerance()).accuracy == before
