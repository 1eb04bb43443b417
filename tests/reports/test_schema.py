"""The published schemas are the ones of the code, and reports obey them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from gpuopt.core import codec
from gpuopt.core.result import Report
from gpuopt.reports import schema

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(schema.SCHEMAS))
def test_the_committed_schema_is_the_one_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == schema.texts()[name], "make schema rewrites it"


def test_writing_gives_what_is_committed(tmp_path: Path) -> None:
    schema.write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(schema.SCHEMAS)


def test_a_report_obeys_the_schema(sample: tuple[str, Report], hostile: Report) -> None:
    rules = json.loads(schema.texts()["report.schema.json"])
    jsonschema.Draft202012Validator.check_schema(rules)
    for report in (sample[1], hostile):
        jsonschema.validate(json.loads(codec.to_json(report)), rules, cls=jsonschema.Draft202012Validator)


def test_the_schema_refuses_a_run_without_a_model(sample: tuple[str, Report]) -> None:
    rules = json.loads(schema.texts()["report.schema.json"])
    broken = json.loads(codec.to_json(sample[1])) | {"runs": [{"backend": "eager"}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, rules)


def test_the_schema_names_what_the_issue_promises() -> None:
    rules = json.loads(schema.texts()["report.schema.json"])
    assert {"schema_version", "command", "environment", "device", "runs", "findings"} <= set(rules["properties"])
    promised = "model backend preset precision batch dims input_mode status reason latency_ms samples_per_s flops flop_coverage tflops pct_of_measured pct_of_spec"
    promised += " peak_bytes energy_j_per_sample compile_s cold_start_s accuracy precision_audit samples_ns waterfall modules"
    assert set(promised.split()) <= set(rules["$defs"]["Run"]["properties"])
    assert {"wall_ms", "parts"} <= set(rules["$defs"]["Waterfall"]["properties"])
    assert {"name", "ms"} <= set(rules["$defs"]["WaterfallPart"]["properties"])
    assert "source" in rules["$defs"]["Ceiling"]["properties"]
