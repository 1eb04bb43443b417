"""Rules that matter, checked by a machine: what linters cannot see."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gpuopt

ROOT = Path(gpuopt.__file__).parent


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_every_file_says_in_its_first_line_what_it_does() -> None:
    silent = [str(p.relative_to(ROOT)) for p in sources() if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


def test_values_are_frozen_and_keyword_only() -> None:
    loose = []
    for path in (ROOT / "core" / "spec.py", ROOT / "core" / "result.py", ROOT / "pipeline" / "facts.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any(isinstance(d, ast.Call) for d in node.decorator_list):
                words = {k.arg for d in node.decorator_list if isinstance(d, ast.Call) for k in d.keywords}
                if not {"frozen", "slots", "kw_only"} <= words:
                    loose.append(node.name)
    assert loose == []


def test_importing_gpuopt_brings_in_no_heavy_library() -> None:
    script = "import sys, gpuopt; print([m for m in ('torch','transformers','pydantic','rich','numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_public_names_exist() -> None:
    for name in gpuopt.__all__:
        assert getattr(gpuopt, name) is not None


def test_no_file_names_a_path_of_a_machine() -> None:
    words = ("/work/", "/root/", "/home/")
    found = [f"{p.relative_to(ROOT)}: {w}" for p in sources() for w in words if w in p.read_text()]
    assert found == []
