"""fp8, int8, w8 and w4 from the ask to the verdict: the carrier in every input and twin, the gate that judges them, the audit and the notes a report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.accuracy import tolerance
from gpuopt.backends import load_backend
from gpuopt.bundles import write
from gpuopt.converters import int4, quantised
from gpuopt.core.errors import Unsupported
from gpuopt.core.result import Status
from gpuopt.core.spec import Precision, Tolerance
from gpuopt.pipeline import figures, manifests
from gpuopt.pipeline.session import Session

SOURCE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + 2.0 * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(64, 32), nn.Linear(32, 8)).eval()


def images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


net.input_specs = ("x:float32[N,64]",)
images.input_specs = ("x:float32[N,3,8,8]",)
"""
ALL = ("fp8", "int8", "w8", "w4")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    (tmp_path / "eight.py").write_text(SOURCE, encoding="utf-8")
    return lambda name: f"{tmp_path / 'eight.py'}:{name}"


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


@pytest.mark.parametrize("to", ALL)
def test_a_quantised_candidate_is_judged_by_its_signal_against_fp64_of_the_original(
    to: str, session: Session, source: Any, tools: Any, tmp_path: Path
) -> None:
    candidate = tools.candidate(source("net"), "eager", to, N=20)
    run = figures.loaded(figures.started(candidate), session.load(candidate))
    built = session.build()
    assert built.audit is not None and built.audit.honoured and built.audit.requested == to
    assert any("linear layers" in note for note in built.notes) and any("(narrower than 32)" in note for note in built.notes)
    run = figures.verified(figures.built(run, built, candidate), session.verify(Tolerance()))
    assert run.status is Status.OK, run.reason
    assert any("on a CPU" in note for note in run.notes)
    assert run.accuracy is not None and run.accuracy.reference.startswith("fp64")
    stage = next(stage for stage in run.accuracy.stages if stage.name == "precision")
    (output,) = stage.outputs
    least = tolerance.SNR_DB[Precision(to)]
    assert output.dtype == "bfloat16" and output.snr_db is not None and output.snr_db > least + 2
    assert output.rms_reference is not None and output.limit_rmse == pytest.approx(output.rms_reference * 10 ** (-least / 20))
    # Its bundle comes back and is held against the same reference.
    target = tmp_path / "bundle"
    with write.staging(target) as folder:
        write.publish(folder, target, manifests.assemble(candidate, run, session.save(str(folder)), verified=True))
    again = Session()
    try:
        again.load(tools.candidate(str(target)))
        again.build()
        assert again.verify(Tolerance()).accuracy.passed
    finally:
        again.close()


@pytest.mark.parametrize("to", ["fp8", "int8", "w4"])
def test_scales_that_are_too_coarse_do_not_pass(
    to: str, session: Session, source: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate must be able to fail: weights a tenth of whose rows lost their scale, a third where there are four bits of each."""
    honest = quantised.quantise

    def careless(module: Any, *args: Any, **kwargs: Any) -> list[str]:
        notes = honest(module, *args, **kwargs)
        for part in module.modules():
            if isinstance(part, quantised.EightBitLinear):
                part.scale[::10] *= 2.0
            if isinstance(part, int4.Int4WeightLinear):
                part.scale[:, ::3] *= 2.0
        return notes

    monkeypatch.setattr(quantised, "quantise", careless)
    session.load(tools.candidate(source("net"), "eager", to, N=20))
    session.build()
    accuracy = session.verify(Tolerance()).accuracy
    assert not accuracy.passed and "signal to noise" in accuracy.reason


def test_inputs_are_the_carriers(session: Session, source: Any, tools: Any) -> None:
    session.load(tools.candidate(source("net"), "eager", "fp8", N=3))
    session.build()
    assert session._given().args[0].dtype == torch.bfloat16


def test_convolutions_alone_are_refused_with_the_reason(session: Session, source: Any, tools: Any) -> None:
    session.load(tools.candidate(source("images"), "eager", "fp8", N=2))
    with pytest.raises(Unsupported, match="made for linear layers") as caught:
        session.build()
    assert "1 Conv2d" in caught.value.message


def test_a_backend_that_reads_onnx_says_why_not(session: Session, source: Any, tools: Any) -> None:
    session.load(tools.candidate(source("net"), "ort", "w8", N=2))
    with pytest.raises(Unsupported, match="quantize and dequantize nodes"):
        session.build()


@pytest.mark.parametrize("name", ["eager", "inductor", "aoti", "cudagraphs"])
@pytest.mark.parametrize("to", ALL)
def test_torchs_own_backends_take_a_module_and_no_fixed_graph(name: str, to: str) -> None:
    backend = load_backend(name)
    assert backend.supports("module", Precision(to), "cuda:0") is None
    for form in backend.FORMS - {"module"}:
        assert "replaces a module's layers" in str(backend.supports(form, Precision(to), "cuda:0")) or form == "torchscript"
