"""`optimize` with a backend that sleeps, lies and crashes as told: what wins, what is written, what is left behind, and what an interrupted search is worth."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, ResourceError, UsageError
from gpuopt.core.result import Report, Status
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BackendSpec, Job, Precision
from gpuopt.pipeline import isolate
from gpuopt.pipeline.search import journal
from gpuopt.pipeline.search.optimize import optimize
from gpuopt.profiling.roofline import ImpossibleFigure

Models = Callable[[str], str]
NARROW: dict[str, Any] = {"precisions": ("fp32",), "rewrites": ()}


def asked(tools: Any, model: str, *backends: str, base: str = "null:sleep_ms=6", **fields: Any) -> Job:
    """A search for something faster than `base`, among these."""
    search = SearchSpec(**{**NARROW, "backends": backends, **fields.pop("search", {})})
    first = replace(tools.candidate(model, N=4), backend=BackendSpec.parse(base))
    bench = replace(
        tools.QUICK, min_iterations=2, block_ms=2.0, warmup_s=0.0, max_warmup_s=0.02, max_time_s=0.05, verify=fields.pop("verify", "full")
    )
    job: Job = tools.job("optimize", first, search=search, bench=bench, **fields)
    return job


def outcomes(report: Report) -> dict[str, str]:
    assert report.search is not None
    return {t.label.removeprefix("as is "): t.outcome for t in report.search.trials}


def test_the_fastest_that_is_right_wins_and_is_written(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    others = ("null:sleep_ms=6", "null:sleep_ms=1,fail=wrong", "null:sleep_ms=90")
    job = asked(tools, models("net"), *others, base="null:sleep_ms=30", output=str(tmp_path / "fast"))
    report = optimize(job)
    found = report.search
    assert found is not None and found.choice is not None and not found.choice.keeps_input
    assert outcomes(report)["null sleep_ms=6"] == "chosen"
    assert outcomes(report)["null sleep_ms=1 fail=wrong"] == "accuracy_fail"
    assert found.choice.speedup == pytest.approx(5.0, rel=0.4)  # other tests may take the cores: gaps are wide
    assert tools.left_in(tmp_path) == ["fast", "fast.search.jsonl"]
    assert found.economics is not None and found.economics.artifact_bytes
    assert codec.from_json(Report, codec.to_json(report)) == report
    assert report.runs[0].backend == "null" and report.output == "fast"


def test_whatever_lies_never_wins(local: Any, tools: Any, models: Models) -> None:
    lies = ("wrong", "nan", "wrong_shape", "missing_output", "nondeterministic", "mutate_inputs")
    report = optimize(asked(tools, models("net"), *(f"null:sleep_ms=1,fail={lie}" for lie in lies)))
    assert report.search is not None and report.search.choice is not None and report.search.choice.keeps_input, outcomes(report)
    tried = [t for t in report.search.trials if "fail=" in t.label and t.seconds is not None]
    assert len(tried) >= 3 and all(t.outcome not in ("chosen", "finalist", "screened") and t.reason for t in tried)


def test_whatever_fails_costs_itself_alone(local: Any, tools: Any, models: Models) -> None:
    failures = ("compile", "unsupported", "unavailable", "oom_device", "memory_error", "run_error", "disk_full")
    others = (*(f"null:sleep_ms=1,fail={failure}" for failure in failures), "null:sleep_ms=6")
    report = optimize(asked(tools, models("net"), *others, base="null:sleep_ms=30"))
    assert outcomes(report)["null sleep_ms=6"] == "chosen"
    assert report.search is not None
    tried = [t for t in report.search.trials if "fail=" in t.label and t.seconds is not None]
    assert len(tried) >= 3
    for trial in tried:
        assert trial.outcome in {s.value for s in Status} - {"ok"} and trial.reason


def test_a_seeded_crowd_of_wrong_and_slow_backends_never_wins(local: Any, tools: Any, models: Models) -> None:
    draw = random.Random(5)
    lies = ["wrong", "nan", "wrong_shape", "slightly_wrong"]
    crowd = [f"null:sleep_ms={draw.uniform(0.5, 3):.2f},fail={draw.choice(lies)}" for _ in range(5)]
    crowd += [f"null:sleep_ms={draw.uniform(8, 15):.1f}" for _ in range(3)]
    report = optimize(asked(tools, models("net"), *crowd))
    assert report.search is not None and report.search.choice is not None and report.search.choice.keeps_input


@pytest.mark.parametrize("asked_for", [None, "fp32"])
def test_what_runs_in_another_precision_than_it_says_is_called_what_it_runs_in(
    local: Any, tools: Any, models: Models, asked_for: str | None
) -> None:
    """Its outputs are right and it is faster. Where a precision was asked for it is refused; where none was, it goes by the name of what it computes in."""
    job = asked(tools, models("net"), "null:sleep_ms=1,fail=dtype_lie", base="null:sleep_ms=8")
    first = replace(job.candidates[0], precision=Precision(asked_for) if asked_for else None)
    report = optimize(replace(job, candidates=(first,)))
    assert report.search is not None and report.search.choice is not None
    (liar,) = (t for t in report.search.trials if "dtype_lie" in t.label)
    run = next(r for r in report.runs if "fail" in r.options)
    if asked_for:
        assert liar.outcome == "unsupported" and "precision not honoured" in liar.reason and report.search.choice.keeps_input
    else:
        assert run.precision == "fp64" and any("another precision than the model's" in note for note in run.notes)
    honest = next(r for r in report.runs if "fail" not in r.options)
    assert honest.precision == "fp32"


def test_where_precisions_are_named_the_models_own_is_held_to_its_name_too(local: Any, tools: Any, models: Models) -> None:
    """A candidate of the model's own precision is not cast, so it names none: what was asked of the search is asked of it all the same."""
    job = asked(
        tools, models("net"), "null:sleep_ms=1,fail=dtype_lie", "null:sleep_ms=2", base="null:sleep_ms=8", search={"precisions": ("fp32",)}
    )
    report = optimize(job)
    assert report.search is not None and report.search.choice is not None
    trials = {t.label.partition("null ")[2]: t for t in report.search.trials}
    liar = next(t for label, t in trials.items() if "dtype_lie" in label)
    assert liar.outcome == "unsupported" and "precision not honoured" in liar.reason
    assert "sleep_ms=2" in next(t.label for t in report.search.trials if t.outcome == "chosen"), (
        "an honest one, slower than the liar, is the answer"
    )


