"""What a name promises, told without importing: the errors are those of loading, and nothing that would load is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpuopt import loaders, models
from gpuopt.core.errors import BadInput, GpuoptError, UsageError
from gpuopt.core.spec import ModelRef


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "pack", "pack.inner"):  # back as it was afterwards, whatever was imported
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mine.py").write_text(
        "ran = open('was_run', 'w').close()\nif True:\n    def build(): ...\ntry:\n    from torch import nn as layers\nexcept ImportError:\n    pass\n"
        "made, other = 1, 2\nfor i in []:\n    late = i\n"
    )
    (tmp_path / "lazy.py").write_text("def __getattr__(name):\n    return name\n")
    (tmp_path / "dynamic.py").write_text("globals()['build'] = None\n")
    (tmp_path / "starred.py").write_text("from math import *\n")
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("open('was_run', 'w').close()\n")
    (tmp_path / "pack" / "inner.py").write_text("def build(): ...\n")
    (tmp_path / "page.pt").write_text("<html>\n")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "mine.py:build", "mine.py:layers", "mine.py:made", "mine.py:other", "mine.py:late", "mine:build", "lazy.py:anything", "dynamic.py:build",
        "starred.py:build", "broken.py:build", "pack.inner:build", "hf:org/name@" + "0" * 40, "math:sqrt", "torch.nn:Linear", "os.path:join", "__main__:build",
        *(f"gpuopt.models:{name}" for name in models.__all__),
    ],
)  # fmt: skip
def test_what_may_be_a_model_passes_and_nothing_of_it_is_run(here: Path, text: str) -> None:
    loaders.require(text)
    assert not (here / "was_run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none.pt", "there is no file or folder none.pt"),
        ("mine.py", "mine.py is a Python file"),
        ("nowhere.py:build", "there is no file nowhere.py"),
        ("mine.py:bild", "mine.py has no 'bild'"),
        ("pack.inner:bild", "pack.inner has no 'bild'"),
        ("no_such_package.models:build", "there is no module 'no_such_package'"),
        ("gpuopt.models:resnet1O1", "gpuopt.models has no 'resnet1O1'"),
        ("mine.py:", "is not of the form"),
        ("", "names no model"),
        ("page.pt", "page.pt is an HTML or XML page"),
    ],
)
def test_what_loading_would_refuse_by_its_name_is_refused_in_the_same_words(here: Path, text: str, said: str) -> None:
    with pytest.raises((UsageError, BadInput)) as raised:
        loaders.require(text)
    assert said in raised.value.message and raised.value.fix
    assert not (here / "was_run").exists()
    with pytest.raises(GpuoptError) as loading:
        loaders.load(ModelRef(text=text))
    assert loading.value.message == raised.value.message


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UsageError) as raised:
        loaders.require("gpuopt.models:resnet1O1")
    assert "resnet101" in raised.value.fix
