"""What the README says exists, parses, and comes from report files."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "recipes" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_in_the_readme_is_made_from_a_report_file() -> None:
    assert tables().render(README) == README


def test_a_changed_figure_would_be_noticed() -> None:
    made = re.sub(r"(\d)\.(\d)", r"\g<1>.9\g<2>", README, count=400)
    assert tables().render(made) != made


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_every_link_and_named_file_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    named = re.findall(r"`(recipes/[\w./-]+\.(?:json|yaml))`", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()] + [n for n in named if not (ROOT / n).exists()]
    assert missing == []


def test_every_command_in_the_readme_is_one_the_tool_has() -> None:
    from gpuopt.cli import app

    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("gpuopt ")]
    assert lines
    for line in lines:
        command = shlex.split(line)[1]
        assert app.run([command, "--help"]) == 0
