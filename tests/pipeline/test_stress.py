"""Inputs at other scales, and models that no candidate can be held against: what is judged, what is skipped, and what is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.live import Inputs
from gpuopt.core.result import Accuracy, Status
from gpuopt.core.spec import TensorSpec, Tolerance
from gpuopt.pipeline import stress
from gpuopt.pipeline.session import Session

SOURCE = '''
import torch
from torch import nn


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(16, 8)

    def forward(self, x):
        return self.line(x)


class Noisy(Line):
    """Random in eval mode."""

    def forward(self, x):
        return self.line(x) + 0.1 * torch.randn_like(x[:, :8])


class Counting(Line):
    """Keeps state in a buffer, which is part of the answer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return self.line(x) * self.steps


class Remembering(Line):
    """Keeps state in a plain attribute."""

    def forward(self, x):
        out = self.line(x) + getattr(self, "last", 0.0)
        self.last = out
        return out


class Seen(Line):
    """Counts its calls and does nothing with the number: an honest model."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return {"out": self.line(x), "more": [self.line(x[:1]), (x.argmax(-1),)]}


class Branching(Line):
    """Another answer where its input is large."""

    def forward(self, x):
        if float(x.abs().max()) > 15:
            return self.line(x) * 2 + 1
        return self.line(x)


class Hot(Line):
    """Overflows in fp16 at ten times the input, in eager too."""

    def forward(self, x):
        return self.line(x * 1e2).pow(2)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.line = nn.Embedding(50, 16), nn.Linear(16, 8)

    def forward(self, ids, mask):
        return self.line(self.embed(ids) * mask.unsqueeze(-1).float().to(self.line.weight.dtype))


class Picky(Words):
    """Takes no two ids that are alike."""

    def forward(self, ids, mask):
        if bool((ids == ids[0, 0]).all()):
            raise ValueError("ids all alike")
        return super().forward(ids, mask)


class Selfsame(Line):
    """Hands back its own input among its outputs."""

    def forward(self, x):
        return x, self.line(x)


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


def factory(kind, *specs):
    def build():
        return made(kind)

    build.input_specs = specs
    return build


X = "x:float32[N,16]"
IDS = ("ids:int64[N,S]<50", "mask:int64[N,S]=1")
line, noisy, counting, remembering = (factory(k, X) for k in (Line, Noisy, Counting, Remembering))
seen, branching, hot, selfsame = (factory(k, X) for k in (Seen, Branching, Hot, Selfsame))
words, picky = factory(Words, *IDS), factory(Picky, *IDS)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "odd.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


def verified(session: Session, candidate: Any, mode: str = "full") -> Accuracy:
    session.load(candidate)
    session.build()
    return session.verify(Tolerance(), mode).accuracy


def said(accuracy: Accuracy, text: str) -> bool:
    return any(text in note for note in accuracy.notes)


# --- the inputs


def call(*pairs: tuple[str, torch.Tensor]) -> Inputs:
    specs = tuple(TensorSpec.parse(text) for text, _ in pairs)
    return Inputs(args=(pairs[0][1],), kwargs={s.name: t for s, (_, t) in zip(specs[1:], pairs[1:], strict=True)}, specs=specs)


def test_floats_are_scaled_ids_are_made_alike_and_masks_are_left() -> None:
    x, ids, mask, flags = (
        torch.randn(2, 3),
        torch.tensor([[3, 4], [5, 6]]),
        torch.ones(2, 2, dtype=torch.int64),
        torch.tensor([True, False]),
    )
    given = call(("x:float32[2,3]", x), ("ids:int64[2,2]<10", ids), ("mask:int64[2,2]=1", mask), ("flags:bool[2]", flags))
    (low_name, low), (high_name, high) = stress.batches(given)
    assert (low_name, high_name) == ("inputs x0.1, one id", "inputs x10, the largest id")
    assert torch.equal(low.args[0], x * 0.1) and torch.equal(high.args[0], x * 10)
    assert torch.equal(low.kwargs["ids"], torch.full_like(ids, 3)) and torch.equal(high.kwargs["ids"], torch.full_like(ids, 9))
    for made in (low, high):
        assert torch.equal(made.kwargs["mask"], mask) and torch.equal(made.kwargs["flags"], flags)
    assert torch.equal(given.args[0], x), "the first inputs are as they were"


def test_there_is_nothing_to_scale_in_masks_and_flags_and_no_ids_at_all() -> None:
    assert stress.batches(call(("mask:int64[2]=1", torch.ones(2, dtype=torch.int64)))) == []
    assert stress.batches(call(("x:int64[2]", torch.ones(2, dtype=torch.int64)))) == [], "whole numbers of no known range are no ids"
    empty = stress.batches(call(("ids:int64[0,4]<10", torch.ones(0, 4, dtype=torch.int64))))
    assert empty == []


# --- the verdict


def test_an_honest_candidate_passes_at_every_scale(session: Session, tools: Any, file: Path) -> None:
    for model in ("line", "seen", "selfsame", "words"):
        accuracy = verified(session, tools.candidate(f"{file}:{model}", "null", N=4))
        assert accuracy.passed, (model, accuracy.reason)
        assert {s.name: s.passed for s in accuracy.stages}["scales"], model
        assert (
            accuracy.relative_rmse == next(s for s in accuracy.stages if s.name == "precision").outputs[0].relative_rmse or model != "line"
        )


def test_a_candidate_that_clips_large_inputs_is_found(session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt.backends import null

    real = null.NullRunner.__call__
    monkeypatch.setattr(null.NullRunner, "__call__", lambda self, x: real(self, x=x.clamp(-8, 8)))
    accuracy = verified(session, tools.candidate(f"{file}:line", "null", N=4))
    assert not accuracy.passed and "inputs x10" in accuracy.reason
    assert {s.name: s.passed for s in accuracy.stages} == {"structure": True, "precision": True, "scales": False}
    assert verified(session, tools.candidate(f"{file}:line", "null", N=4), "precision").passed, "--verify precision leaves the scales out"


def test_a_candidate_that_overflows_where_eager_does_not_is_found(
    session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.backends import null

    real = null.NullRunner.__call__
    monkeypatch.setattr(null.NullRunner, "__call__", lambda self, x: real(self, x=x) * (torch.inf if x.abs().max() > 15 else 1.0))
    accuracy = verified(session, tools.candidate(f"{file}:line", "null", "fp16", N=4))
    assert accuracy.status is Status.NAN and "NaN or Inf" in accuracy.reason


def test_a_candidate_that_fails_at_the_last_id_is_found(session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt.backends import null

    real = null.NullRunner.__call__

    def short_table(self: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        if bool((ids == 49).all()):
            raise RuntimeError("index 49 is out of bounds")
        return real(self, ids=ids, mask=mask)

    monkeypatch.setattr(null.NullRunner, "__call__", short_table)
    accuracy = verified(session, tools.candidate(f"{file}:words", "null", N=4, S=5))
    assert not accuracy.passed and "the largest id: RuntimeError: index 49" in accuracy.reason


def test_where_eager_overflows_or_refuses_nothing_is_judged_and_it_is_said(session: Session, tools: Any, file: Path) -> None:
    accuracy = verified(session, tools.candidate(f"{file}:hot", "null", "fp16", N=4))
    assert accuracy.passed, accuracy.reason
    assert said(accuracy, "inputs x10: not judged, eager at the same precision overflows there itself")
    accuracy = verified(session, tools.candidate(f"{file}:picky", "null", N=4, S=5))
    assert accuracy.passed, accuracy.reason
    assert said(accuracy, "one id: not judged, the model itself does not run there: ValueError: ids all alike")


# --- rows 55, 56 and 61


@pytest.mark.parametrize(
    ("model", "why"),
    [("noisy", "draws random numbers"), ("counting", "state between calls, in steps"), ("remembering", "state between calls, in last")],
)
def test_55_a_model_that_is_not_at_one_with_itself_verifies_nothing(
    model: str, why: str, session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own noise is eager's error, and three times that would excuse almost any candidate."""
    accuracy = verified(session, tools.candidate(f"{file}:{model}", "null", "bf16", N=4))
    assert not accuracy.passed and accuracy.status is Status.ACCURACY_FAIL
    assert why in accuracy.reason and "nothing can be held against it" in accuracy.reason


