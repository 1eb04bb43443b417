"""Job -> Report: faults of one candidate stay its own, nothing half-written stays behind, and every verdict has its exit code.

Faults that end a process are given to real children, once; everything else runs in this one, through the same JSON.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.bundles import read
from gpuopt.core import codec
from gpuopt.core.errors import BadInput, GpuoptError, OutOfMemory, ResourceError, Unavailable, Unsupported, UsageError
from gpuopt.core.result import Device, Report, Samples, Stats, Status
from gpuopt.core.spec import Gates, ModelRef
from gpuopt.pipeline import cores, facts, gates, isolate, jobs, worker
from gpuopt.pipeline import groups as groups_of
from gpuopt.pipeline import machine as machines
from gpuopt.pipeline.isolate import Child, ChildFailed
from gpuopt.profiling.roofline import ImpossibleFigure

Models = Callable[[str], str]

FAULTS = {
    "null": (Status.OK, ""),
    "null:fail=segv": (Status.CRASH, "SIGSEGV"),
    "null:fail=exit0,at=build": (Status.CRASH, "exited with 0"),
    "null:fail=oom_host": (Status.OOM_HOST, "SIGKILL"),
    "null:fail=ignore_sigterm": (Status.TIMEOUT, "did not end within"),
    "null:fail=segv,after=70,sleep_ms=1": (Status.CRASH, "block: SIGSEGV"),
    "eager": (Status.OK, ""),
}


@pytest.fixture(scope="module")
def storm(models: Models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Any]:
    """One bench of honest and faulty candidates, each in a real child; and whoever watched it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("pipeline_tools", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    tools: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    watcher = tools.Watcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setattr(machines, "survey", tools.fake_survey)
        tools.fork_workers(patch)
        made: list[Child] = []

        def child(**more: Any) -> Child:
            made.append(Child(**more))
            return made[-1]

        patch.setattr(isolate, "Child", child)
        candidates = [tools.candidate(models("net"), backend, N=4) for backend in FAULTS]
        job = tools.job("bench", *candidates, bench=replace(tools.QUICK, timeout_s=10.0, max_time_s=5.0))
        report = jobs.bench(job, watcher)
        assert not any(c.alive for c in made)
    return report, watcher


@pytest.mark.parametrize("backend", FAULTS)
def test_a_fault_is_one_candidates_own_result(backend: str, storm: tuple[Report, Any]) -> None:
    run = storm[0].runs[list(FAULTS).index(backend)]
    status, words = FAULTS[backend]
    assert run.status is status, run.reason
    assert words in run.reason
    assert "\n" not in run.reason
    if status is Status.OK:
        assert run.samples_ns and run.latency_ms is not None and run.accuracy is not None and run.accuracy.passed
    else:
        assert run.reason and run.latency_ms is None and not run.samples_ns and run.tflops is None
        assert "--option fail=" in run.reproduce


def test_those_that_are_left_are_compared_with_the_first_of_them(storm: tuple[Report, Any]) -> None:
    first, *_, last = storm[0].runs
    assert first.relative is None
    assert last.relative is not None and last.relative.num_pairs == 6
    assert len(last.block_sizes) == len(first.block_sizes) == 6
    assert sum(last.block_sizes) == len(last.samples_ns)


def test_some_failed_is_0_and_1_when_strict(storm: tuple[Report, Any]) -> None:
    assert gates.exit_code(storm[0]) == 0
    assert gates.exit_code(storm[0], strict=True) == 1


def test_the_report_so_far_grows_by_one_candidate_at_a_time(storm: tuple[Report, Any]) -> None:
    report, watcher = storm
    lengths = [len(r.runs) for r in watcher.reports]
    assert lengths[: len(FAULTS)] == list(range(1, len(FAULTS) + 1))
    assert watcher.reports[-1] == report
    keys = {key for key, _ in watcher.steps}
    assert len(keys) == len(FAULTS) + 1, "one line a candidate, and one for the pairs"


def test_a_hang_costs_its_timeout_and_no_more(storm: tuple[Report, Any]) -> None:
    run = storm[0].runs[list(FAULTS).index("null:fail=ignore_sigterm")]
    assert "10 s" in run.reason
    assert "--timeout" in run.fix


def test_candidates_built_at_once_end_as_they_do_one_after_the_other(
    models: Models, tools: Any, forked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machines, "survey", tools.fake_survey)
    made: list[Child] = []
    monkeypatch.setattr(isolate, "Child", lambda **more: made.append(Child(**more)) or made[-1])
    names = ["null", "null:fail=segv", "null:fail=ignore_sigterm", "null:sleep_ms=1"]
    candidates = [tools.candidate(models("net"), backend, N=4) for backend in names]
    began = time.monotonic()
    report = jobs.bench(tools.job("bench", *candidates, bench=replace(tools.QUICK, timeout_s=8.0, build_jobs=3)))
    assert [run.status for run in report.runs] == [Status.OK, Status.CRASH, Status.TIMEOUT, Status.OK]
    assert report.runs[3].relative is not None and report.runs[3].relative.num_pairs == 6
    assert all(any("upper bounds" in note for note in run.notes) for run in report.runs)
    assert not any(child.alive for child in made)
    assert time.monotonic() - began < 60


def test_candidates_of_a_gpu_built_at_once_share_the_cores_and_those_of_a_cpu_do_not(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setattr(cores.cpu, "num_cores", lambda: 16)
    gpu, cpu = (Device(id=kind, name="", kind=kind) for kind in ("cuda", "cpu"))
    assert cores.share_of_cores(gpu, 3) == {"OMP_NUM_THREADS": "5", "TORCHINDUCTOR_COMPILE_THREADS": "5"}
    assert cores.share_of_cores(cpu, 3) == {} == cores.share_of_cores(gpu, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cores.share_of_cores(gpu, 3) == {"TORCHINDUCTOR_COMPILE_THREADS": "5"}, "the user's own number stands"


def test_an_interrupt_while_several_are_being_built_leaves_no_child_and_waits_for_none(
    models: Models, tools: Any, forked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machines, "survey", tools.fake_survey)
    made: list[Child] = []
    monkeypatch.setattr(isolate, "Child", lambda **more: made.append(Child(**more)) or made[-1])

    class Interrupted(tools.Watcher):  # type: ignore[misc,name-defined]
        def so_far(self, report: Report) -> None:
            raise KeyboardInterrupt

    names = ["null", "null:fail=ignore_sigterm"]
    candidates = [tools.candidate(models("net"), backend, N=4) for backend in names]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        jobs.bench(tools.job("bench", *candidates, bench=replace(tools.QUICK, timeout_s=120.0, build_jobs=2)), Interrupted())
    assert not any(child.alive for child in made)
    assert time.monotonic() - began < 40, "the one that hangs was waited for"


# --- in this process


@pytest.mark.parametrize(
    ("backend", "status", "code"),
    [
        ("null:fail=compile", Status.COMPILE_ERROR, 1),
        ("null:fail=run_error", Status.COMPILE_ERROR, 1),
        ("null:fail=run_error,after=2", Status.CRASH, 1),
        ("null:fail=wrong", Status.ACCURACY_FAIL, 1),
        ("null:fail=nan", Status.NAN, 1),
        ("null:fail=dtype_lie", Status.UNSUPPORTED, 4),
    ],
)
def test_one_that_fails_alone_is_the_exit_code(backend: str, status: Status, code: int, local: Any, models: Models, tools: Any) -> None:
    report = jobs.bench(tools.job("bench", tools.candidate(models("net"), backend, "fp32", N=4)))
    (run,) = report.runs
    assert (run.status, gates.exit_code(report)) == (status, code), run.reason
    assert run.reason and run.latency_ms is None


@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("null:fail=unsupported", Unsupported),
        ("null:fail=unavailable", Unavailable),
        ("null:fail=oom_device,at=build", OutOfMemory),
        ("null:fail=memory_error", OutOfMemory),
        ("null:fail=disk_full,at=build", ResourceError),
        ("null:fail=nonsense", UsageError),
        ("nul", UsageError),
    ],
)
@pytest.mark.parametrize("verb", ["bench", "profile"])
def test_what_a_user_can_act_on_is_the_commands_own_error(
    verb: str, backend: str, error: type[Exception], local: Any, models: Models, tools: Any
) -> None:
    with pytest.raises(error) as caught:
        getattr(jobs, verb)(tools.job(verb, tools.candidate(models("net"), backend, N=4)))
    assert type(caught.value) is error
    assert caught.value.fix  # type: ignore[attr-defined]


def test_the_same_candidate_twice_is_two_runs_with_samples_of_their_own(local: Any, models: Models, tools: Any) -> None:
    one = tools.candidate(models("net"), N=4)
    report = jobs.bench(tools.job("bench", one, one))
    first, second = report.runs
    assert first.samples_ns and second.samples_ns and first.samples_ns != second.samples_ns
    assert second.relative is not None


@pytest.mark.parametrize(
    ("sizes", "at_once", "together"),
    [((3, 3), 6, [[3, 3]]), ((3, 3), 5, [[3], [3]]), ((1, 1, 1), 1, [[1], [1], [1]]), ((2, 4, 1, 1), 4, [[2], [4], [1, 1]]), ((), 3, [])],
)
def test_groups_build_together_as_far_as_candidates_may_build_at_once(
    sizes: tuple[int, ...], at_once: int, together: list[list[int]]
) -> None:
    groups = [tuple(range(size)) for size in sizes]
    assert [[len(group) for group in wave] for wave in groups_of.waves(groups, at_once)] == together  # type: ignore[arg-type]


def test_groups_that_build_together_are_timed_apart(local: Any, models: Models, tools: Any) -> None:
    candidates = [tools.candidate(models("net"), f"null:sleep_ms={ms}", N=n) for n in (2, 8) for ms in (2, 3)]
    report = jobs.bench(tools.job("bench", *candidates, bench=replace(tools.QUICK, build_jobs=4)))
    assert [(run.dims["N"], run.status, run.relative is not None) for run in report.runs] == [
        (2, Status.OK, False),
        (2, Status.OK, True),
        (8, Status.OK, False),
        (8, Status.OK, True),
    ]


def test_sizes_are_groups_of_their_own(local: Any, models: Models, tools: Any) -> None:
    a, b = tools.candidate(models("net"), N=1), tools.candidate(models("net"), N=2)
    report = jobs.bench(tools.job("bench", a, b))
    assert [run.batch for run in report.runs] == [1, 2]
    assert all(run.relative is None for run in report.runs)


def test_nothing_to_bench_and_several_candidates_where_one_is_taken_are_usage_errors(local: Any, models: Models, tools: Any) -> None:
    with pytest.raises(UsageError):
        jobs.bench(tools.job("bench"))
    one = tools.candidate(models("net"))
    for verb in ("profile", "compile", "convert"):
        with pytest.raises(UsageError):
            getattr(jobs, verb)(tools.job(verb, one, one, output="x.onnx"))
    assert local == []


def test_gates_are_judged_and_a_missing_figure_misses(local: Any, models: Models, tools: Any) -> None:
    limits = Gates(min_tflops=1e6, max_latency_ms=1e6, max_error=1.0)
    report = jobs.bench(tools.job("bench", tools.candidate(models("net"), N=4), gates=limits))
    assert {g.name: g.passed for g in report.gates} == {"min-tflops": False, "max-latency": True, "max-error": True}
    assert gates.exit_code(report) == 1
    unverified = jobs.bench(tools.job("bench", tools.candidate(models("net"), N=4), gates=limits, bench=replace(tools.QUICK, verify="off")))
    assert next(g for g in unverified.gates if g.name == "max-error").figure == "not verified"
    assert not next(g for g in unverified.gates if g.name == "max-error").passed


def test_a_baseline_that_was_ten_times_faster_misses_and_one_that_was_slower_does_not(
    local: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    one = tools.candidate(models("net"), "null:sleep_ms=2", N=4)
    now = jobs.bench(tools.job("bench", one))

    def scaled(factor: float) -> str:
        (run,) = now.runs
        assert isinstance(run.latency_ms, Stats)
        values = {
            f.name: v * factor if isinstance(v, float) else v
            for f in dataclasses.fields(run.latency_ms)
            if (v := getattr(run.latency_ms, f.name)) is not None or True
        }
        path = tmp_path / f"{factor}.json"
        path.write_text(codec.to_json(replace(now, runs=(replace(run, latency_ms=Stats(**values)),))))
        return str(path)

    for factor, code in ((0.1, 1), (10.0, 0)):
        report = jobs.bench(tools.job("bench", one, gates=Gates(baseline=scaled(factor), max_slowdown=0.05)))
        assert gates.exit_code(report) == code, report.gates
        assert report.tables["compare"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\x00\xff"])
def test_a_baseline_that_is_none_is_told_before_anything_is_measured(
    content: bytes | None, local: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((BadInput, UsageError)):
        jobs.bench(tools.job("bench", tools.candidate(models("net")), gates=Gates(baseline=str(path))))
    assert local == []


# --- compile


def test_compile_writes_a_bundle_that_says_it_was_verified(local: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    target = tmp_path / "out"
    report = jobs.compile(tools.job("compile", tools.candidate(models("net"), "null", N=4), output=str(target)))
    assert report.output == "out" and [r.backend for r in report.runs] == ["eager", "null"]
    assert gates.exit_code(report) == 0
    manifest = read.open_bundle(target)
    assert manifest.verified and manifest.run is not None and manifest.run.accuracy is not None
    assert tools.left_in(tmp_path) == ["out"]
    again = jobs.bench(tools.job("bench", replace(tools.candidate(str(target), "eager", "bf16"), dims={})))
    assert again.runs[0].status is Status.OK, again.runs[0].reason
    assert any("bf16 changes nothing" in note for note in again.runs[0].notes)
    assert again.runs[0].precision == "fp32"
    assert (again.runs[0].backend, again.runs[0].batch) == ("null", 4)
    for verb, output in (("compile", "other"), ("convert", "other.onnx")):
        with pytest.raises(UsageError, match="bundle"):
            getattr(jobs, verb)(tools.job(verb, replace(tools.candidate(str(target)), dims={}), output=str(tmp_path / output)))
    assert tools.left_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("backend", "status", "code"),
    [
        ("null:fail=wrong", Status.ACCURACY_FAIL, 1),
        ("null:fail=nan", Status.NAN, 1),
        ("null:fail=mutate_inputs", Status.ACCURACY_FAIL, 1),
        ("null:fail=compile", Status.COMPILE_ERROR, 1),
        ("null:fail=run_error,at=save", Status.BUG, 70),
    ],
)
def test_a_compile_that_fails_leaves_nothing_and_is_not_0(
    backend: str, status: Status, code: int, local: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    report = jobs.compile(tools.job("compile", tools.candidate(models("net"), backend, N=4), output=str(tmp_path / "deep" / "out")))
    assert report.runs[-1].status is status
    assert report.output is None
    assert gates.exit_code(report) == code
    assert tools.left_in(tmp_path) == []


@pytest.mark.parametrize("backend", ["null:fail=disk_full,at=save", "null:fail=unsupported,at=save"])
def test_a_save_that_fails_keeps_the_old_bundle(backend: str, local: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    target = tmp_path / "out"
    good = tools.job("compile", tools.candidate(models("net"), "null", N=4), output=str(target))
    jobs.compile(good)
    before = (target / "manifest.json").read_bytes()
    with pytest.raises((ResourceError, Unsupported)):
        jobs.compile(replace(good, candidates=(tools.candidate(models("net"), backend, N=4),), force=True))
    assert (target / "manifest.json").read_bytes() == before
    assert tools.left_in(tmp_path) == ["out"]


def test_a_child_that_dies_while_it_saves_is_a_failed_compile(
    models: Models, tools: Any, unmeasured: None, forked: None, tmp_path: Path
) -> None:
    """torch.export.save aborts the process on a full disk."""
    candidate = tools.candidate(models("net"), "null:fail=abort,at=save", N=4)
    report = jobs.compile(tools.job("compile", candidate, output=str(tmp_path / "out")))
    assert [run.status for run in report.runs] == [Status.CRASH]
    assert "SIGABRT" in report.runs[0].reason or "Fatal" in report.runs[0].reason or "abort" in report.runs[0].reason
    assert gates.exit_code(report) == 1
    assert tools.left_in(tmp_path) == []


def test_inaccurate_is_kept_when_asked_and_never_called_verified(local: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    watcher = tools.Watcher()
    candidate = tools.candidate(models("net"), "null:fail=wrong", N=4)
    report = jobs.compile(tools.job("compile", candidate, output=str(tmp_path / "out"), allow_inaccurate=True), watcher)
    run = report.runs[-1]
    assert run.status is Status.OK and run.samples_ns
    assert any("failed verification" in note for note in run.notes)
    assert any("--allow-inaccurate" in warning for warning in watcher.warnings)
    assert read.open_bundle(tmp_path / "out").verified is False


def test_a_bundle_nobody_verified_does_not_say_it_was(local: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    job = tools.job("compile", tools.candidate(models("net"), "null", N=4), output=str(tmp_path / "out"))
    jobs.compile(replace(job, bench=replace(tools.QUICK, verify="off")))
    assert read.open_bundle(tmp_path / "out").verified is False
    bench = tools.job("bench", replace(tools.candidate(str(tmp_path / "out")), dims={}))
    with pytest.raises(Unsupported, match="reference"):
        jobs.bench(bench)
    assert jobs.bench(replace(bench, bench=replace(tools.QUICK, verify="off"))).runs[0].status is Status.OK


def test_gates_of_a_compile_are_about_what_was_compiled(local: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    job = tools.job("compile", tools.candidate(models("net"), "null:sleep_ms=30", N=4), output=str(tmp_path / "out"))
    report = jobs.compile(replace(job, gates=Gates(max_latency_ms=2.0)))
    assert [g.passed for g in report.gates] == [False]
    assert any(f.code == "slower-than-eager" for f in report.findings)


# --- convert


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_convert_writes_one_file_and_never_over_another_unasked(kind: str, local: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    target = tmp_path / f"m.{kind}"
    job = tools.job("convert", tools.candidate(models("net"), precision="bf16" if kind != "onnx" else None, N=2), output=str(target))
    report = jobs.convert(job)
    assert report.output == target.name and target.stat().st_size > 0
    assert tools.left_in(tmp_path) == [target.name]
    before = target.read_bytes()
    with pytest.raises(UsageError, match="already there"):
        jobs.convert(job)
    assert target.read_bytes() == before
    jobs.convert(replace(job, force=True))


def test_a_conversion_outside_the_gate_is_written_only_when_asked(
    local: Any, models: Models, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt import converters

    real = converters.apply

    def wrong(model: Any, precision: Any, transforms: Any, inputs: Any = None, **kwargs: Any) -> Any:
        changed = real(model, precision, transforms, inputs, **kwargs)
        if transforms.keep_fp32:
            import torch

            with torch.no_grad():
                changed.module.last.bias.add_(1.0)
        return changed

    monkeypatch.setattr(converters, "apply", wrong)
    candidate = tools.candidate(models("net"), precision="bf16", N=2)
    candidate = replace(candidate, transforms=replace(candidate.transforms, keep_fp32=("first",)))
    job = tools.job("convert", candidate, output=str(tmp_path / "m.safetensors"))
    report = jobs.convert(job)
    assert report.output is None and gates.exit_code(report) == 1
    assert tools.left_in(tmp_path) == []
    report = jobs.convert(replace(job, allow_inaccurate=True))
    assert report.output == "m.safetensors" and gates.exit_code(report) == 0
    assert tools.left_in(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    ("name", "fields", "error"),
    [
        ("m.txt", {}, UsageError),
        ("m.onnx", {"to": "pt2"}, UsageError),
        ("no/such/m.onnx", {}, ResourceError),
        ("n" * 300 + ".onnx", {}, UsageError),
        ("a\nb.onnx", {}, UsageError),
        ("folder.onnx", {}, UsageError),
        ("link.onnx", {"force": True}, UsageError),
        ("pipe.onnx", {"force": True}, UsageError),
        ("source.onnx", {"force": True}, UsageError),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    name: str, fields: dict[str, Any], error: type[Exception], local: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    import os

    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "source.onnx").write_bytes(b"model")
    before = tools.left_in(tmp_path)
    candidate = tools.candidate(models("net"))
    if name == "source.onnx":
        candidate = replace(candidate, model=ModelRef(text=str(tmp_path / "source.onnx")))
    with pytest.raises(error):
        jobs.convert(tools.job("convert", candidate, output=str(tmp_path / name), **fields))
    assert local == [] and tools.left_in(tmp_path) == before


# --- the machine


def test_device_and_backends_describe_this_machine(local: Any, models: Models, tools: Any) -> None:
    assert jobs.device(tools.job("device", device="cpu")).device is not None
    report = jobs.backends(tools.job("backends", tools.candidate(models("net"))))
    rows = {row["backend"]: row for row in report.tables["matrix"]}
    assert report.tables["form"] == "module"
    assert rows["eager"]["route"] == "direct" and rows["ort"]["route"] == "via ONNX"
    assert rows["eager"]["precisions"]["tf32"] and not rows["eager"]["precisions"]["fp32"]
    everything = jobs.backends(tools.job("backends"))
    assert everything.tables["form"] is None and len(everything.tables["matrix"]) == len(rows)


def failing(status: Status, traceback: str = "") -> Any:
    class Broken:
        pid = 1

        def call(self, *_: Any, **__: Any) -> Any:
            raise ChildFailed(status, "survey: SIGSEGV: driver", traceback=traceback)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    return Broken


@pytest.mark.parametrize("verb", ["device", "backends"])
def test_a_driver_that_takes_the_child_with_it_is_unavailable_and_a_bug_keeps_its_traceback(
    verb: str, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setattr(isolate, "Child", failing(Status.CRASH))
    with pytest.raises(Unavailable, match="SIGSEGV"):
        getattr(jobs, verb)(tools.job(verb, device="cpu"))
    monkeypatch.setattr(isolate, "Child", failing(Status.BUG, "Traceback: the child's own"))
    with pytest.raises(ChildFailed) as caught:
        getattr(jobs, verb)(tools.job(verb, device="cpu"))
    assert "the child's own" in "".join(caught.value.__notes__)


def test_a_figure_above_the_ceilings_has_them_measured_again_once(monkeypatch: pytest.MonkeyPatch, tools: Any) -> None:
    asked: list[bool] = []

    def survey(job: Any, progress: Any) -> facts.Survey:
        asked.append(job.refresh)
        return tools.fake_survey()

    monkeypatch.setattr(machines, "survey", survey)
    watcher = tools.Watcher()
    machine = machines.surveyed(tools.job("bench"), watcher)
    machine.survey = replace(machine.survey, device=replace(machine.device, kind="cuda"))
    monkeypatch.setattr(tools, "fake_survey", lambda found=machine.survey: found)
    calls = 0

    def impossible(_: Any) -> None:
        nonlocal calls
        calls += 1
        raise ImpossibleFigure("101%")

    with pytest.raises(ImpossibleFigure):
        machine.judged(impossible)
    assert asked == [False, True] and calls == 2 and watcher.warnings
    with pytest.raises(ImpossibleFigure):
        machine.judged(impossible)
    assert asked == [False, True], "the second look is taken once"


# --- what an exception is called


@pytest.mark.parametrize(
    ("error", "verb", "status"),
    [
        (MemoryError("x"), "load", Status.OOM_HOST),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "build", Status.OOM_HOST),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "verify", Status.OOM_DEVICE),
        (OSError(28, "No space left on device"), "save", Status.DISK_FULL),
        (RuntimeError("[enforce fail at inline_container] . No space left on device"), "save", Status.DISK_FULL),
        (UsageError("x"), "load", Status.BAD_INPUT),
        (ResourceError("the workspace holds too many elements"), "load", Status.OOM_HOST),
        (ResourceError("no space left in x"), "save", Status.DISK_FULL),
        (isolate.TimedOut("x"), "build", Status.TIMEOUT),
        (ImpossibleFigure("x"), "profile", Status.BUG),
        (KeyError("x"), "load", Status.BUG),
        (RuntimeError("x"), "block", Status.CRASH),
        (RecursionError("x"), "build", Status.COMPILE_ERROR),
    ],
)
def test_an_exception_has_its_place_in_the_taxonomy(error: Exception, verb: str, status: Status) -> None:
    assert worker.classify(error, verb) is status
    failure = worker.describe(error, verb)
    assert failure.message and "\n" not in failure.message


def test_zero_samples_are_never_a_result(local: Any, models: Models, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt.pipeline.session import Session

    monkeypatch.setattr(Session, "measure", lambda self, spec: facts.Measured(samples=Samples()))
    with pytest.raises(AssertionError, match="without samples"):
        jobs.bench(tools.job("bench", tools.candidate(models("net"))))


def test_jobs_done_together_have_the_reports_they_would_have_alone(local: Any, tools: Any, models: Callable[[str], str]) -> None:
    asked = [tools.job("bench", tools.candidate(models("net"), N=batch), command=name) for name, batch in (("first", 1), ("second", 3))]
    told: list[tuple[int, int, bool]] = []
    reports = jobs.bench_all(asked, on_report=lambda number, report, is_whole: told.append((number, len(report.runs), is_whole)))
    assert [r.command for r in reports] == ["first", "second"]
    assert [[run.batch for run in r.runs] for r in reports] == [[1], [3]]
    assert all(run.status is Status.OK and run.latency_ms is not None and run.accuracy for r in reports for run in r.runs)
    assert [(n, whole) for n, _, whole in told if whole] == [(0, True), (1, True)]


def test_what_is_no_bench_is_not_done_together(tools: Any, models: Callable[[str], str]) -> None:
    one = tools.job("bench", tools.candidate(models("net")))
    with pytest.raises(UsageError, match="no bench"):
        jobs.bench_all([one, replace(one, verb="profile")])
    with pytest.raises(UsageError, match="one device"):
        jobs.bench_all([one, replace(one, candidates=(replace(one.candidates[0], device="cuda"),))])


def test_a_baseline_that_is_not_there_is_told_before_anything_is_timed(
    local: Any, tools: Any, models: Callable[[str], str], tmp_path: Any
) -> None:
    one = tools.job("bench", tools.candidate(models("net")))
    told: list[Any] = []
    with pytest.raises(GpuoptError):
        jobs.bench_all(
            [one, replace(one, gates=replace(one.gates, baseline=str(tmp_path / "none.json")))], on_report=lambda *found: told.append(found)
        )
    assert told == []
    with pytest.raises(UsageError, match="nothing to bench"):
        jobs.bench_all([])
