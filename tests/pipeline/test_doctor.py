"""The doctor's verb: broken models, changes that are made and measured, rules that fail, gates over findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.core.errors import UsageError
from gpuopt.core.result import Finding, Report, Run, Status
from gpuopt.core.spec import BackendSpec, Candidate, Change, Job, ModelRef, Precision
from gpuopt.doctor import diagnose as doctor_stage
from gpuopt.pipeline import doctor, gates, jobs

BROKEN = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(17, 4)
    def forward(self, x):
        return self.second(torch.relu(self.first(x)))
class Left(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.scale = torch.ones(16, dtype=torch.float64)
    def forward(self, x):
        return self.first(x) @ self.scale
def net():
    return Net()
def left():
    return Left()
"""


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    return path


@pytest.mark.parametrize(("factory", "code", "words"), [("net", "GPU703", "second"), ("left", "GPU702", "scale")])
def test_a_model_that_does_not_run_is_told_which_module_and_which_tensor(
    local: Any, tools: Any, broken: Path, factory: str, code: str, words: str
) -> None:
    report = doctor.doctor(tools.job("doctor", tools.candidate(f"{broken}:{factory}")))
    errors = [f for f in report.findings if f.severity == "error"]
    assert [f.code for f in errors] == [code]
    assert words in errors[0].message and errors[0].fix
    assert report.runs[0].status is not Status.OK
    assert gates.exit_code(report) == 1


def test_a_healthy_model_has_its_waterfall_and_no_error(local: Any, tools: Any, models: Any) -> None:
    report = doctor.doctor(tools.job("doctor", tools.candidate(models("net"), N=4)))
    assert report.runs[0].waterfall is not None
    assert not [f for f in report.findings if f.severity == "error"]
    assert gates.exit_code(report) == 0


def made_up(change: Change | None, *, safe: bool, low: float = 0.1, high: float = 0.2) -> Finding:
    return Finding(
        code="GPU999",
        rule="made-up",
        severity="warning",
        message="m",
        fix="f",
        safe=safe,
        change=change,
        gain_low_ms=low,
        gain_high_ms=high,
    )


def test_fix_makes_safe_changes_alone_and_sets_what_they_gave_beside_what_was_predicted(
    local: Any, tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(tools.candidate(models("net"), N=4), backend=BackendSpec(name="null", options={"sleep_ms": 120}))
    quick = Change(backend=BackendSpec(name="null", options={"sleep_ms": 20}))
    findings = (
        made_up(quick, safe=True, low=30, high=200),
        made_up(quick, safe=True, low=1, high=2),
        made_up(Change(precision=Precision.BF16), safe=False),
        made_up(None, safe=False),
    )
    monkeypatch.setattr(doctor, "diagnose", lambda seat, job, machine: findings)
    job = replace(tools.job("doctor", slow), fix=True)
    job = replace(job, bench=replace(job.bench, verify="off"))
    report = doctor.doctor(job)
    assert [run.options.get("sleep_ms") for run in report.runs] == [120, 20]
    first, second, unsafe, mine = report.findings[:4]
    assert first.measured_gain_ms == pytest.approx(100, abs=70) and first.confirmed is True
    assert second.confirmed is False, "a prediction that missed says so"
    assert unsafe.measured_gain_ms is None and mine.measured_gain_ms is None
    assert report.runs[1].relative is not None and report.runs[1].relative.verdict == "faster"


def test_a_change_is_verified_though_the_model_as_it_is_was_not(
    local: Any, tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda seat, job, machine: (made_up(Change(precision=Precision.BF16), safe=True),))
    report = doctor.doctor(replace(tools.job("doctor", tools.candidate(models("net"), N=4)), fix=True))
    base, changed = report.runs
    assert base.accuracy is None and changed.accuracy is not None and changed.accuracy.passed


def test_several_changes_are_measured_alone_and_together() -> None:
    base = Candidate(model=ModelRef(text="m"))
    made = doctor._together(base, [Change(channels_last=True), Change(fold_batch_norm=True), Change(precision=Precision.FP16)])
    assert made.transforms.channels_last and made.transforms.fold_batch_norm and made.precision is Precision.FP16


def test_a_change_keeps_what_it_does_not_name() -> None:
    base = Candidate(model=ModelRef(text="m"), precision=Precision.BF16, dims={"N": 2}, backend=BackendSpec(name="ort"))
    made = Change(channels_last=True, inputs=("mask:int64[N,S]=1",), dims={"S": 8}).applied(base)
    assert made.precision is Precision.BF16 and made.backend == base.backend
    assert made.dims == {"N": 2, "S": 8}
    assert str(made.inputs.tensors[0]) == "mask:int64[N,S]=1"


@pytest.mark.parametrize(
    ("severities", "fail_on", "passed"),
    [((), "info", True), (("info",), "warning", True), (("info", "warning"), "warning", False), (("error",), "error", False)],
)
def test_fail_on_is_a_gate_over_the_findings(severities: tuple[str, ...], fail_on: str, passed: bool) -> None:
    found = [Finding(code="GPU999", severity=s, message="m") for s in severities]
    (gate,) = doctor._judged(found, fail_on)
    assert gate.passed is passed
    report = Report(
        schema_version=1, command="", verb="doctor", environment=tools_environment(), findings=tuple(found), gates=(gate,),
        runs=(Run(model="m", backend="eager"),),
    )  # fmt: skip
    assert gates.exit_code(report) == (0 if passed else 1)
    assert doctor._judged(found, None) == ()


def tools_environment() -> Any:
    from gpuopt.core.result import Environment

    return Environment(gpuopt="", python="", platform="")


def test_a_rule_that_raises_is_its_own_failure_and_the_others_are_heard(
    local: Any, tools: Any, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.doctor import rule

    table = dict(rule.rules())
    table["GPU000"] = replace(table["GPU703"], code="GPU000", name="broken-rule", find=lambda evidence: [][0])
    monkeypatch.setattr(doctor_stage, "rules", lambda: table)
    report = doctor.doctor(tools.job("doctor", tools.candidate(f"{broken}:net")))
    codes = {f.code: f for f in report.findings}
    assert "this rule failed: IndexError" in codes["GPU000"].message and "--ignore GPU000" in codes["GPU000"].fix
    assert "GPU703" in codes


def test_ignored_rules_stay_silent_by_code_and_by_name(local: Any, tools: Any, broken: Path) -> None:
    for name in ("GPU702", "dtype-mismatch"):
        job = replace(tools.job("doctor", tools.candidate(f"{broken}:left")), ignore=(name,))
        try:
            found = doctor.doctor(job).findings
        except UsageError:  # nothing is left to say why it failed: the failure itself is the answer
            continue
        assert "GPU702" not in {f.code for f in found}


def test_without_a_model_the_machine_is_looked_at(local: Any, tools: Any) -> None:
    report = doctor.doctor(Job(verb="doctor", device="cpu"))
    assert report.runs == () and report.device is not None
    assert not [f for f in report.findings if "rule failed" in f.message]


def test_profile_shows_findings_too(local: Any, tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"GPU999": replace(next(iter(doctor_stage.rules().values())), code="GPU999", needs=frozenset({"trace"}), find=lambda e: [made_up(None, safe=False)])}  # fmt: skip
    monkeypatch.setattr(doctor_stage, "rules", lambda: table)
    report = jobs.profile(tools.job("profile", tools.candidate(models("net"), N=4)))
    assert "GPU999" in {f.code for f in report.findings}
