"""The doctor's verb: broken models, changes that are made and measured, rules that fail, gates over findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.result import Finding, Report, Run, Status
from gpuopt.core.spec import BackendSpec, Candidate, Change, Job, ModelRef, Precision
from gpuopt.doctor import diagnose as doctor_stage
from gpuopt.pipeline import doctor, gates, jobs, probing
from gpuopt.pipeline import session as session_stage
from gpuopt.pipeline.session import Session

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


COMPILED = """
import torch
class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.calls = torch.nn.Linear(16, 16), 0
    def forward(self, x):
        self.calls += 1
        return self.lin(x) + min(self.calls, 3) - 3
class Even(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(16, 16)
    def forward(self, x):
        y = self.lin(x)
        if y.sum() > 1e9:
            y = y + 1
        return self.lin(y) if x.shape[0] % 2 == 0 else y
class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(16, 16)
    def forward(self, x):
        return self.lin(x)
class Doubled(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16, dtype=torch.float64))
    def forward(self, x):
        return self.lin(x) - self.mean
def counting(): return Counting().eval()
def even(): return Even().eval()
def plain(): return Plain().eval()
def doubled(): return Doubled().eval()
for _made in (counting, even, plain, doubled):
    _made.input_specs = ("x:float32[N,16]",)
"""


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    path = tmp_path / "compiled.py"
    path.write_text(COMPILED)
    return path


def told(report: Report, code: str) -> list[Finding]:
    return [f for f in report.findings if f.code == code]


def compile_doctor(tools: Any, path: Path, factory: str) -> Report:
    job = tools.job("doctor", tools.candidate(f"{path}:{factory}", "inductor", N=4))
    return doctor.doctor(replace(job, bench=replace(job.bench, verify="off")))


@pytest.mark.slow  # four compilations
def test_a_model_that_is_compiled_in_every_call_is_told_its_guard(local: Any, tools: Any, compiled: Path) -> None:
    report = compile_doctor(tools, compiled, "counting")
    (only,) = told(report, "GPU502")
    assert "self.calls ==" in only.message and only.line is not None and only.line.startswith("compiled.py:") and (only.count or 0) >= 2


def test_other_sizes_and_breaks_of_a_compiled_model_are_told_with_their_lines(local: Any, tools: Any, compiled: Path) -> None:
    report = compile_doctor(tools, compiled, "even")
    (broken_graph,) = told(report, "GPU501")
    number = next(i for i, text in enumerate(COMPILED.splitlines(), 1) if "y.sum() > 1e9" in text)
    assert broken_graph.line == f"compiled.py:{number}" and "Data-dependent branching" in broken_graph.message
    again = told(report, "GPU502")
    assert any("% 2)" in f.message for f in again), again
    assert told(compile_doctor(tools, compiled, "plain"), "GPU502") == []


def test_a_model_as_it_is_keeps_its_float64_buffer_and_pays_for_it(local: Any, tools: Any, compiled: Path) -> None:
    """Cast to the dtype of its weights, the buffer would cost nothing and the finding would have no figure."""
    session = Session()
    try:
        session.load(tools.candidate(f"{compiled}:doubled", N=4))
        session.build()
        module, given = session.changed_module(), session._given()
        assert module.mean.dtype.is_floating_point and str(module.mean.dtype) == "torch.float64"
        assert str(session.runner()(*given.args, **given.kwargs).dtype) == "torch.float64"
    finally:
        session.close()
    (only,) = told(doctor.doctor(tools.job("doctor", tools.candidate(f"{compiled}:doubled", N=4))), "GPU201")
    assert only.time_ms is not None and only.change == Change(precision=Precision.FP32)


def test_a_precision_that_was_asked_for_is_cast_to(local: Any, tools: Any, compiled: Path) -> None:
    session = Session()
    try:
        session.load(tools.candidate(f"{compiled}:doubled", precision="fp32", N=4))
        session.build()
        assert str(session.changed_module().mean.dtype) == "torch.float32"
    finally:
        session.close()


def seen_evidence(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(session_stage.doctor, "diagnose", lambda evidence, **more: found.append(evidence) or ())
    return found


def test_evidence_says_what_was_asked_for_and_what_the_users_process_has(
    local: Any, tools: Any, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seen_evidence(monkeypatch)
    # As a new process has them, whatever tests before this one left; `local` puts them back.
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    for precision in (None, "fp32"):
        doctor.doctor(tools.job("doctor", tools.candidate(f"{compiled}:plain", precision=precision, N=4)))
    as_is, asked = found
    assert as_is.precision is None and asked.precision == "fp32"
    for evidence in found:  # both ran with TF32 off; a process with torch's defaults has it on in cuDNN
        assert evidence.flags["matmul_tf32"] is False and evidence.flags["cudnn_tf32"] is False
        assert evidence.flags["own_matmul_tf32"] is False and evidence.flags["own_cudnn_tf32"] is True


def test_larger_batches_are_timed_for_the_doctor_on_a_gpu_alone_and_never_for_a_profile(
    local: Any, tools: Any, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seen_evidence(monkeypatch)
    monkeypatch.setattr(probing, "settle", lambda call, device: None)
    doctor.doctor(tools.job("doctor", tools.candidate(f"{compiled}:plain", N=4)))
    survey = tools.fake_survey()
    session = Session()
    try:
        session.load(tools.candidate(f"{compiled}:plain", N=4))
        session.build()
        session.probe(replace(survey.device, kind="cuda"), 0.05)
        curve = dict(session._seen.batch_curve)
    finally:
        session.close()
    assert set(curve) == {4, 8, 16} and curve[4] == 0.05 and all(ms > 0 for ms in curve.values())
    assert found[0].batch_curve == {}


@pytest.mark.parametrize(("change", "words"), [(None, "no finding here is a change"), (Change(precision=Precision.BF16), "--unsafe-fixes")])
def test_fix_that_changes_nothing_says_so(
    change: Change | None, words: str, local: Any, tools: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda seat, job, machine: (made_up(change, safe=False),))
    report = doctor.doctor(replace(tools.job("doctor", tools.candidate(models("net"), N=4)), fix=True))
    assert any(words in note for note in report.runs[0].notes)


def test_fix_makes_a_rewrite_and_shows_which_run_it_is(local: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rules know which rewrites this model's code takes."""
    pytest.importorskip("transformers")
    from gpuopt.reports import console

    seen: list[Any] = []

    def judged(evidence: Any, **_: Any) -> tuple[Finding, ...]:
        seen.append(evidence)
        return (made_up(Change(rewrites=("no_mask",)), safe=True, low=0.0, high=9.0),)

    monkeypatch.setattr(session_stage.doctor, "diagnose", judged)
    job = replace(tools.job("doctor", tools.candidate("gpuopt.models:bert_large_tiny", N=1, S=16)), fix=True)
    report = doctor.doctor(job)
    assert seen[0].can_rewrite("no_mask") and seen[0].rewrites["fuse_conv"], "a model without convolutions has none to fuse"
    assert [run.transforms for run in report.runs] == [(), ("no_mask",)] and report.runs[1].status is Status.OK
    text = console.text(report, width=100)
    assert "no_mask" in text[text.index("\nSpeed") : text.index("FLOPs:", text.index("\nSpeed"))]