def test_where_nothing_is_faster_the_bundle_is_the_input(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    report = optimize(asked(tools, models("net"), "null:sleep_ms=9", base="null:sleep_ms=3", output=str(tmp_path / "same")))
    assert report.search is not None and report.search.choice is not None and report.search.choice.keeps_input
    assert report.search.choice.because.startswith("keep what you have")
    from gpuopt.pipeline import jobs

    again = jobs.bench(tools.job("bench", tools.candidate(str(tmp_path / "same"), N=4)))
    assert again.runs[0].status is Status.OK, "a bundle can be benched whatever is in it"


@pytest.mark.parametrize("fields", [{"dry_run": True}, {"time_budget_s": 0.0}])
def test_a_plan_writes_no_bundle_and_builds_nothing(local: Any, tools: Any, models: Models, tmp_path: Path, fields: dict[str, Any]) -> None:
    report = optimize(asked(tools, models("net"), "null:sleep_ms=1", output=str(tmp_path / "o"), search=fields))
    assert not (tmp_path / "o").exists() and report.output is None
    assert outcomes(report)["null sleep_ms=1"] == "planned" and len(report.runs) == 1


def test_one_that_is_fast_and_wrong_is_looked_at_for_what_would_mend_it(local: Any, tools: Any, models: Models) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=6,fail=wrong", base="null:sleep_ms=30", search={"precisions": ("bf16",)})
    report = optimize(job)
    assert report.search is not None
    (trial,) = [t for t in report.search.trials if t.outcome == "accuracy_fail"]
    assert trial.screened_ms is not None and trial.screened_ms < 25
    assert "what failed is the backend's doing" in trial.reason


def test_a_report_is_what_its_schema_says(local: Any, tools: Any, models: Models) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from gpuopt.reports import json as json_report

    report = optimize(asked(tools, models("net"), "null:sleep_ms=2"))
    jsonschema.validate(json.loads(json_report.render(report)), codec.schema(Report))


@pytest.mark.parametrize(
    ("search", "named"),
    [
        ({"goal": "speed"}, "goal 'speed' is unknown"),
        ({"latency_budget_ms": 0.0}, "--latency-budget"),
        ({"max_memory_bytes": -1}, "--max-memory"),
        ({"time_budget_s": -1.0}, "--time-budget"),
        ({"finalists": 1}, "1 finalists"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_runs(
    local: Any, tools: Any, models: Models, search: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(named)) as raised:
        optimize(asked(tools, models("net"), "null:sleep_ms=1", search=search))
    assert raised.value.fix and local == []


@pytest.mark.parametrize(("failure", "code"), [("unavailable", 4), ("memory_error", 5), ("unsupported", 4)])
def test_an_input_that_fails_ends_with_its_own_error(local: Any, tools: Any, models: Models, failure: str, code: int) -> None:
    with pytest.raises(GpuoptError) as raised:
        optimize(asked(tools, models("net"), "null:sleep_ms=1", base=f"null:fail={failure}"))
    assert raised.value.exit_code in (3, 4, 5) and "told to" in raised.value.message


def test_an_output_that_cannot_be_written_ends_it_before_anything_is_measured(
    local: Any, tools: Any, models: Models, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GpuoptError) as raised:
        optimize(asked(tools, models("net"), "null:sleep_ms=1", output=str(tmp_path / "file")))
    assert raised.value.fix and (tmp_path / "file").read_text() == "mine"
    with pytest.raises(GpuoptError):
        optimize(asked(tools, models("net"), "null:sleep_ms=1", output=str(tmp_path / "none" / "deep" / "o")))
    assert local == []


def test_a_second_search_on_one_output_ends_at_once(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=1", output=str(tmp_path / "o"))
    with journal.opened(journal.path_of(tmp_path / "o"), journal.Header(search="x"), resume=False):
        began = time.monotonic()
        with pytest.raises(ResourceError, match="another search"):
            optimize(job)
        assert time.monotonic() - began < 5 and local == []


def test_a_resumed_search_asks_nothing_again_and_another_one_begins_anew(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=2", "null:sleep_ms=1,fail=nan", output=str(tmp_path / "o"))
    first = optimize(job)
    made = len(local)
    again = optimize(replace(job, search=replace(job.search, resume=True)))
    assert len(local) - made <= 1, "the winner alone is built once more, for its bundle"
    from gpuopt.pipeline import jobs

    assert jobs.bench(tools.job("bench", tools.candidate(str(tmp_path / "o"), N=4))).runs[0].status is Status.OK
    assert again.search is not None and again.search.resumed == len(journal_keys(tmp_path / "o"))
    assert masked(again) == masked(first)
    anew = optimize(replace(job, force=True))
    assert anew.search is not None and anew.search.resumed == 0


def test_a_journal_of_other_settings_is_not_resumed(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=2", output=str(tmp_path / "o"))
    optimize(job)
    for changed in (
        replace(job, search=replace(job.search, goal="throughput")),
        replace(job, bench=replace(job.bench, verify="off")),
        replace(job, candidates=(replace(job.candidates[0], dims={"N": 8}),)),
    ):
        with pytest.raises(UsageError, match="another search"):
            optimize(replace(changed, search=replace(changed.search, resume=True)))


def test_a_journal_of_files_that_have_changed_is_not_resumed(tmp_path: Path) -> None:
    """What a factory's file, given inputs and a folder hold is no setting, and answers rest on it."""
    from gpuopt.core.spec import Candidate, InputSpec, ModelRef
    from gpuopt.pipeline.search.optimize import _read_by

    source, given, folder = tmp_path / "m.py", tmp_path / "x.npz", tmp_path / "llama"
    folder.mkdir()
    for path in (source, given, folder / "w.safetensors"):
        path.write_bytes(b"one")
    for text, path in ((f"{source}:build", source), ("pkg.mod:build", given), (str(folder), folder / "w.safetensors")):
        base = Candidate(model=ModelRef(text=text), inputs=InputSpec(file=str(given)))
        before = _read_by(base)
        assert before == _read_by(base)
        path.write_bytes(b"other")
        assert _read_by(base) != before, text


def test_an_empty_journal_is_nothing_to_resume_over_a_bundle(local: Any, tools: Any, models: Models, tmp_path: Path) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=2", "null:sleep_ms=1", output=str(tmp_path / "o"))
    optimize(job)
    path = journal.path_of(tmp_path / "o")
    kept = sorted((p.name, p.read_bytes()) for p in (tmp_path / "o").iterdir() if p.is_file())
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match="no answer to go on with, and o is already there"):
        optimize(replace(job, search=replace(job.search, resume=True)))
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "o").iterdir() if p.is_file()) == kept


def test_throughput_without_a_batch_starts_where_the_model_does(local: Any, tools: Any, models: Models) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=2", search={"goal": "throughput", "max_trials": 5})
    bare = replace(job.candidates[0], dims={}, inputs=replace(job.candidates[0].inputs, dims=()))
    report = optimize(replace(job, candidates=(bare,)))
    assert report.search is not None and report.search.choice is not None
    assert max(t.batch or 0 for t in report.search.trials if t.screened_ms) > 1, "a call takes as long whatever its batch: more is better"


# -- a machine that others use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["measure", "profile"])
def test_an_input_that_cannot_be_traced_is_searched_for_all_the_same_and_says_so(
    local: Any, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A busy machine's times lie above its own ceilings however often these are measured again: the trace is given up, the search is not."""
    from gpuopt.pipeline.session import Session
    from gpuopt.profiling.roofline import ImpossibleFigure
    from gpuopt.reports import console

    def impossible(*_: object, **__: object) -> None:
        if step == "measure":
            raise ResourceError("this machine is too busy to be measured", fix="stop what else runs on it")
        raise ImpossibleFigure("fp32: 99 GFLOP/s is above the measured 12 GFLOP/s")

    monkeypatch.setattr(Session, step, impossible)
    watcher = tools.Watcher()
    job = asked(tools, models("net"), "null:sleep_ms=1")
    report = optimize(job, watcher)
    found = report.search
    assert found is not None and found.choice is not None, found
    (base, other) = found.trials
    assert other.outcome not in ("planned", "pruned") and other.screened_ms, "it was tried"
    assert other.predicted_ms is not None and base.screened_ms is not None
    assert "too busy" in base.note and "its FLOPs, its bytes and the ceilings" in base.note
    assert any("no trace of eager" in w or "no trace of" in w for w in watcher.warnings)
    assert "too busy" in " ".join(console.text(report, width=140).split())


@pytest.mark.parametrize("error", [ResourceError("too busy", fix="wait"), ImpossibleFigure("2 PFLOP/s is above the data sheet")])
def test_a_rate_that_cannot_be_costs_a_screening_its_rates_alone(
    local: Any, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from gpuopt.pipeline.search import trying

    measured = trying.figures.measured

    def impossible(run: Any, found: Any, device: Any, count: Any) -> Any:
        if count is not None:
            raise error
        return measured(run, found, device, count)

    monkeypatch.setattr(trying, "figures", SimpleNamespace(measured=impossible, failed=trying.figures.failed))
    watcher = tools.Watcher()
    found = optimize(asked(tools, models("net"), "null:sleep_ms=6", base="null:sleep_ms=30"), watcher).search
    assert found is not None and found.choice is not None and not found.choice.keeps_input
    assert any("no rates of" in warning for warning in watcher.warnings)


def test_ceilings_that_the_input_beats_rule_nothing_out(local: Any, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor above the time of the input is one of a busy minute: by it no candidate could be faster, and none would be built."""
    from gpuopt.core.result import Bounds
    from gpuopt.pipeline.search import explaining

    monkeypatch.setattr(
        explaining.roofline_bounds, "build", lambda *_, **__: Bounds(precision="fp32", unfused_ms=900.0, fused_ms=800.0, kind="measured")
    )
    monkeypatch.setattr(explaining, "profiled", _too_busy)
    found = optimize(asked(tools, models("net"), "null:sleep_ms=1")).search
    assert found is not None and found.trials[1].screened_ms is not None and found.trials[1].bound_ms is None


def test_a_child_that_cannot_say_what_the_model_is_made_of_costs_its_rewrites_alone(
    local: Any, tools: Any, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.pipeline.session import Session

    monkeypatch.setattr(Session, "traits", _too_busy)
    watcher = tools.Watcher()
    found = optimize(asked(tools, models("net"), "null:sleep_ms=1", search={"rewrites": None}), watcher).search
    assert found is not None and found.choice is not None and found.trials[1].screened_ms is not None
    assert any("no rewrites are tried" in w for w in watcher.warnings)


def _too_busy(*_: object, **__: object) -> None:
    raise ResourceError("this machine is too busy to be measured", fix="stop what else runs on it")


# -- interrupted -----------------------------------------------------------------------------------------------------------------------


def journal_keys(output: Path) -> list[str]:
    return [json.loads(line)["key"] for line in journal.path_of(output).read_bytes().splitlines()[1:]]


def masked(report: Report) -> Any:
    """Without what was measured: every figure, also in sentences."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return "#" if value and all(isinstance(v, int | float) for v in value) else [plain(v) for v in value]
        if isinstance(value, bool) or value is None:
            return value
        return re.sub(r"<?[\d.]+(e[-+]?\d+)?( ?(ns|µs|ms|s|KiB|MiB|GiB)\b)?", "#", value) if isinstance(value, str) else "#"

    told = plain(codec.dump(report))
    for key in ("command",):
        told.pop(key, None)
    assert isinstance(told, dict)
    return {"search": {k: v for k, v in told["search"].items() if k in ("goal", "choice", "stopped")}, "trials": _trials(report), "runs": [(r["backend"], r["status"], r["verified"] if "verified" in r else None) for r in told["runs"]]}  # fmt: skip


def _trials(report: Report) -> list[tuple[str, str, str]]:
    assert report.search is not None
    return [(t.key, t.origin, t.outcome) for t in report.search.trials]


def forked(work: Callable[[], None]) -> int:
    """Process id of a copy of this process that does this and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import torch

            torch.set_num_threads(1)  # OpenMP's threads are not in the copy
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def killed_and_resumed(job: Job, path: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Masked reports of searches that were killed once and gone on with, and of one that was not, last."""

    def write(job: Job, to: Path) -> None:
        to.write_text(codec.to_json(optimize(job)))

    began = time.monotonic()
    whole = path / "whole"
    assert os.waitpid(forked(lambda: write(replace(job, output=str(path / "a")), whole)), 0)[1] == 0
    took = time.monotonic() - began
    draw, found = random.Random(seed), []
    for number in range(kills):
        output, to = path / f"k{number}", path / f"k{number}.json"
        own = replace(job, output=str(output))
        pid = forked(lambda own=own, to=to: write(own, to))  # type: ignore[misc]
        time.sleep(draw.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        resume = journal.path_of(output).exists()
        again = replace(own, search=replace(own.search, resume=resume), force=True)
        assert os.waitpid(forked(lambda again=again, to=to: write(again, to)), 0)[1] == 0  # type: ignore[misc]
        found.append(masked(codec.from_json(Report, to.read_text())))
        left = sorted(p.name for p in path.iterdir() if p.name.startswith((f"k{number}.", f".k{number}")))
        assert not any("tmp" in name for name in left), left
    return [*found, masked(codec.from_json(Report, whole.read_text()))]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_instant_and_resumed_the_report_is_the_same(
    local: Any, tools: Any, models: Models, tmp_path: Path, kills: int
) -> None:
    job = asked(tools, models("net"), "null:sleep_ms=6", "null:sleep_ms=1,fail=wrong", base="null:sleep_ms=30")
    *found, whole = killed_and_resumed(job, tmp_path, kills, seed=kills)
    for one in found:
        assert one == whole


def workers_of(pid: int) -> list[int]:
    """Processes of this session's or below it, by /proc."""
    found, wanted = [], {pid}
    for entry in sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat[1]) in wanted:
            wanted.add(entry)
            found.append(entry)
    return found


COMMAND = """
import sys
from dataclasses import replace
from gpuopt.cli import app, show
from gpuopt.core import codec
from gpuopt.core.spec import Job
from gpuopt.devices import info, null
from gpuopt.pipeline import environment, facts, machine
from gpuopt.pipeline.search.optimize import optimize

if __name__ == "__main__":
    device = replace(info.describe("cpu"), ceilings=null.CEILINGS)
    machine.survey = lambda *_, **__: facts.Survey(environment=environment.describe(), device=device)
    app._catch_signals()
    try:
        code = show.run(codec.from_json(Job, open("job.json").read()), optimize, json="r.json", ask=False)
    except KeyboardInterrupt:
        code = 130
    except app.Terminated as end:
        code = end.code
    sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_search_leaves_the_best_so_far_and_nothing_running(
    tools: Any, models: Models, tmp_path: Path, number: int, code: int
) -> None:
    """The real thing, children and all: a signal while a candidate hangs."""
    job = asked(tools, models("net"), "null:sleep_ms=2", "null:sleep_ms=1,fail=grandchild", output="fast")
    (tmp_path / "job.json").write_text(codec.to_json(job))
    (tmp_path / "command.py").write_text(COMMAND)
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen([sys.executable, "command.py"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err)
    try:
        path, deadline = journal.path_of(tmp_path / "fast"), time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and sum(b'"screen ' in line for line in path.read_bytes().splitlines()) >= 2:
                break
            time.sleep(0.1)
        time.sleep(6)
        seen = workers_of(process.pid)
        process.send_signal(number)
        assert process.wait(timeout=60) == code, (tmp_path / "err").read_text()
    finally:
        process.kill()
        process.wait()
    time.sleep(0.5)
    assert len(seen) >= 2 and not [pid for pid in seen if Path(f"/proc/{pid}").exists()]
    assert json.loads((tmp_path / "r.json").read_text())["error"]["exit_code"] == code
    assert (tmp_path / "fast" / "manifest.json").exists(), (tmp_path / "err").read_text()


@pytest.mark.slow  # it hangs on who is faster by some milliseconds: not while other tests take the cores
def test_ctrl_c_writes_the_best_so_far_from_a_child_that_was_in_the_middle_of_something(
    local: Any, tools: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.pipeline import jobs
    from gpuopt.pipeline.search import race

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    watcher = tools.Watcher()
    job = asked(tools, models("net"), "null:sleep_ms=2", output=str(tmp_path / "o"))
    with monkeypatch.context() as patched:
        patched.setattr(race, "raced", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimize(job, watcher)
    assert any("holds the best so far" in text for text in watcher.warnings), watcher.warnings
    report = jobs.bench(tools.job("bench", tools.candidate(str(tmp_path / "o"), N=4)))
    assert report.runs[0].status is Status.OK and report.runs[0].backend == "null"
    resumed = optimize(replace(job, search=replace(job.search, resume=True), force=True))
    assert resumed.search is not None and resumed.search.resumed >= 2
    assert resumed.search.choice is not None and not resumed.search.choice.keeps_input


def test_ctrl_c_before_anything_was_better_writes_nothing(
    local: Any, tools: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = tools.Watcher()
    from gpuopt.pipeline.search import explaining

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(explaining, "explained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimize(asked(tools, models("net"), "null:sleep_ms=2", output=str(tmp_path / "o")), watcher)
    assert not (tmp_path / "o").exists() and any("no bundle was written" in text for text in watcher.warnings)


def test_a_call_that_was_interrupted_does_not_answer_the_next() -> None:
    from gpuopt.pipeline.facts import Measured

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    here = str(Path(__file__).parents[1])
    with isolate.Child("fake_worker", environment={"PYTHONPATH": here}) as child:
        with pytest.raises(KeyboardInterrupt):
            child.call("echo", Measured, timeout_s=20, on_progress=interrupt, ns=[1])
        for ns in ([2], [3]):
            assert child.call("echo", Measured, timeout_s=20, ns=ns).samples.samples_ns == tuple(ns)
