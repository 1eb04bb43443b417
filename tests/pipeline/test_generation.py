"""`bench` with `generate`, through real children: tokens, their times, their bound, and what does not generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuopt.cli import app
from gpuopt.core import codec
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.generation import Generated, GenerateSpec, GenerationBuilt, TokenTimes
from gpuopt.core.progress import Silent
from gpuopt.core.result import Device, Report, Run, Stats, Status
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, DimSpec, InputSpec, Job, ModelRef
from gpuopt.devices import null
from gpuopt.pipeline import generation, jobs, machine
from gpuopt.reports import console

QUICK = BenchSpec(
    min_time_s=0.05, max_time_s=0.5, min_iterations=2, warmup_s=0.01, max_warmup_s=0.1, block_ms=1.0, num_pairs=6, energy_s=0.0
)

BROKEN = """
import torch
from gpuopt.models import llama_8b_tiny


def sampling():
    model = llama_8b_tiny()
    model.generation_config.do_sample = True
    return model


sampling.input_specs = ("input_ids:int64[N,S]<99",)


def plain():
    return torch.nn.Linear(4, 4)


plain.input_specs = ("x:float32[N,4]",)
"""


def job(model: str, *backends: str, new_tokens: int = 8, **dims: int) -> Job:
    return Job(
        verb="bench",
        candidates=tuple(
            Candidate(
                model=ModelRef(text=model),
                backend=BackendSpec.parse(name),
                inputs=InputSpec(dims=tuple(DimSpec(name=n, values=(v,)) for n, v in dims.items())),
                dims=dims,
                device="cpu",
            )
            for name in backends or ("eager",)
        ),
        bench=QUICK,
        generate=GenerateSpec(new_tokens=new_tokens, backends_named=bool(backends)),
    )


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "broken.py").write_text(BROKEN)
    return lambda name: f"{tmp_path / 'broken.py'}:{name}"


def test_the_command_compares_generate_with_a_static_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], local: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal leaves columns out
    target = tmp_path / "report.json"
    words = "bench gpuopt.models:t5_large_tiny --generate 6 --dim S=20 --device cpu -b eager -b eager:static --max-time 0.5s -q".split()
    assert app.run([*words, "--json", str(target)]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # where lines break is the width's affair
    assert "Generation" in shown and "as eager's" in shown and "generate() as shipped" in shown
    report = codec.read_json(Report, target)
    shipped, static = (run.generated for run in report.runs)
    assert shipped is not None and static is not None
    assert shipped.equal and static.equal
    assert (static.kind, static.prompt_tokens, static.bucket, static.new_tokens) == ("encoder-decoder", 20, 32, 6)
    assert static.recompiles == 0 and static.lengths == (19, 17)
    for run, told in zip(report.runs, (shipped, static), strict=True):
        assert run.latency_ms is not None and told.tokens_per_s and told.prefill_ms and told.tokens_per_s_overall
        assert told.tokens_per_s_overall == pytest.approx(6e3 / run.latency_ms.median)
        assert len(told.decode_ms) % 5 == 0, "the first token is the prefill's"
        assert told.weight_bytes == shipped.weight_bytes and told.pct_of_bound is not None
        assert "--generate 6" in run.reproduce
    assert report.runs[1].relative is not None, "timed in turns"
    assert json.loads(target.read_text())["runs"][1]["accuracy"]["passed"] is True


def test_children_build_at_once_and_one_that_fails_takes_nobody_along(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    monkeypatch.setattr(generation, "_at_once", lambda *_: 2)
    seen: list[Report] = []
    watcher = Silent()
    monkeypatch.setattr(watcher, "so_far", seen.append, raising=False)
    failed, run = jobs.bench(job("gpuopt.models:llama_8b_tiny", "cudagraphs", "eager:static", new_tokens=4, S=9), watcher).runs
    assert failed.status is Status.UNSUPPORTED and "NVIDIA GPU" in failed.reason
    assert run.status is Status.OK and run.generated is not None and run.generated.tokens_per_s
    assert run.cold_start_s and run.compile_s and run.load_s
    assert any("upper bounds" in note for note in run.notes)
    assert len(seen) >= 3, "a report after each that was built, and after the times"


def test_one_far_slower_than_the_fastest_is_timed_alone(local: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_paced", lambda live, told, spec: (live[1:], live[:1]))
    asked = job("gpuopt.models:llama_8b_tiny", "eager", "eager:static", new_tokens=6, S=9)
    first, second = jobs.bench(asked).runs
    assert first.relative is None and second.relative is not None
    assert second.relative.reason.startswith("not timed in turns")
    assert first.latency_ms is not None and second.latency_ms is not None
    assert second.relative.ratio == pytest.approx(first.latency_ms.median / second.latency_ms.median)
    assert first.generated is not None and first.generated.tokens_per_s
    assert any("timed alone" in note for note in first.notes)


def seat(name: str) -> Any:
    return SimpleNamespace(key=name)


def test_only_those_that_cost_much_and_are_far_behind_leave_the_turns() -> None:
    calls = {"eager": 5.8, "static": 2.5, "graphs": 0.9, "inductor": 0.7, "unknown": None}
    told = {name: found(call_s=seconds) for name, seconds in calls.items()}
    live = [seat(name) for name in calls]
    fast, slow = generation._paced(live, told, replace(QUICK, max_time_s=5.0))
    assert [s.key for s in slow] == ["eager", "static"] and [s.key for s in fast] == ["graphs", "inductor", "unknown"]
    fast, slow = generation._paced(live, told, replace(QUICK, max_time_s=60.0))
    assert not slow, "there is time for all"
    alike = {"a": found(call_s=50.0), "b": found(call_s=60.0)}
    assert not generation._paced([seat("a"), seat("b")], alike, QUICK)[1], "slow, but neither is far behind"


def test_times_that_overlap_prove_nothing() -> None:
    assert generation.apart([100, 110], [20, 25, 30]).verdict == "faster"
    assert generation.apart([20, 30], [100, 110]).verdict == "slower"
    assert generation.apart([100, 50], [60, 40]).verdict == "inconclusive"


def test_the_longest_build_loads_first() -> None:
    ways = ["eager", "inductor:tuned", "inductor", "cudagraphs"]
    efforts = {name: generation._effort(job("m", name).candidates[0]) for name in ways}
    assert max(efforts, key=efforts.__getitem__) == "inductor:tuned" and efforts["eager"] < efforts["inductor"]


def test_a_prompt_nobody_asked_for_is_cut_to_what_fits(local: list[Any]) -> None:
    (run,) = jobs.bench(job("gpuopt.models:llama_8b_tiny", "eager:static", new_tokens=100)).runs
    assert run.status is Status.OK and run.generated is not None and run.generated.prompt_tokens == 28
    assert "prompts of 28 tokens instead of 128: the model has 128 positions" in run.notes
    assert run.generated.new_tokens == 100 and run.accuracy is not None and run.accuracy.passed


def test_a_way_is_no_preset_that_a_backend_would_have_to_know(local: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    surveyed: list[Job] = []
    plain = machine.all_surveyed
    monkeypatch.setattr(machine, "all_surveyed", lambda asked, progress: surveyed.append(asked) or plain(asked, progress))
    (run,) = jobs.bench(job("gpuopt.models:llama_8b_tiny", "eager:static", new_tokens=4, S=9)).runs
    assert (run.backend, run.preset, run.status) == ("eager", "static", Status.OK)
    assert [candidate.backend.preset for candidate in surveyed[0].candidates] == [None]


def test_sampling_is_said_and_left_out(broken: Callable[[str], str], local: list[Any]) -> None:
    (run,) = jobs.bench(job(broken("sampling"), "eager:static", S=12)).runs
    assert run.status is Status.OK and run.generated is not None
    assert any("do_sample=True" in note for note in run.notes)


def test_what_does_not_generate_is_told_as_that(broken: Callable[[str], str], local: list[Any]) -> None:
    with pytest.raises(Unsupported, match="Linear does not generate"):
        jobs.bench(job(broken("plain"), "eager"))


def test_a_prompt_beyond_the_positions_is_refused(local: list[Any]) -> None:
    with pytest.raises(UsageError, match="128 positions") as refused:
        jobs.bench(job("gpuopt.models:llama_8b_tiny", "eager:static", new_tokens=100, S=64))
    assert "--generate 64" in refused.value.fix


def test_a_backend_that_does_not_generate_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="ort does not generate"):
        jobs.bench(job("gpuopt.models:llama_8b_tiny", "ort", S=8))


def test_without_a_backend_the_device_says_what_is_compared() -> None:
    asked = job("m", S=8)
    assert asked.generate is not None
    for kind, first, last in (("cpu", "eager", "inductor"), ("cuda", "eager", "inductor:tuned")):
        ways = generation._ways(asked.candidates, asked.generate, replace(null.DEVICE, kind=kind))
        assert (str(ways[0].backend), str(ways[-1].backend)) == (first, last)
    named = replace(asked.generate, backends_named=True)
    assert generation._ways(asked.candidates, named, null.DEVICE) == asked.candidates


def found(**fields: object) -> GenerationBuilt:
    told = Generated(
        kind="decoder-only",
        way="w",
        batch=1,
        prompt_tokens=128,
        new_tokens=128,
        weight_bytes=15.0e9,
        kv_bytes=0.0,
        step_flops=15.0e9,
        equal=True,
    )
    return GenerationBuilt(
        generated=told,
        passed=True,
        compile_s=1.0,
        cold_start_s=2.0,
        held_bytes=16e9,
        kv_bytes_a_sequence=0.0,
        full_kv_bytes_a_sequence=0.0,
        **fields,  # type: ignore[arg-type]
    )


def run_of(**fields: object) -> Run:
    stats = Stats(num_samples=3, median=750.0, mean=750.0, min=750.0, max=750.0)
    return Run(model="m", backend="inductor", precision="bf16", latency_ms=stats, **fields)  # type: ignore[arg-type]


def test_tokens_a_second_stand_against_what_reading_allows() -> None:
    """The null device reads 1e12 bytes a second: 15 GB take 15 ms."""
    device: Device = null.DEVICE
    times = TokenTimes(prefill_ns=(30_000_000,), decode_ns=(20_000_000,) * 127)
    told = generation.timed(run_of(), found(), times, device).generated
    assert told is not None
    assert told.tokens_per_s == pytest.approx(50.0)
    assert told.bound_tokens_per_s == pytest.approx(1e12 / 15e9)
    assert told.pct_of_bound == pytest.approx(75.0)
    assert told.tokens_per_s_overall == pytest.approx(128 / 0.75)
    assert told.larger_batches[0].tokens_per_s == pytest.approx(4 * told.bound_tokens_per_s)


def test_other_tokens_without_a_tie_end_a_run() -> None:
    bad = found()
    bad = replace(bad, passed=False, generated=replace(bad.generated, equal=False, first_mismatch=3, reason="other tokens at step 3"))
    run = generation.verified(run_of(), bad)
    assert run.status is Status.ACCURACY_FAIL and run.reason == "other tokens at step 3"
    tie = replace(bad, passed=True)
    run = generation.verified(run_of(), tie)
    assert run.status is Status.OK and run.accuracy is not None and run.accuracy.notes == ("other tokens at step 3",)


def test_the_page_says_where_a_server_is_the_right_answer() -> None:
    times = TokenTimes(prefill_ns=(30_000_000,), decode_ns=(20_000_000,) * 127)
    report = codec.from_plain(
        Report,
        {
            "schema_version": 1,
            "command": "gpuopt bench m --generate 128",
            "verb": "bench",
            "environment": {"gpuopt": "0", "python": "3", "platform": "x"},
        },
    )
    shown = console.text(replace(report, runs=(generation.timed(run_of(), found(), times, null.DEVICE),)), width=140)
    shown = " ".join(shown.split())
    assert "75%" in shown and "continuous batching" in shown and "bounds, not measurements" in shown
    assert "against 50.0 tokens/s measured and at most 66.7, the same bytes allow 267 at batch 4" in shown