def test_55_as_it_is_a_random_model_can_be_timed_and_says_what_it_is(session: Session, tools: Any, file: Path) -> None:
    accuracy = verified(session, tools.candidate(f"{file}:noisy", "eager", N=4))
    assert accuracy.passed and said(accuracy, "draws random numbers")


def test_56_outputs_that_the_next_call_overwrites_are_compared_as_they_were_returned(
    session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph's outputs are its own memory: right when they come, another call's answer later."""
    from gpuopt.backends import null

    real = null.NullRunner.__call__
    memory: list[torch.Tensor] = []

    def replayed(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = real(self, x=x)
        if not memory:
            memory.append(out.clone())
        return memory[0].copy_(out)

    monkeypatch.setattr(null.NullRunner, "__call__", replayed)
    accuracy = verified(session, tools.candidate(f"{file}:line", "null", N=4))
    assert accuracy.passed, accuracy.reason
    assert said(accuracy, "overwritten by the next one")


def test_56_inputs_changed_on_a_later_batch_alone_are_noticed(
    session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.backends import null

    real = null.NullRunner.__call__
    session.load(tools.candidate(f"{file}:line", "null", N=4))
    session.build()
    first = session._given().kwargs["x"].clone()

    def writes(self: Any, x: torch.Tensor) -> Any:
        out = real(self, x=x)
        if not torch.equal(x, first):
            x.zero_()
        return out

    monkeypatch.setattr(null.NullRunner, "__call__", writes)
    accuracy = session.verify(Tolerance()).accuracy
    assert not accuracy.passed and "writes into its inputs" in accuracy.reason


def test_61_code_frozen_on_one_branch_is_found_at_another_scale(
    session: Session, tools: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an exporter that asks no questions makes of an `if`: the branch it saw, for ever."""
    from gpuopt.backends import null

    candidate = tools.candidate(f"{file}:branching", "null", N=4)
    assert verified(session, candidate).passed, "the model itself takes either branch"
    assert session._changed is not None
    frozen = session._changed.module.line
    monkeypatch.setattr(null.NullRunner, "__call__", lambda self, x: frozen(x))
    accuracy = session.verify(Tolerance()).accuracy
    assert not accuracy.passed and "x10" in accuracy.reason


def test_the_users_own_tensors_are_scaled_too(session: Session, tools: Any, file: Path, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32))
    candidate = tools.candidate(f"{file}:line", "null")
    accuracy = verified(session, replace(candidate, inputs=replace(candidate.inputs, file=str(tmp_path / "x.npz"))))
    assert accuracy.passed and {s.name for s in accuracy.stages} == {"structure", "precision", "scales"}
