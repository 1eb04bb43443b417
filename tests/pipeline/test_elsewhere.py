"""A trace from somebody's production job becomes a report, and claims nothing the trace does not say."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from gpuopt.core import codec
from gpuopt.core.errors import BadInput
from gpuopt.core.progress import Progress, Silent
from gpuopt.core.result import Ceiling, Ceilings, Device, Report, Status
from gpuopt.core.spec import Job
from gpuopt.doctor.rule import rules
from gpuopt.pipeline import elsewhere, environment, facts, tables
from gpuopt.reports import FORMATS

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("chrome", ROOT / "tests" / "profiling" / "chrome.py")
assert _SPEC is not None and _SPEC.loader is not None
chrome = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(chrome)

MEASURED = Ceilings(
    rows=tuple(
        Ceiling(quantity=quantity, value=value, unit=unit, kind="measured", source="a test")
        for quantity, value, unit in (("fp16", 700e12, "FLOP/s"), ("memory", 3e12, "byte/s"), ("h2d", 50e9, "byte/s"))
    )
)
SAME = Device(id="cuda:0", name="NVIDIA H100 80GB HBM3", kind="cuda", num_sms=132, cache_bytes=50 * 2**20, ceilings=MEASURED)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return chrome.written(tmp_path / "prod.json.gz", chrome.document(chrome.gpu_events(), chrome.H100))


def test_a_production_trace_becomes_a_waterfall_kernels_and_findings(trace: Path) -> None:
    report = elsewhere.explain(trace, SAME)
    (run,) = report.runs
    assert run.backend == "trace" and run.status is Status.OK and run.latency_ms is None and run.model == "prod.json.gz"
    assert run.waterfall is not None and run.wall_ms == pytest.approx(0.999)
    assert sum(part.ms for part in run.waterfall.parts) == pytest.approx(run.wall_ms)
    assert all(part.ms >= 0 for part in run.waterfall.parts)
    assert "untraced" not in run.waterfall.method
    kernels = report.tables["kernels"]
    assert [(row["kernel"], row["count"], round(row["time_ms"], 6)) for row in kernels] == [
        ("nvjet_hsh_64x64_TNT", 2.0, 0.4),
        ("memcpy h2d (pageable)", 1.0, 0.1),
    ]
    assert sum(row["pct"] for row in kernels) == pytest.approx(100.0)
    if "GPU101" in rules():
        found = next(f for f in report.findings if f.code == "GPU101")
        assert found.gain_high_ms is not None and found.gain_high_ms < run.wall_ms
    assert not any("rule failed" in f.message for f in report.findings)
    assert any("as traced" in note and "nothing here is a latency" in note for note in run.notes)


def test_shapes_give_the_flops_of_products_and_nothing_else_does(trace: Path, tmp_path: Path) -> None:
    def product(path: Path) -> tuple[float | None, str]:
        (point,) = (p for p in elsewhere.explain(path, SAME).runs[0].roofline if p.name == "aten.mm")
        return point.flops, point.ceiling

    assert product(trace) == (2 * 2.0 * 64 * 1024 * 4096, "memory measured")
    bare = chrome.written(tmp_path / "bare.json", chrome.document(chrome.gpu_events(has_shapes=False), chrome.H100))
    assert product(bare)[0] is None


def test_on_another_machine_the_data_sheet_of_the_named_gpu_holds(trace: Path) -> None:
    other = replace(SAME, name="NVIDIA L4")
    for here in (None, other):
        report = elsewhere.explain(trace, here)
        assert report.device is not None and report.device.name == SAME.name
        assert {row.kind for row in report.device.ceilings.rows} == {"spec"}
        assert report.device.ceilings.flops("float16", "spec") == pytest.approx(989e12)
        assert any("data sheet's of NVIDIA H100" in note for note in report.runs[0].notes)
    assert elsewhere.explain(trace, SAME).device.ceilings == MEASURED  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ([], "no deviceProperties"),
        ([{**chrome.H100, "name": "NVIDIA H900", "numSms": 999}], "no data sheet"),
        (["H100"], "no deviceProperties"),
    ],
)
def test_without_a_known_gpu_there_are_no_ceilings(tmp_path: Path, properties: list[object], said: str) -> None:
    report = elsewhere.explain(chrome.written(tmp_path / "t.json", chrome.document(chrome.gpu_events(), *properties)), SAME)
    assert report.device is not None and not report.device.ceilings.rows
    assert all(point.pct_of_ceiling is None for point in report.runs[0].roofline)
    assert any(said in note for note in report.runs[0].notes)


def test_no_rule_that_knows_nvidias_gpus_speaks_about_amds(tmp_path: Path) -> None:
    path = chrome.written(
        tmp_path / "t.json", chrome.document(chrome.gpu_events(launch="hipLaunchKernel"), {"id": 0, "name": "AMD Instinct MI300X"})
    )
    report = elsewhere.explain(path, SAME)
    table = rules()
    assert all("device" not in table[f.code].needs for f in report.findings)
    assert any("AMD trace" in note for note in report.runs[0].notes)
    assert report.device is not None and report.device.name == "AMD Instinct MI300X"


def test_a_cpu_trace_names_no_cpu(tmp_path: Path) -> None:
    events = [e for e in chrome.gpu_events() if e.get("cat") in ("cpu_op", "user_annotation")]
    report = elsewhere.explain(chrome.written(tmp_path / "t.json", chrome.document(events)), SAME)
    assert report.device is not None and report.device.kind == "cpu" and not report.device.ceilings.rows
    assert any("what a GPU did cannot be said" in note for note in report.runs[0].notes)
    assert report.tables["kernels"][0]["kernel"] == "aten::copy_"


def test_flops_that_do_not_fit_their_time_are_taken_back(tmp_path: Path) -> None:
    events = [
        {**e, "args": {**e["args"], "Input Dims": [[8192, 8192], [8192, 8192]]}} if e.get("name") == "aten::mm" else e
        for e in chrome.gpu_events()
    ]
    run = elsewhere.explain(chrome.written(tmp_path / "t.json", chrome.document(events, chrome.H100))).runs[0]
    (point,) = (p for p in run.roofline if p.name == "aten.mm")
    assert point.flops is None and point.bytes is None and point.time_ns
    assert any("taken back" in note for note in run.notes)


def test_fp32_products_of_tf32_kernels_stand_against_the_tf32_peak(tmp_path: Path) -> None:
    events = []
    for event in chrome.gpu_events():
        args = event.get("args", {})
        if event.get("name") == "aten::mm":
            event = {**event, "args": {**args, "Input type": ["float", "float"], "Input Dims": [[2048, 4096], [4096, 2048]]}}
        if event.get("cat") == "kernel":
            event = {**event, "name": "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_cublas"}
        events.append(event)
    (point,) = (
        p
        for p in elsewhere.explain(chrome.written(tmp_path / "t.json", chrome.document(events, chrome.H100))).runs[0].roofline
        if p.name == "aten.mm"
    )
    assert point.dtype == "tf32" and point.ceiling == "tf32 spec" and point.pct_of_ceiling is not None and point.pct_of_ceiling < 100


def test_the_report_is_valid_and_every_format_shows_it(trace: Path) -> None:
    report = elsewhere.explain(trace, SAME, command="gpuopt profile --trace prod.json.gz")
    plain = codec.dump(report)
    jsonschema.validate(json.loads(json.dumps(plain)), json.loads((ROOT / "docs" / "report.schema.json").read_text()))
    assert codec.from_plain(Report, plain, what="report") == report
    for name in FORMATS:
        module, _, function = FORMATS[name].partition(":") if isinstance(FORMATS[name], str) else ("", "", "")
        if module:
            assert getattr(importlib.import_module(module), function or "render")(report)


def test_ignored_rules_are_silent_and_bad_files_raise(trace: Path, tmp_path: Path) -> None:
    codes = {f.code for f in elsewhere.explain(trace, SAME).findings}
    assert codes and not codes & {f.code for f in elsewhere.explain(trace, SAME, ignore=codes).findings}
    with pytest.raises(BadInput):
        elsewhere.explain(tmp_path / "gone.json")


def test_the_kernels_beyond_the_top_are_one_row(trace: Path) -> None:
    from gpuopt.profiling import foreign

    rows = tables.kernels(foreign.read(trace), top=1)
    assert rows[1]["kernel"] == "1 others" and rows[1]["time_ms"] == pytest.approx(0.1)


def test_a_machine_is_measured_only_for_a_trace_of_its_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def survey(job: Job, progress: Progress, *, ceilings: bool = True) -> facts.Survey:
        asked.append(ceilings)
        return facts.Survey(environment=environment.describe(), device=SAME)

    monkeypatch.setattr(elsewhere.machine, "survey", survey)
    monkeypatch.setattr(elsewhere.torch.cuda, "device_count", lambda: 1)
    job = Job(verb="profile")
    assert elsewhere.same_here(None, job, Silent()) is None and not asked
    assert elsewhere.same_here(replace(SAME, name="NVIDIA L4"), job, Silent()) is None and asked == [False]
    assert elsewhere.same_here(replace(SAME, ceilings=Ceilings()), job, Silent()) == SAME and asked == [False, False, True]
    monkeypatch.setattr(elsewhere.torch.cuda, "device_count", lambda: 0)
    assert elsewhere.same_here(SAME, job, Silent()) is None and len(asked) == 3
