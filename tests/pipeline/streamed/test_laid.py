"""Our largest models streamed: their weights are made in the slabs, never anywhere else, and are those of the whole model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import streams

import gpuopt.models
from gpuopt.core.spec import Candidate, DimSpec, InputSpec, Job, ModelRef
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline import isolate
from gpuopt.pipeline.streamed import command, laid
from gpuopt.streaming import meta
from gpuopt.streaming.owned import Owned

SIZES = {"llama_70b_half_tiny": {"N": 1, "S": 4}, "t5_11b_tiny": {"N": 1, "S": 4, "T": 3}}
TIGHT = StreamSpec(budget_share=0.6)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "Child", streams.Inline)


def job(name: str, action: str, *specs: StreamSpec, device: str = streams.DEVICE, **more: Any) -> Job:
    sizes = SIZES[name]
    candidate = Candidate(
        model=ModelRef(text=f"gpuopt.models:{name}"),
        inputs=InputSpec(dims=tuple(DimSpec(name=k, values=(v,)) for k, v in sizes.items())),
        dims=sizes,
        device=device,
    )
    return Job(
        verb="stream", candidates=(candidate,), stream=StreamRequest(action=action, specs=specs, **{"calls": 6, "forwards": 6, **more})
    )


def done(asked: Job) -> Any:
    found = command.stream(asked).streamed
    assert found is not None
    return found


@pytest.mark.parametrize("name", SIZES)
def test_streamed_it_computes_what_the_whole_model_does(name: str, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[str] = []
    whole = laid.LaidWeights.materialize
    monkeypatch.setattr(laid.LaidWeights, "materialize", lambda self, names=None: (at_once.append(name), whole(self, names)))
    assert done(job(name, "run", TIGHT)).rows[0].measured.demand_fetches == 0
    assert not at_once, "its weights were only ever in the slabs"
    checks = {check.name: check.passed for check in done(job(name, "verify", TIGHT)).checks}
    assert checks == dict.fromkeys(("checksums", "outputs", "races", "order"), True)


def test_tokens_of_an_encoder_and_a_decoder_are_those_of_the_whole_model(inline: None) -> None:
    checks = {check.name: check.passed for check in done(job("t5_11b_tiny", "verify", TIGHT, generate=3)).checks}
    assert checks and all(checks.values())


def test_a_packed_folder_is_that_of_the_model_held_in_memory(tmp_path: Path, inline: None) -> None:
    folder = tmp_path / "packed"
    done(replace(job("llama_70b_half_tiny", "pack"), output=str(folder)))
    spec = StreamSpec(budget_share=0.6, disk=str(folder), pin_limit_bytes=1)
    seen = done(job("llama_70b_half_tiny", "run", spec, device="simulated:link=1e9,disk=1e8,block=0.05ms")).rows[0].measured
    assert set(seen.plan.homes.values()) == {"disk"}


@pytest.mark.parametrize("name", SIZES)
def test_the_fingerprint_is_that_of_the_model_held_in_memory(name: str) -> None:
    found = laid.opened(ModelRef(text=f"gpuopt.models:{name}"))
    assert found is not None
    model, weights = found
    assert model.num_parameters == sum(p.numel() for p in weights.module.parameters())
    assert model.signature and model.dtype == "bfloat16"
    whole = Owned(getattr(gpuopt.models, name)())
    assert weights.fingerprint() == whole.fingerprint()
    weights.materialize()
    assert weights.fingerprint() == whole.fingerprint()


def test_other_factories_are_none_of_its_business(tmp_path: Path) -> None:
    assert laid.opened(ModelRef(text="gpuopt.models:bert_large_tiny")) is None
    assert laid.opened(ModelRef(text=streams.factory(tmp_path))) is None


def test_a_plan_of_a_model_larger_than_this_machine_takes_no_memory(inline: None) -> None:
    from gpuopt.pipeline import hostmemory
    from gpuopt.programs.hollow import hollow

    before = hostmemory.peak_bytes() or 0
    found = laid.opened(ModelRef(text="gpuopt.models:llama_70b_half"))
    assert found is not None
    slab = torch.empty(8192, dtype=torch.bfloat16)
    found[1].fill("model.norm.weight", slab)
    assert torch.equal(slab, torch.ones(8192, dtype=torch.bfloat16))
    assert all(p.is_meta for p in hollow(gpuopt.models.llama_70b_half).parameters())
    assert meta.fingerprint is not None and (hostmemory.peak_bytes() or 0) - before < 1 << 30
