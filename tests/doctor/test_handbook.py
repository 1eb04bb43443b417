"""The handbook: a page for every rule, and docs/doctor.md made from them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from gpuopt.core.errors import UsageError
from gpuopt.doctor import handbook
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import rules

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"


@pytest.mark.parametrize("code", list(rules()))
def test_a_page_is_found_by_code_and_by_name(code: str) -> None:
    rule = rules()[code]
    assert handbook.text(code.lower()) == handbook.text(rule.name) == handbook.page(rule, level=1)
    assert rule.what in handbook.text(code) and rule.after.splitlines()[0] in handbook.text(code)


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UsageError) as told:
        handbook.text("pagable-h2d")
    assert "pageable-h2d" in (told.value.fix or "")


def test_the_committed_book_is_what_the_rules_say() -> None:
    assert DOCS.read_text(encoding="utf-8") == handbook.book(), "python -m gpuopt.doctor.handbook docs"


def test_there_are_at_least_38_rules_in_every_group() -> None:
    assert len(rules()) >= 38
    assert {code[3] for code in rules()} == set(handbook.GROUPS)


@pytest.mark.parametrize("code", list(rules()))
def test_a_page_says_who_makes_the_change_and_what_is_looked_at(code: str) -> None:
    rule, page = rules()[code], handbook.text(code)
    assert rule.needs <= set(handbook.LOOKS_AT)
    assert ("yours to make" in page) == (not rule.has_change)
    assert ("only with `--unsafe-fixes`" in page) == (rule.has_change and not rule.safe)
    assert all(symptom in page for symptom in rule.explains)


def test_what_can_be_looked_at_is_what_there_is_evidence_of() -> None:
    assert set(handbook.LOOKS_AT) <= {field.name for field in fields(Evidence)}


def test_code_that_is_no_python_is_not_called_so() -> None:
    assert "```text\ndriver 535" in handbook.text("GPU606") and "```python\nx = self.bn(self.conv(x))" in handbook.text("GPU304")


def test_what_is_near_no_rule_is_sent_to_none() -> None:
    with pytest.raises(UsageError) as told:
        handbook.text("qqq")
    assert "GPU101" not in (told.value.fix or "")
