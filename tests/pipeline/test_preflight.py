"""What a job would end with anyway is told before the machine is measured, whatever the verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt import generation
from gpuopt.backends import eager, inductor, listed, load_backend
from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.generation import GenerateSpec
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BackendSpec, Candidate, EvalSpec, InputSpec, Job, ModelRef
from gpuopt.devices import ceilings
from gpuopt.pipeline import doctor, isolate, jobs, matrix, preflight
from gpuopt.pipeline.search import optimize

VERBS: dict[str, Callable[[Job], Any]] = {
    "profile": jobs.profile,
    "bench": jobs.bench,
    "compile": jobs.compile,
    "convert": jobs.convert,
    "doctor": doctor.doctor,
    "optimize": optimize.optimize,
}


@pytest.fixture
def unmeasurable(monkeypatch: pytest.MonkeyPatch, tools: Any) -> None:
    """Children without a process; measuring a ceiling is a failure of the test."""
    monkeypatch.setattr(isolate, "Child", lambda **_: tools.LocalChild())

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("the machine was measured first")

    monkeypatch.setattr(ceilings, "all_ceilings", measured)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrong", ["none.pt", "gpuopt.models:resnet1O1", "backend", "preset", "inputs", "eval_data", "metric"])
def test_what_is_misspelt_is_told_before_anything_is_measured(
    unmeasurable: None, tools: Any, models: Callable[[str], str], tmp_path: Path, verb: str, wrong: str
) -> None:
    good = tools.candidate(models("net"), N=2)
    changed = {
        "backend": replace(good, backend=BackendSpec(name="inducter")),
        "preset": replace(good, backend=BackendSpec(name="inductor", preset="max-autotune-typo")),
        "inputs": replace(good, inputs=InputSpec(file="none.npz")),
        "eval_data": replace(good, evaluation=EvalSpec(data="none.npz")),
        "metric": replace(good, evaluation=EvalSpec(data=__file__, metric="none.py:accuracy")),
    }.get(wrong, replace(good, model=replace(good.model, text=wrong)))
    output = str(tmp_path / "out.onnx") if verb == "convert" else str(tmp_path / "out")
    with pytest.raises(UsageError) as raised:
        VERBS[verb](tools.job(verb, changed, output=output))
    assert raised.value.fix


def test_a_search_is_told_of_a_preset_that_is_none_before_it_begins(unmeasurable: None, tools: Any, models: Callable[[str], str]) -> None:
    job = tools.job("optimize", tools.candidate(models("net"), N=2), search=SearchSpec(backends=("aoti", "inductor:reduced")))
    with pytest.raises(UsageError, match="inductor has no preset 'reduced'"):
        optimize.optimize(job)


def test_one_of_several_that_cannot_be_is_a_result_among_others(tools: Any, models: Callable[[str], str]) -> None:
    good = tools.candidate(models("net"))
    preflight.require(tools.job("bench", good, tools.candidate("none.pt")))
    with pytest.raises(UsageError, match="there is no file or folder none.pt"):
        preflight.require(tools.job("bench", *(tools.candidate("none.pt", backend) for backend in ("eager", "inductor"))))


@pytest.mark.parametrize("name", [*listed(), "null"])
def test_every_preset_that_a_backend_has_passes(name: str) -> None:
    try:
        known = load_backend(name).PRESETS
    except Unavailable:
        matrix.require_preset(name, "anything")  # its build says what is missing
        return
    for preset in known:
        matrix.require_preset(name, preset)


@pytest.mark.parametrize("way", ["inductor:gemv", "inductor:tuned", "eager:static"])
def test_a_way_to_generate_without_generation_is_told_as_that(way: str) -> None:
    asked = Job(verb="bench", candidates=(Candidate(model=ModelRef(text="gpuopt.models:bert_large_tiny"), backend=BackendSpec.parse(way)),))
    with pytest.raises(UsageError, match="a way to generate tokens") as refused:
        preflight.require(asked)
    assert "--generate N" in refused.value.fix
    preflight.require(replace(asked, generate=GenerateSpec(new_tokens=4)))


def test_only_presets_that_no_backend_has_are_ways_to_generate() -> None:
    assert preflight.ONLY_TO_GENERATE == {p for _, p in generation.WAYS if p is not None} - {*eager.PRESETS, *inductor.PRESETS}
