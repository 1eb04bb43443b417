"""recipes/attribution: the page is what the file says, and a case that fails is a row with its reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpuopt.core import codec
from gpuopt.devices import info
from gpuopt.pipeline import environment
from recipes.attribution import run, table
from recipes.attribution.rows import Case, Shares


def test_the_page_is_what_the_file_says() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page()


def test_the_page_sets_each_share_beside_its_goal_and_says_why_a_case_is_missing() -> None:
    cases = (
        Case(
            model="bert_large", backend="eager", command="gpuopt profile …", share=0.991, line_share=0.98, wall_ms=50.0, unaccounted_ms=0.5
        ),
        Case(model="bert_large", backend="ort", command="gpuopt profile …", reason="error: no | here"),
    )
    found = Shares(
        command="python -m recipes.attribution.run",
        small=False,
        device=info.describe("cpu"),
        environment=environment.describe(),
        cases=cases,
    )
    page = table.render(found)
    assert "| bert_large | eager | 99.1% | 98.0% | 95% | 1.0% |" in page
    assert "| bert_large | ort | error: no / here | | 90% | |" in page
    assert "99.1%" not in table.render(Shares(command="", small=True, cases=cases))


def test_a_word_that_is_no_model_and_no_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "bert_large,tensorflow"]) == 2
    assert "tensorflow" in capsys.readouterr().err


def test_a_case_is_a_profile_of_its_own_and_one_that_cannot_be_keeps_its_reason(tmp_path: Path) -> None:
    output = tmp_path / "shares.json"
    assert run.main(["--device", "cpu", "--small", "--only", "resnet101,eager,cudagraphs", "--output", str(output)]) == 1
    done, refused = codec.read_json(Shares, output).cases
    assert done.share == 1.0 and done.wall_ms and done.command.startswith("gpuopt profile gpuopt.models:resnet101_tiny")
    assert refused.share is None and "CUDA graphs run on an NVIDIA GPU" in refused.reason
    assert str(tmp_path) not in output.read_text()
