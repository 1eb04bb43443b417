"""A path holds the old file or the complete new one, whatever happens while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gpuopt.converters.publish import publish
from gpuopt.core.errors import ResourceError


def test_the_file_appears_under_its_name_and_nothing_else_does(tmp_path):
    target = tmp_path / "new" / "model.onnx"
    with publish(target) as temporary:
        temporary.write_text("graph")
        (temporary.parent / "model.onnx.data").write_text("weights")
        assert not target.exists()
    assert sorted(p.name for p in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_file_gets_the_mode_that_the_umask_gives_though_its_writer_made_it_private(tmp_path):
    before = os.umask(0o027)
    try:
        with publish(tmp_path / "w.safetensors") as temporary:
            temporary.write_text("weights")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_error_leaves_the_old_file_and_no_stump(tmp_path):
    target = tmp_path / "model.pt2"
    target.write_text("old")
    with pytest.raises(KeyError), publish(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_a_file_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as caught, publish(tmp_path / "file" / "model.pt2"):
        pass
    assert caught.value.exit_code == 5


def test_a_target_that_is_a_folder_is_refused_and_left(tmp_path):
    (tmp_path / "model.pt2").mkdir()
    with pytest.raises(ResourceError), publish(tmp_path / "model.pt2") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "model.pt2").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_a_resource_error(tmp_path):
    code = (
        "import resource, signal; from pathlib import Path; from gpuopt.converters.publish import publish; from gpuopt.core.errors import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        f"try:\n    with publish(Path({str(tmp_path / 'x.bin')!r})) as t: t.write_bytes(b'x' * 1000)\n"
        "except ResourceError as error: print(error.message)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "no room for x.bin" in said and list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "x.bin"
    target.write_bytes(b"old" * 1000)
    code = (
        "import sys; from pathlib import Path; from gpuopt.converters.publish import publish\n"
        f"while True:\n    with publish(Path({str(target)!r})) as t:\n        t.write_bytes(b'new' * 1000); print(flush=True)"
    )
    for delay in (0.0, 0.002, 0.01):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert target.read_bytes() in (b"old" * 1000, b"new" * 1000)
