"""What `gpuopt stream` opens: weights from their files wherever they lie in files, the same bits as when they are loaded whole, and a word where they are loaded whole."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gpuopt import loaders
from gpuopt.core.errors import BadInput, GateFailed, Unavailable, UsageError
from gpuopt.core.spec import Candidate, ModelRef
from gpuopt.pipeline.streamed import model as stream_model
from gpuopt.streaming import anatomy, meta

sys.path.insert(0, str(Path(__file__).parent))

import streams


def built(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("stack_of_test", path.rpartition(":")[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build()


def test_bare_tensors_and_their_factory_are_filled_from_the_file(tmp_path: Path) -> None:
    arch = streams.factory(tmp_path)
    real = built(arch)
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.add_(1.0)  # not what the factory draws
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(real.state_dict(), file)
    ref = ModelRef(text=str(file), arch=arch)
    model, weights = stream_model.opened(Candidate(model=ref, device="simulated"))
    assert isinstance(weights, meta.Empty) and all(parameter.is_meta for parameter in model.module.parameters())
    assert model.signature and model.name == "weights"
    weights.materialize()
    whole = loaders.load(ref).module
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.module.parameters(), whole.parameters(), strict=True))
    weights.close()
    safetensors.torch.save_file({"other": torch.zeros(2)}, file)
    with pytest.raises(BadInput, match="lacks embed.weight"):
        stream_model.opened(Candidate(model=ref, device="simulated"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_in_a_file_is_refused_when_it_is_read_unless_it_is_allowed(tmp_path: Path, value: float) -> None:
    arch = streams.factory(tmp_path)
    state = dict(built(arch).state_dict())
    name = next(n for n, t in state.items() if t.dim() == 2 and "embed" not in n)
    state[name] = state[name].clone()
    state[name][-1, -1] = value
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state, file)
    ref = ModelRef(text=str(file), arch=arch)
    _, weights = stream_model.opened(Candidate(model=ref, device="simulated"))
    with pytest.raises(GateFailed, match=rf"weights.safetensors: tensor '{re.escape(name)}' holds 1 NaN or Inf") as refused:
        weights.materialize()
    assert "--allow-nonfinite" in refused.value.fix
    unit = next(u for u in anatomy.dissect(weights.module).units if any(place.name == name for place in u.places))
    with pytest.raises(GateFailed, match="NaN or Inf"):
        weights.fill_unit(unit, torch.empty(unit.num_bytes, dtype=torch.uint8))
    weights.close()
    _, weights = stream_model.opened(Candidate(model=replace(ref, allow_nonfinite=True), device="simulated"))
    weights.materialize()
    assert not bool(torch.isfinite(dict(weights.module.named_parameters())[name]).all())
    weights.close()


def test_a_factory_that_reads_its_weights_is_loaded_whole_with_a_word(tmp_path: Path) -> None:
    arch = streams.factory(tmp_path)
    source = Path(arch.rpartition(":")[0])
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(built(arch).state_dict(), file)
    source.write_text(source.read_text().replace("self.head = ", "self.mean = float(self.embed.weight.sum())\n        self.head = "))
    model, weights = stream_model.opened(Candidate(model=ModelRef(text=str(file), arch=arch), device="simulated"))
    assert not isinstance(weights, meta.Empty) and any("loaded whole" in note for note in model.notes)


def test_a_hub_model_that_cannot_be_fetched_or_named_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(Unavailable, match="cannot be fetched"):
        stream_model.opened(Candidate(model=ModelRef(text="hf:someone/model"), device="simulated"))
    with pytest.raises(UsageError, match="hf:OWNER/NAME"):
        stream_model.opened(Candidate(model=ModelRef(text="hf:../../etc"), device="simulated"))
