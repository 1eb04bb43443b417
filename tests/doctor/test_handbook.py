"""The handbook: a page for every rule, and docs/doctor.md made from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuopt.core.errors import UsageError
from gpuopt.doctor import handbook
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
