"""Values survive JSON; what is not a value is refused with its key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpuopt.core import codec
from gpuopt.core.errors import BadInput, UsageError
from gpuopt.core.result import Environment, Report, Run, Samples, Stats
from gpuopt.core.spec import BackendSpec, Candidate, Job, ModelRef, Precision, TensorSpec

CANDIDATE = Candidate(
    model=ModelRef(text="model.pt", trust=("ab" * 32,)),
    backend=BackendSpec(name="inductor", preset="max-autotune", options={"nested": {"a": [1, None, True]}}),
    precision=Precision.BF16,
    dims={"N": 8},
)
REPORT = Report(
    schema_version=1,
    command="gpuopt bench",
    verb="bench",
    environment=Environment(gpuopt="0", python="3", platform="linux"),
    runs=(Run(model="m", backend="eager", samples_ns=(1, 2, 3), latency_ms=Stats(num_samples=3, median=1.0, mean=1.0, min=1.0, max=1.0)),),
)


@pytest.mark.parametrize(
    "value", [CANDIDATE, REPORT, Job(verb="bench", candidates=(CANDIDATE,)), Samples(samples_ns=(5,)), TensorSpec.parse("x:fp32[N,3]")]
)
def test_a_value_survives_json(value: object) -> None:
    assert codec.from_json(type(value), codec.to_json(value)) == value
    assert codec.from_plain(type(value), codec.dump(value)) == value


def test_equal_values_have_equal_bytes_and_digests_whatever_the_order_of_their_keys() -> None:
    one = replace(CANDIDATE, dims={"N": 8, "S": 1})
    two = replace(CANDIDATE, dims={"S": 1, "N": 8})
    assert codec.to_json(one) == codec.to_json(two)
    assert codec.digest(one) == codec.digest(two) != codec.digest(CANDIDATE)


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_a_float_json_cannot_carry_is_refused_by_its_path(figure: float) -> None:
    with pytest.raises(ValueError, match=r"\$\.runs\[0\]\.tflops"):
        codec.to_json(replace(REPORT, runs=(replace(REPORT.runs[0], tflops=figure),)))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["backend"].update(colour="red"), "backend.colour"),
        (lambda d: d.update(dims={"N": "8"}), "dims.N"),
        (lambda d: d.update(precision="fp12"), "precision"),
        (lambda d: d.pop("model"), "model"),
        (lambda d: d["model"].update(cast=1), "model.cast"),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_refused_by_its_path(change: object, where: str) -> None:
    plain = codec.dump(CANDIDATE)
    change(plain)  # type: ignore[operator]
    with pytest.raises(UsageError, match=where):
        codec.from_plain(Candidate, plain)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"verb": "bench"', "\x00"])
def test_what_is_no_report_is_bad_input(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"report\.json"):
        codec.read_json(Report, path)
    with pytest.raises(BadInput):
        codec.read_json(Report, tmp_path / "absent.json")


def test_a_recipe_is_plain_yaml() -> None:
    assert codec.load_yaml("a: 1\nb: [x, y]\n", what="recipe") == {"a": 1, "b": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3"),
        ("a: &x [1]\nb: *x\n", "line 2"),
        ("a: !!python/object/apply:os.system [true]\n", "line 1"),
        ("a: [1\nb: 2\n", "line"),
        ("a: 1\n  b: 2\n", "line"),
    ],
)
def test_repeated_keys_aliases_and_tags_are_refused_with_their_line(text: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        codec.load_yaml(text, what="recipe.yaml")


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    with pytest.raises(UsageError, match="alias"):
        codec.load_yaml(bomb, what="recipe.yaml")


def test_the_schema_names_every_field_of_a_report() -> None:
    schema = codec.schema(Report)
    json.dumps(schema)
    assert {"schema_version", "command", "environment", "device", "runs", "findings"} <= set(schema["properties"])
