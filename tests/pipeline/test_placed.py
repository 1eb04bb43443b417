"""Models that are built on the device: a session lets go of their weights while it times, and has them again for whoever asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpuopt import converters, loaders
from gpuopt.converters import change, precision
from gpuopt.core.errors import GpuoptError
from gpuopt.core.spec import BenchSpec, ModelRef, Precision, Tolerance, Transforms
from gpuopt.devices import info
from gpuopt.loaders import factory
from gpuopt.models import drawing
from gpuopt.pipeline import content, traits
from gpuopt.pipeline import session as sessions
from gpuopt.pipeline.session import Session

MODEL = "gpuopt.models:bert_large_tiny"


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU plays the GPU: what is asked of it by number is asked of a device. Returns what was built there."""
    asked: list[str] = []
    real = drawing.BankedDraws.__init__

    def noted(self: Any, device: Any = None, **kwargs: Any) -> None:
        if device is not None:
            asked.append(str(device))
        real(self, device, **kwargs)

    monkeypatch.setattr(drawing.BankedDraws, "__init__", noted)
    monkeypatch.setattr(sessions, "_home_of", lambda candidate: "cpu:0")
    monkeypatch.setattr(sessions, "_where", lambda module: "cpu" if next(module.parameters()).is_meta else "cpu:0")
    return asked


def broken_down(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of order")


def on_meta(session: Session) -> bool:
    assert session._model is not None
    return all(p.is_meta for p in session._model.module.parameters())


def test_what_was_loaded_is_let_go_of_while_a_copy_is_timed_and_comes_back(placed: list[str], tools: Any) -> None:
    session = Session()
    try:
        session.load(tools.candidate(MODEL, "eager", "bf16", N=2, S=8))
        session.build()
        first = session.verify(Tolerance()).accuracy
        assert first.passed
        assert not on_meta(session)
        assert placed == ["cpu:0"]
        session.measure(tools.QUICK)
        assert on_meta(session)
        session.warm(tools.QUICK)
        session.block(tools.QUICK)
        session.meters(BenchSpec(energy_s=0.0))
        assert placed == ["cpu:0"], "nobody asked for it"
        again = session.verify(Tolerance()).accuracy
        assert not on_meta(session)
        assert again == first
    finally:
        session.close()


def test_what_is_wrong_with_a_call_is_looked_for_on_the_host(placed: list[str], tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    try:
        session.load(tools.candidate(MODEL, "eager", "bf16", N=2, S=8))
        with monkeypatch.context() as broken, pytest.raises(GpuoptError, match="does not run"):
            broken.setattr(converters, "apply", broken_down)
            session.build()
        asked: list[str] = []
        real = loaders.load
        monkeypatch.setattr(loaders, "load", lambda ref, **kwargs: (asked.append(kwargs.get("device", "cpu")), real(ref, **kwargs))[1])
        session.diagnose(info.describe("cpu"), [])
        assert asked == ["cpu"]
    finally:
        session.close()


def test_a_candidate_that_runs_the_model_itself_keeps_it(placed: list[str], tools: Any) -> None:
    session = Session()
    try:
        session.load(tools.candidate(MODEL, "eager", N=2, S=8))
        session.build()
        session.measure(tools.QUICK)
        assert placed == ["cpu:0"]
        assert not on_meta(session)
    finally:
        session.close()


def test_a_users_own_factory_is_left_where_it_builds(placed: list[str], tools: Any, tmp_path: Any) -> None:
    (tmp_path / "own.py").write_text(
        "import gpuopt.models\nimport torch\n\ndef build():\n    model = gpuopt.models.bert_large_tiny()\n"
        "    model.probe = model.pooler.dense(torch.ones(1, 32))\n    return model\n\nbuild.input_specs = ('input_ids:int64[N,S]',)\n"
    )
    session = Session()
    try:
        session.load(tools.candidate(f"{tmp_path / 'own.py'}:build", "eager", "bf16", N=2, S=8))
        session.build()
        session.measure(tools.QUICK)
        assert placed == []
        assert not on_meta(session)
    finally:
        session.close()


def test_where_a_factory_may_build(tools: Any) -> None:
    def home(backend: str, device: str) -> str:
        return sessions._home_of(replace(tools.candidate(MODEL, backend), device=device))

    assert home("eager", "cuda:0") == home("inductor", "cuda:0") == "cuda:0"
    assert home("ort", "cuda:0") == "cpu", "exported on the CPU"
    assert home("eager", "cpu") == "cpu"


def test_a_model_built_there_has_the_digest_of_one_built_here() -> None:
    here = loaders.load(ModelRef(text=MODEL))
    there = loaders.load(ModelRef(text=MODEL), device="cpu:0")
    assert factory.places(MODEL)
    assert not factory.places("gpuopt.loaders:load")
    digests = {content.digest(model.module, limit_bytes=1 << 30) for model in (here, there)}
    assert len(digests) == 1


def test_bytes_of_a_device_are_hashed_as_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class There(torch.Tensor):
        """Says that it is elsewhere."""

        @property
        def device(self) -> torch.device:
            return torch.device("cuda:0")

    monkeypatch.setattr(content, "STAGED_BYTES", 1000)
    values = torch.randn(12345)
    assert content._hashed(values) == content._hashed(values.as_subclass(There))


def test_a_copy_made_on_another_device_ties_what_was_tied() -> None:
    model = loaders.load(ModelRef(text="gpuopt.models:t5_large_tiny"))
    twin = precision.copied(model.module, "cpu:0")
    assert twin.shared.weight is twin.lm_head.weight is twin.encoder.embed_tokens.weight
    ours, theirs = model.module.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)
    assert change.apply(model, Precision.BF16, Transforms(), device="cpu:0").dtype == "bfloat16"


@pytest.mark.parametrize("name", ["bert_large_tiny", "resnet101_tiny", "t5_large_tiny", "llama_70b_half_tiny"])
def test_what_a_search_asks_of_a_model_is_answered_without_its_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LARGE", 100)
    ref = ModelRef(text=f"gpuopt.models:{name}")
    assert any(p.is_meta for p in loaders.load(ref, device="meta").module.parameters())
    assert Session().traits(ref) == traits.of(loaders.load(ref))
