"""A cache of ceilings that is broken, foreign or unwritable costs a measurement, never the run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.result import Ceiling, Ceilings
from gpuopt.devices import cached

KEY = {"name": "Some GPU", "driver": "580.82.07"}
FOUND = Ceilings(rows=(Ceiling(quantity="fp16", value=764e12, unit="FLOP/s", kind="measured", source="GEMM"),), notes=("fp8: none",))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def only_file():
    (path,) = [p for p in cached.folder().iterdir()]
    return path


def test_what_was_written_is_read_back():
    assert cached.read(KEY) == (None, None)
    assert cached.write(KEY, FOUND) is None
    assert cached.read(KEY) == (FOUND, None)


def test_the_folder_is_the_users_alone_and_holds_no_temporary_file():
    cached.write(KEY, FOUND)
    assert cached.folder().stat().st_mode & 0o777 == 0o700
    assert only_file().suffix == ".json"


@pytest.mark.parametrize("field", list(KEY))
def test_another_machine_or_driver_has_a_file_of_its_own(field):
    cached.write(KEY, FOUND)
    assert cached.read(KEY | {field: "another"}) == (None, None)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '{"key": {}, "ceilings": {}}', '{"key": {}, "ceilings": {"rows": []}, "more": 1}', "\x00" * 100]
)
def test_a_broken_file_is_measured_again_with_a_note(text):
    cached.write(KEY, FOUND)
    only_file().write_text(text)
    found, note = cached.read(KEY)
    assert found is None and "measured again" in note
    assert cached.write(KEY, FOUND) is None and cached.read(KEY) == (FOUND, None)


@given(st.integers(min_value=0, max_value=10_000))
def test_a_file_cut_anywhere_is_never_half_believed(tmp_path_factory, cut):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cut")))
        cached.write(KEY, FOUND)
        whole = only_file().read_bytes()
        only_file().write_bytes(whole[: cut % len(whole)])
        found, note = cached.read(KEY)
        # Only the last newline may go missing without harm.
        assert (found is None and note) or cut % len(whole) == len(whole) - 1


@pytest.mark.parametrize(
    ("old", "new"), [("764000000000000.0", "-1.0"), ("764000000000000.0", "0.0"), ('"measured"', '"spec"'), ("Some GPU", "Other GPU")]
)
def test_a_file_with_impossible_contents_is_measured_again(old, new):
    cached.write(KEY, FOUND)
    path = only_file()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found, note = cached.read(KEY)
    assert found is None and "measured again" in note


def test_a_folder_others_may_write_into_is_not_believed_and_not_used():
    cached.write(KEY, FOUND)
    cached.folder().chmod(0o777)
    assert cached.read(KEY)[0] is None and "others may write" in cached.read(KEY)[1]
    assert "others may write" in cached.write(KEY, FOUND)


def test_another_users_folder_is_not_believed(monkeypatch):
    cached.write(KEY, FOUND)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert cached.read(KEY)[0] is None and "another user" in cached.read(KEY)[1]
    assert "another user" in cached.write(KEY, FOUND)


def test_a_cache_that_cannot_be_written_is_a_note(home):
    (home / "gpuopt").write_text("a file where the folder should be")
    assert "could not be cached" in cached.write(KEY, FOUND)
    assert cached.read(KEY) == (None, None)


def test_a_full_disk_leaves_the_old_figures():
    cached.write(KEY, FOUND)
    code = (
        "import resource; from gpuopt.core.result import *; from gpuopt.devices import cached\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        f"print(cached.write({KEY!r}, Ceilings(rows=(Ceiling(quantity='fp16', value=1.0, unit='FLOP/s', kind='measured', source='x' * 1000),))))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "could not be cached" in said
    assert cached.read(KEY) == (FOUND, None)
    assert only_file()


def test_a_relative_cache_home_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cached.folder().is_absolute() and "here" not in cached.folder().parts
