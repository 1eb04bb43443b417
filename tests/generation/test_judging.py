"""Which differences are a tie and which are an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.generation import WAYS, judging
from gpuopt.generation.judging import judge
from gpuopt.generation.shipped import Shipped
from gpuopt.generation.stepped import Stepped
from gpuopt.generation.subject import subject

_spec = importlib.util.spec_from_file_location("generation_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)

TIE = 1e-3
NOISE = 1e-3


def logits(lead: float, steps: int = 10) -> torch.Tensor:
    """[1, steps, 5]: token 1 leads token 2 by `lead` at step 3, by 1 elsewhere; the others are far behind."""
    found = torch.full((1, steps, 5), -3.0)
    found[..., 1], found[..., 2] = 1.0, 0.0
    found[0, 3, 2] = 1.0 - lead
    return found


def never() -> torch.Tensor:
    raise AssertionError("equal tokens need no second look")


def test_equal_tokens_pass_without_a_second_look() -> None:
    reference = torch.ones(1, 10, dtype=torch.int64)
    found = judge(reference.clone(), reference, logits(1.0), forced=never, again=never, dtype=torch.bfloat16)
    assert found.passed and found.equal and found.first_mismatch is None


@pytest.mark.parametrize(("lead", "passes"), [(TIE, True), (0.5, False)])
def test_a_lead_within_rounding_is_a_tie(lead: float, passes: bool) -> None:
    reference = torch.ones(1, 10, dtype=torch.int64)
    tokens = reference.clone()
    tokens[0, 3:] = 2  # from there on it went another way
    chosen = reference.clone()
    chosen[0, 3] = 2
    own = logits(lead)
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)) * NOISE
    found = judge(tokens, reference, own, forced=lambda: chosen, again=lambda: own + noise, dtype=torch.float32)
    assert found.passed is passes and not found.equal
    assert found.first_mismatch == 3
    assert (found.steps_checked, found.steps_agreeing) == (10, 9)
    assert found.gap == pytest.approx(lead, abs=1e-6)
    assert ("tie within rounding" in found.reason) is passes


def test_a_tie_does_not_excuse_what_comes_after_it() -> None:
    reference = torch.ones(1, 10, dtype=torch.int64)
    tokens = reference.clone()
    tokens[0, 3:] = 2
    chosen = reference.clone()
    chosen[0, 3] = chosen[0, 7] = 2  # at 7 eager's token leads by 1
    own = logits(TIE)
    found = judge(tokens, reference, own, forced=lambda: chosen, again=lambda: own + NOISE, dtype=torch.float32)
    assert not found.passed and "1 of 10 choices differ" in found.reason


def test_logits_that_are_not_finite_prove_nothing() -> None:
    reference = torch.ones(1, 10, dtype=torch.int64)
    own = logits(TIE)
    own[0, 0, 0] = float("nan")
    for tokens in (reference, reference + 1):
        assert not judge(tokens, reference, own, forced=never, again=never, dtype=torch.float32).passed


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("fault", ["position", "mask", "stale"])
def test_a_wrong_loop_is_never_a_tie(make: Callable[[str], Any], name: str, fault: str) -> None:
    """In bf16, where ties are common and excuse much."""
    found = subject(make(name).to(torch.bfloat16))
    prompt = _shared.text(batch=2)
    shipped = Shipped(found, new_tokens=20, stop_at_eos=False)
    reference, own = shipped.explained(prompt)
    loop = Stepped(found, WAYS["eager", "static"], batch=2, prompt_tokens=13, new_tokens=20, stop_at_eos=False, device="cpu")
    plain = loop.program.step

    def wrong() -> None:
        if fault == "position":
            loop.loop.index.add_(1)  # a hole in the cache
        elif fault == "mask":
            loop.loop.allowed[:, :2] = False
        else:
            loop.loop.token.fill_(7)
        plain()

    loop.program.step = wrong  # type: ignore[method-assign]
    tokens = loop(prompt)
    verdict = judge(
        tokens,
        reference,
        own,
        forced=lambda: loop.forced(prompt, reference),
        again=lambda: judging.at_once(found, prompt, reference),
        dtype=torch.bfloat16,
    )
    assert not verdict.passed, verdict.reason


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma", "t5"])
def test_two_right_ways_differ_by_rounding_alone(make: Callable[[str], Any], name: str) -> None:
    found = subject(make(name))
    prompt = _shared.text(batch=2)
    reference, own = Shipped(found, new_tokens=12, stop_at_eos=False).explained(prompt)
    again = judging.at_once(found, prompt, reference)
    assert again.shape == own.shape
    assert torch.allclose(again, own, atol=1e-3, rtol=1e-4)
