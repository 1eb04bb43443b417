"""The documents name files that exist, and the page of commands is the one the commands make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_ours_that_is_named_exists(page: Path) -> None:
    """A name with a folder is found below the repository or the package, a bare module name anywhere in the package."""
    named = re.findall(
        r"(?<![\w./<>-])((?:gpuopt|docs|tests|recipes)/[\w./-]+\.\w+|[a-z_]+/[a-z_]+\.py|[a-z_]+\.py)(?![\w<>:])", page.read_text()
    )
    missing = [n for n in named if not (ROOT / n).exists() and not (ROOT / "gpuopt" / n).exists() and not any((ROOT / "gpuopt").rglob(n))]
    assert [n for n in missing if n not in ("file.py", "infer.py", "serve.py") and "/NAME/" not in n] == []


def test_the_page_of_commands_is_made_from_the_commands() -> None:
    from gpuopt.cli import reference

    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == reference.page()
