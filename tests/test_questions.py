"""The four questions this project began with: each script runs here in seconds, and is diagnosed. On a GPU the same, with what only a GPU shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gpuopt.core.result import Environment, Finding, Report, Status
from gpuopt.doctor.rule import rules
from gpuopt.pipeline import scripts

ROOT = Path(__file__).parent.parent
HERE = Environment(gpuopt="0", python="3", platform="test")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(name: str, *words: str, traced: bool = False) -> Report:
    return scripts.run([sys.executable, f"recipes/questions/{name}.py", *words], 120, environment_here=HERE, traced=traced)


def found(report: Report, code: str) -> Finding:
    assert code in rules(), f"{code} is gone: the script's own page names it"
    return next(f for f in report.findings if f.code == code)


def line_of(name: str, text: str) -> str:
    """Where the source says so, for findings that name a line."""
    path = ROOT / "recipes" / "questions" / f"{name}.py"
    number = next(at for at, line in enumerate(path.read_text().splitlines(), 1) if text in line)
    return f"recipes/questions/{name}.py:{number}"


def test_reloading_is_found_with_its_line_and_gone_once_it_is_fixed() -> None:
    report = run("reload")
    finding = found(report, "GPU711")
    assert finding.line == line_of("reload", "layer.load_state_dict(weights)") and finding.severity == "warning"
    assert finding.gain_low_ms is not None and finding.bytes
    (model,) = report.tables["script"]["modules"]
    assert model["name"] == "model" and model["num_calls"] == 12
    assert "GPU711" not in {f.code for f in run("reload", "--fixed").findings}


def test_the_small_model_is_recognised_with_its_calls_and_inputs() -> None:
    report = run("slower_on_gpu", "--device", "cpu", traced=True)
    assert report.runs[0].status is Status.OK and report.runs[0].inputs == ("x:float32[1,64]",)
    assert report.runs[0].waterfall is not None
    assert sum(row["count"] for row in report.tables["kernels"] if row["kernel"] == "aten::addmm") > 16, "hundreds of tiny ops a call"


def test_data_parallel_is_found_with_its_line_and_not_where_it_is_left_out() -> None:
    finding = found(run("several_gpus"), "GPU712")
    assert finding.line is not None and finding.line.startswith("recipes/questions/several_gpus.py:")
    assert "GPU712" not in {f.code for f in run("several_gpus", "--alone").findings}


@pytest.mark.parametrize(
    ("words", "code", "module", "tensor", "remedy"),
    [((), "GPU701", "positions", "table", "register_buffer"), (("--dtype",), "GPU702", "scale", "gain", "float32")],
)
def test_the_failing_transformer_is_told_its_tensor_and_the_line_to_write(
    words: tuple[str, ...], code: str, module: str, tensor: str, remedy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    report = run("fails_on_gpu", *words)
    assert report.runs[0].status is Status.CRASH and "RuntimeError" in capfd.readouterr().err
    finding = found(report, code)
    assert finding.severity == "error" and finding.module == module and tensor in finding.message and remedy in finding.fix
    assert finding.line is not None and "fails_on_gpu.py:" in finding.line


def test_the_repaired_transformer_runs_through() -> None:
    report = run("fails_on_gpu", "--fixed")
    assert report.runs[0].status is Status.OK and not [f for f in report.findings if f.severity == "error"]


@pytest.mark.gpu
def test_on_a_gpu_the_copies_of_the_weights_are_named() -> None:
    assert torch.cuda.is_available()
    report = run("reload", traced=True)
    waterfall = report.runs[0].waterfall
    assert waterfall is not None
    assert found(report, "GPU711").bytes
    copies = waterfall.ms("host-to-device (pageable)", "host-to-device (pinned)", "copy calls")
    assert copies > 0.5 * waterfall.wall_ms, json.dumps([(p.name, p.ms) for p in waterfall.parts])


@pytest.mark.gpu
def test_on_a_gpu_the_small_model_is_bound_by_launches_and_waits() -> None:
    report = run("slower_on_gpu", "--device", "cuda", traced=True)
    codes = {f.code for f in report.findings}
    assert codes & {"GPU404", "GPU403"} and "GPU713" in codes
    site = found(report, "GPU713")
    assert site.line == line_of("slower_on_gpu", "self.out(hidden).item()")


@pytest.mark.multi_gpu
def test_on_several_gpus_data_parallel_is_named() -> None:
    assert found(run("several_gpus", traced=True), "GPU712").severity == "warning"
