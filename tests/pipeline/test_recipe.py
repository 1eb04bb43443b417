"""YAML -> Job, strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.core.spec import BackendSpec, DimSpec, ModelRef, Precision
from gpuopt.pipeline import recipe

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_a_grid_and_what_is_no_grid() -> None:
    job = recipe.parse("model: m\nbatch: [1, 8]\nbackend: [eager, 'inductor:max-autotune']\nprecision: [fp32, fp16]\n")
    assert len(job.candidates) == 8
    job = recipe.parse(
        "model: m\nbatch: 4\ncandidates:\n- {backend: eager, precision: fp32}\n- {backend: ort, channels_last: true, batch: [1, 2]}\n"
    )
    assert [(c.backend.name, c.dims["N"], c.transforms.channels_last) for c in job.candidates] == [
        ("eager", 4, False),
        ("ort", 1, True),
        ("ort", 2, True),
    ]


def test_a_backend_with_options_and_a_range_of_a_dimension() -> None:
    job = recipe.parse("model: m\ndims: {S: 1:8:16}\nbackend: {name: trt, preset: p, options: {workspace_mib: 4096}}\n")
    candidate = job.candidates[0]
    assert candidate.backend == BackendSpec(name="trt", preset="p", options={"workspace_mib": 4096})
    assert candidate.inputs.dims == (DimSpec(name="S", values=(8,), low=1, high=16),)  # YAML 1.1 would read 4096


def test_what_is_typed_replaces_what_the_recipe_says() -> None:
    job = recipe.parse("model: m\ndevice: cuda\noutput: a\n", device="cpu", output="b", force=True, command="gpuopt run r.yaml")
    assert (job.candidates[0].device, job.device, job.output, job.force, job.command) == ("cpu", "cpu", "b", True, "gpuopt run r.yaml")


def test_limits_have_units() -> None:
    job = recipe.parse("model: m\ngates: {max_latency: 1.5s, baseline: r.json, max_slowdown: 5%}\nbench: {min_time_s: 5e-1}\n")
    assert job.gates.max_latency_ms == pytest.approx(1500)
    assert job.gates.max_slowdown == pytest.approx(0.05)
    assert job.bench.min_time_s == 0.5


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("model: x\nbatc: 3", 2, "batc is not a key here"),
        ("model: x\nmodel: y", 2, "duplicate key 'model'"),
        ("model: x\ntrust: &a [b]\nkeep_fp32: *a", 3, "aliases are not allowed"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", 2, "aliases are not allowed"),
        ("model: x\n\nbatch: -3", 3, "batch is -3"),
        ("model: x\nbatch: 0", 2, "batch is 0"),
        ("model: x\nbatch: 1.5", 2, "batch"),
        ("model: x\nbatch: '3'", 2, "batch"),
        ("model: x\nbatch: true", 2, "batch"),
        ("model: x\ntolerance:\n  max_error: .nan", 3, "tolerance.max_error is nan"),
        ("model: x\nbench:\n  max_time_s: .inf", 3, "bench.max_time_s is inf"),
        ("model: x\nbench: {min_time_s: -1}", 2, "bench.min_time_s is -1"),
        ("model: x\nbench:\n  min_iterations: 0", 3, "bench.min_iterations is 0"),
        ("model: x\nbench:\n  verify: maybe", 3, "bench.verify is 'maybe'"),
        ("model: x\nbench:\n  verfy: full", 3, "bench.verfy is not a key here"),
        ("model: x\ncandidates:\n - {backend: eager}\n - {bakend: eager}", 4, "candidates.1.bakend is not a key here"),
        ("model: x\ncandidates:\n - {backend: eager}\n - {batch: -1}", 4, "candidates.1: batch is -1"),
        ("model: x\nbackend: {name: a, presett: b}", 2, "'presett' is not a key here"),
        ("model: x\nprecision: fp12", 2, "precision 'fp12' is unknown"),
        ("model: x\nverb: fly", 2, "verb 'fly'"),
        ("model: x\nseed: true", 2, "seed"),
        ("model: !!python/object/apply:os.system ['true']", 1, "could not determine a constructor"),
        ("model: x\ndepth: -1", 2, "depth is -1"),
        ("model: x\nto: tflite", 2, "to is 'tflite'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_key_and_line(text: str, line: int, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse(text, what="r.yaml")
    assert caught.value.message.startswith(f"r.yaml line {line}: ")
    assert told in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a mapping"),
        ("- a", "not a mapping"),
        ("verb: bench", "no model is named"),
        ("model: x\n1: 2", "the key 1"),
        ("model: x\ndims: {N: 2}\nbatch: 3", "dimension N is given twice"),
        ("model: x\ndims: {S: [1, -2]}", "'S=1,-2'"),
        ("model: x\ngates: {max_slowdown: 5%}", "nothing to be slower than"),
        ("model: 'a\\x00b'\nfoo", "r.yaml"),
        ('model: "a\\nb"', "is no name"),
        ("[" * 5000, "nested too deeply"),
        ("model: x\nbatch: [" + ",".join(map(str, range(1, 1200))) + "]", "candidates are more than"),
    ],
)
def test_other_things_that_cannot_be_meant_are_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse(text, what="r.yaml")
    assert told in caught.value.message
    assert "\n" not in caught.value.message


def test_a_misspelt_key_is_told_its_likely_name() -> None:
    with pytest.raises(UsageError) as caught:
        recipe.parse("model: x\nbackends: eager")
    assert caught.value.fix == "did you mean backend?"


@given(st.text(max_size=200))
def test_any_text_is_a_job_or_a_usage_error(text: str) -> None:
    try:
        recipe.parse(text)
    except UsageError as error:
        assert error.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=8,
    )
)
def test_any_value_under_any_key_is_a_job_or_a_usage_error(value: Any) -> None:
    import json

    for key in ("model", "batch", "dims", "backend", "candidates", "bench", "gates", "precision", "input"):
        try:
            recipe.parse(f"model: m\n{key}: {json.dumps(value)}\n" if key != "model" else f"model: {json.dumps(value)}\n")
        except UsageError as error:
            assert error.message


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with pytest.raises(UsageError, match="no such file"):
        recipe.read(path)
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        recipe.read(path)
    path.write_bytes(b"#" * (recipe.MAX_RECIPE_BYTES + 1))
    with pytest.raises(UsageError, match="larger than"):
        recipe.read(path)
    with pytest.raises(ResourceError):
        recipe.read(tmp_path)


def test_the_recipes_of_the_page_are_recipes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 4
    for block in blocks:
        assert recipe.parse(block).candidates


def test_the_page_names_every_key_there_is() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for cls in (recipe.Recipe, recipe.GatesEntry, recipe.BackendEntry):
        for name in cls.__dataclass_fields__:
            assert re.search(rf"`[^`]*\b{name}\b[^`]*`", text), name


def test_expand_keeps_each_combination_once_and_shapes_together() -> None:
    found = recipe.expand(
        models=[ModelRef(text="a"), ModelRef(text="a")],
        precisions=[Precision.FP32, None],
        backends=[BackendSpec(), BackendSpec(name="ort")],
    )
    assert len(found) == 4
    assert (found[0].precision, found[0].backend.name) == (Precision.FP32, "eager")
    with pytest.raises(UsageError, match="input mode"):
        recipe.expand(models=[ModelRef(text="a")], input_modes=["disk"])


def test_several_devices_multiply_the_candidates_and_an_empty_name_is_none() -> None:
    found = recipe.expand(models=[ModelRef(text="m.py:net")], device="cpu, cuda:0,cuda:1,cpu")
    assert [candidate.device for candidate in found] == ["cpu", "cuda:0", "cuda:1"]
    for text in ("", "cpu,", ",cuda"):
        with pytest.raises(UsageError, match="names none"):
            recipe.expand(models=[ModelRef(text="m.py:net")], device=text)
