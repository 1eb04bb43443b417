"""Words -> Job, for each command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuopt.cli import app, request
from gpuopt.core.errors import UsageError
from gpuopt.core.spec import BackendSpec, BenchSpec, Candidate, DimSpec, Precision, TensorSpec


def job_of(caught: list[Any], *words: str) -> Any:
    assert app.run(list(words)) == 0
    return caught.pop()


def test_profile_needs_nothing_but_a_model(caught: list[Any]) -> None:
    job = job_of(caught, "profile", "model.pt")
    assert job.verb == "profile"
    assert job.candidates == (
        Candidate(
            model=request.models(["model.pt"], arch=None, trust=None, trust_remote_code=False, cast=False, allow_nonfinite=False)[0],
            device="auto",
        ),
    )


def test_bench_combines_everything_and_keeps_one_shape_together(caught: list[Any]) -> None:
    job = job_of(
        caught,
        "bench",
        "a.pt",
        "b.onnx",
        "-b",
        "eager",
        "-b",
        "inductor:max-autotune",
        "-p",
        "fp32,fp16",
        "--batch",
        "1,8",
        "--input-mode",
        "both",
        "--dim",
        "S=128",
    )
    assert len(job.candidates) == 2 * 2 * 2 * 2 * 2
    shapes = [(tuple(c.dims.items()), c.input_mode) for c in job.candidates]
    assert len(set(shapes)) == 4
    assert all(shapes[i] == shapes[i - 1] or shapes[i] not in shapes[:i] for i in range(1, len(shapes)))
    first = job.candidates[0]
    assert (first.model.text, first.backend, first.precision) == ("a.pt", BackendSpec(), Precision.FP32)
    assert first.dims == {"N": 1, "S": 128}


def test_an_onnx_file_runs_in_onnx_runtime_where_no_backend_is_named(caught: list[Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    (tmp_path / "other.onnx").write_text("no model")
    words = ("bench", str(tmp_path / "m.onnx"), "gpuopt.models:resnet101_tiny", str(tmp_path / "other.onnx"))
    assert [c.backend.name for c in job_of(caught, *words).candidates] == ["ort", "eager", "eager"]
    assert [c.backend.name for c in job_of(caught, *words, "-b", "inductor").candidates] == ["inductor"] * 3
    (candidate,) = job_of(caught, "profile", str(tmp_path / "m.onnx"), "--option", "threads=2").candidates
    assert candidate.backend == BackendSpec(name="ort", options={"threads": 2})


def test_a_limit_of_the_time_limits_the_warm_up_too(caught: list[Any]) -> None:
    assert job_of(caught, "bench", "m", "--max-time", "2s").bench.max_warmup_s == 2.0
    assert job_of(caught, "bench", "m", "--max-time", "1ms").bench.max_warmup_s == BenchSpec().warmup_s
    assert job_of(caught, "bench", "m", "--max-time", "10min").bench.max_warmup_s == BenchSpec().max_warmup_s


def test_units_are_read(caught: list[Any]) -> None:
    words = "bench m --max-latency 15ms --min-tflops 3 --max-error 1e-3 --baseline b.json --max-slowdown 5% --min-time 500ms --max-time 2s --timeout 2min --pairs 7"
    job = job_of(caught, *words.split())
    assert job.gates.max_latency_ms == pytest.approx(15)
    assert job.gates.max_slowdown == pytest.approx(0.05)
    assert (job.gates.min_tflops, job.gates.max_error, job.gates.baseline) == (3, 1e-3, "b.json")
    assert (job.bench.min_time_s, job.bench.max_time_s, job.bench.timeout_s, job.bench.num_pairs) == (0.5, 2, 120, 7)
    assert job.tolerance.max_error == 1e-3


def test_a_bare_latency_is_milliseconds(caught: list[Any]) -> None:
    assert job_of(caught, "bench", "m", "--max-latency", "15").gates.max_latency_ms == pytest.approx(15)


def test_model_inputs_and_changes_reach_the_candidate(caught: list[Any]) -> None:
    words = "profile m.pt --arch a.b:c --trust sha256:00 --cast --allow-nonfinite --trust-remote-code --channels-last --fold-bn --keep-fp32 head -d cuda:1 --seed 7"
    candidate = job_of(
        caught, *words.split(), "--input", "x:float16[N,3]", "--option", "a=1", "--option", "b=text", "--preset", "p", "-b", "inductor"
    ).candidates[0]
    assert (candidate.model.arch, candidate.model.trust, candidate.model.cast) == ("a.b:c", ("sha256:00",), True)
    assert candidate.model.trust_remote_code and candidate.model.allow_nonfinite
    assert candidate.inputs.tensors == (TensorSpec.parse("x:float16[N,3]"),)
    assert candidate.inputs.seed == 7
    assert candidate.backend == BackendSpec(name="inductor", preset="p", options={"a": 1, "b": "text"})
    assert candidate.transforms.channels_last and candidate.transforms.fold_batch_norm and candidate.transforms.keep_fp32 == ("head",)
    assert candidate.device == "cuda:1"


def test_convert_and_compile_say_where_and_what_to_write(caught: list[Any]) -> None:
    job = job_of(caught, "convert", "m.pt", "-o", "m.onnx", "--to", "onnx", "-f", "--allow-inaccurate", "-p", "fp16")
    assert (job.verb, job.output, job.to, job.force, job.allow_inaccurate) == ("convert", "m.onnx", "onnx", True, True)
    job = job_of(caught, "compile", "m.pt", "-b", "trt", "-o", "fast", "--build-only", "--dim", "S=1:128:512")
    assert (job.verb, job.output, job.build_only, job.candidates[0].backend.name) == ("compile", "fast", True, "trt")
    assert job.candidates[0].inputs.dims == (DimSpec(name="S", values=(128,), low=1, high=512),)


def test_device_and_backends_name_their_device(caught: list[Any]) -> None:
    job = job_of(caught, "device", "-d", "cuda:1", "--refresh")
    assert (job.verb, job.device, job.refresh, job.candidates) == ("device", "cuda:1", True, ())
    job = job_of(caught, "backends")
    assert (job.verb, job.device, job.candidates) == ("backends", "auto", ())
    assert job_of(caught, "backends", "m.onnx").candidates[0].model.text == "m.onnx"


def test_run_does_what_the_recipe_says_but_for_what_is_typed(caught: list[Any], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("verb: compile\nmodel: m.pt\nbackend: trt\noutput: a\ndevice: cuda\n")
    job = job_of(caught, "run", str(recipe))
    assert (job.verb, job.output, job.candidates[0].device) == ("compile", "a", "cuda")
    job = job_of(caught, "run", str(recipe), "-d", "cpu", "-o", "b", "--force")
    assert (job.output, job.candidates[0].device, job.force) == ("b", "cpu", True)


def test_the_command_is_kept_as_it_can_be_typed_again(caught: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/gpuopt", "profile", "my model.pt"])
    assert request.command_line() == "gpuopt profile 'my model.pt'"


@pytest.mark.parametrize(("text", "wanted"), [("1", (1,)), ("1,8,64", (1, 8, 64)), (" 2 , 3 ", (2, 3))])
def test_batches(text: str, wanted: tuple[int, ...]) -> None:
    assert request.batches(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1.5", "a", "-1", "1e3", "9" * 40, "１"])
def test_batches_that_are_none_are_refused(text: str) -> None:
    if text == "１":  # a full-width digit is a digit to Python: harmless, and worth knowing
        assert request.batches(text) == (1,)
        return
    with pytest.raises(UsageError):
        request.batches(text)
