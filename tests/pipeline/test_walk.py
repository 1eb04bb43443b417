"""What a walk through every command found once: an ONNX file compiled, a file of ours that wants no consent, figures against the dtype that runs."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.errors import ResourceError, Unsupported
from gpuopt.core.result import Count, PrecisionAudit, Run, Status
from gpuopt.core.spec import BackendSpec, Precision
from gpuopt.pipeline import figures, isolate, jobs
from gpuopt.pipeline import machine as machines
from gpuopt.profiling.roofline import ImpossibleFigure
from gpuopt.trust import packages


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def onnx_file(local: Any, tools: Any, models: Any, tmp_path: Path) -> Path:
    jobs.convert(tools.job("convert", tools.candidate(models("net"), N=4), output=str(tmp_path / "net.onnx")))
    return tmp_path / "net.onnx"


def test_an_onnx_file_compiles_into_a_bundle_that_is_verified_again(local: Any, tools: Any, onnx_file: Path, tmp_path: Path) -> None:
    candidate = replace(tools.candidate(str(onnx_file)), backend=BackendSpec(name="ort"), dims={})
    jobs.compile(tools.job("compile", candidate, output=str(tmp_path / "out")))
    report = jobs.bench(tools.job("bench", replace(tools.candidate(str(tmp_path / "out")), dims={})))
    assert report.runs[0].status is Status.OK and report.runs[0].accuracy is not None and report.runs[0].accuracy.passed
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & stat.S_IRGRP, f"{path.name} can be read by its owner alone"


def test_a_program_convert_has_just_written_needs_no_consent(local: Any, tools: Any, models: Any, tmp_path: Path) -> None:
    jobs.convert(tools.job("convert", tools.candidate(models("net"), N=4), output=str(tmp_path / "net.pt2")))
    report = jobs.bench(tools.job("bench", replace(tools.candidate(str(tmp_path / "net.pt2")), dims={})))
    assert report.runs[0].status is Status.OK


def test_a_backend_no_trace_can_see_is_refused_before_it_is_built(
    local: Any, tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.pipeline.session import Session

    monkeypatch.setattr(Session, "build", lambda *_, **__: pytest.fail("it was built"))
    candidate = replace(tools.candidate(models("net"), N=4), backend=BackendSpec(name="aoti"))
    with pytest.raises(Unsupported, match="invisible"):
        jobs.profile(tools.job("profile", candidate))


def test_a_file_that_runs_in_another_dtype_stands_against_that_dtypes_ceiling() -> None:
    count = Count(records=(), flops=100.0, flops_by_dtype={"float16": 100.0}, bytes=0.0, coverage=1.0)
    run = Run(model="m", backend="ort", precision_audit=PrecisionAudit(shares={"float32": 0.9, "float16": 0.1}, method="", honoured=False))
    assert figures.as_run(count, run).flops_by_dtype == {"float32": pytest.approx(90), "float16": pytest.approx(10)}
    honoured = replace(run, precision_audit=PrecisionAudit(shares={"float16": 0.995, "float32": 0.005}, method="", honoured=True))
    assert figures.as_run(count, honoured) is count


def test_a_cpu_too_busy_to_be_measured_is_no_bug_of_gpuopt(local: Any, tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: Any, **__: Any) -> Any:
        raise ImpossibleFigure("120% of the measured peak")

    monkeypatch.setattr(figures, "measured", impossible)
    with pytest.raises(ResourceError, match="too busy") as told:
        jobs.profile(tools.job("profile", tools.candidate(models("net"), N=4)))
    assert told.value.exit_code == 5


def test_a_build_for_another_machine_measures_no_ceilings_of_this_one(
    tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[bool] = []

    def survey(job: Any, progress: Any, *, ceilings: bool = True) -> Any:
        asked.append(ceilings)
        raise KeyboardInterrupt

    monkeypatch.setattr(machines, "survey", survey)
    for build_only in (True, False):
        job = replace(tools.job("compile", tools.candidate(models("net"), N=4), output=str(tmp_path / "out")), build_only=build_only)
        with pytest.raises(KeyboardInterrupt):
            jobs.compile(job)
    assert asked == [False, True]


def test_no_child_and_no_caller_sends_anything_for_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isolate.child_environment()["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    packages.load("onnxruntime")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_half_weights_found_nonfinite_leave_the_module_that_is_evidence_as_it_was() -> None:
    from gpuopt.core.live import Inputs
    from gpuopt.pipeline import diagnosis

    class Big(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.large = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            torch.nn.init.constant_(self.large.weight, 6e4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.large(self.fine(x).abs() + 10)

    module = Big().eval()
    given = Inputs(args=(torch.ones(2, 4, dtype=torch.float16),))
    name = diagnosis._first_nonfinite(module, given, Precision.FP16, {"out": torch.full((2,), float("inf"))})
    assert name == "large"
    assert module.large.weight.dtype is torch.float32


def test_each_session_of_a_process_is_timed_with_its_own_switches(models: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches are the process's: whoever was built last would lend its own to all."""
    from gpuopt.converters import precision as switches
    from gpuopt.core.live import Inputs, Model
    from gpuopt.pipeline.session import Session

    now: list[Precision] = []
    seen: list[Precision] = []

    import contextlib

    @contextlib.contextmanager
    def flags(precision: Precision) -> Any:
        now.append(precision)
        try:
            yield
        finally:
            now.pop()

    monkeypatch.setattr(switches, "flags", flags)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(now[-1])
            return x + 1

    sessions = []
    for precision in (Precision.FP32, Precision.BF16):
        session = Session()
        candidate = replace(tools.candidate(""), precision=precision)
        session.adopt(
            candidate, Model(form="module", name="net", module=Net(), dtype="float32"), Inputs(args=(torch.ones(2, 2),), specs=())
        )
        session.build()
        sessions.append(session)
    for step in ("warm", "block", "meters", "measure"):
        for session, precision in zip(sessions, (Precision.FP32, Precision.BF16)):
            seen.clear()
            getattr(session, step)(tools.QUICK)
            assert set(seen) == {precision}, step
    for session in reversed(sessions):
        session.close()
