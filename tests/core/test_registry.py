"""Names -> objects, late, with a remedy when they cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.registry import resolve


def test_a_row_is_imported_when_it_is_asked_for() -> None:
    table = {"sqrt": "math:sqrt", "json": "json"}
    assert resolve(table, "sqrt", kind="backend")(9) == 3
    assert resolve(table, "json", kind="backend") is sys.modules["json"]


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(UsageError, match="inductr") as caught:
        resolve({"inductor": "math:sqrt", "eager": "math:pi"}, "inductr", kind="backend")
    assert "did you mean 'inductor'" in caught.value.fix and "eager" in caught.value.fix


def test_a_missing_library_names_the_extra_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaf_without_library.py").write_text("import a_library_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Unavailable, match="a_library_nobody_has") as caught:
        resolve({"x": "leaf_without_library:build"}, "x", kind="backend", extra="trt")
    assert "gpuopt[trt]" in caught.value.fix


def test_a_native_library_that_does_not_load_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaf_with_broken_library.py").write_text("raise OSError('libthing.so.1: undefined symbol: f')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Unavailable, match="undefined symbol"):
        resolve({"x": "leaf_with_broken_library:build"}, "x", kind="backend")


def test_a_typo_of_our_own_is_not_a_missing_package() -> None:
    with pytest.raises(ImportError):
        resolve({"x": "gpuopt.no_such_module:build"}, "x", kind="backend")
