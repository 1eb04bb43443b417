"""gpuopt.toml and [tool.gpuopt]: what they may say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuopt.cli import configuration
from gpuopt.core.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_adds_to_the_file(folder: Path) -> None:
    (folder / "gpuopt.toml").write_text('ignore = ["GPU307"]\n')
    assert configuration.ignored(["small-batch", "GPU307"]) == ("GPU307", "small-batch")


def test_pyproject_has_a_table_for_it_and_other_tables_are_nobodys_business(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[tool.other]\nignore = ["x"]\n[tool.gpuopt]\nignore = ["GPU101"]\n')
    assert configuration.ignored(None) == ("GPU101",)


def test_nothing_is_read_where_nothing_is(folder: Path) -> None:
    assert configuration.ignored(None) == ()
    (folder / "pyproject.toml").write_text("not toml [")
    assert configuration.ignored(None) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [("ignore = 3", "ignore is 3"), ("ignore = [1]", "ignore is"), ("colour = true", "'colour'"), ("= x", "cannot be read")],
)
def test_what_cannot_be_meant_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / "gpuopt.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        configuration.ignored(None)


@pytest.mark.parametrize(("word", "told"), [("smal-batch", "did you mean small-batch?"), ("nosuch", "--explain all")])
def test_a_rule_that_does_not_exist_cannot_be_ignored(word: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        configuration.ignored([word])
    assert told in caught.value.fix


def test_codes_and_names_are_known_in_any_case() -> None:
    assert configuration.ignored(["gpu307", "Small-Batch"]) == ("GPU307", "small-batch")
