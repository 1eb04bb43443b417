"""The target holds the old bundle or the complete new one, whatever happens: kills, full disks, rivals, foreign files."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpuopt.bundles import read, write
from gpuopt.core import codec
from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.result import Manifest

Artifact = Callable[[Path], dict[str, str]]


def beside(target: Path) -> list[str]:
    """Everything in the target's folder but the target."""
    return sorted(p.name for p in target.parent.iterdir() if p != target)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_holds_its_files_a_manifest_and_a_signature_and_nothing_lies_beside_it(bundle: Path) -> None:
    assert sorted(snapshot(bundle)) == ["cache/kernel.cubin", "manifest.json", "manifest.mac", "model.pt2"]
    assert beside(bundle) == []
    assert read.is_built_here(bundle)


def test_what_is_returned_is_what_was_written(tmp_path: Path, manifest: Manifest, artifact: Artifact) -> None:
    sealed = write.publish(artifact, tmp_path / "fast", manifest)
    assert codec.read_json(Manifest, tmp_path / "fast" / "manifest.json") == sealed == read.open_bundle(tmp_path / "fast")


def test_a_staged_folder_is_published_with_the_roles_of_its_manifest(tmp_path: Path, manifest: Manifest, artifact: Artifact) -> None:
    from gpuopt.core.result import ManifestFile

    target = tmp_path / "new" / "deep" / "fast"
    roles = replace(manifest, files=(ManifestFile(name="model.pt2", sha256="", bytes=0, role="artifact"),))
    with write.staging(target) as folder:
        assert folder.parent == target.parent and list(folder.iterdir()) == []
        artifact(folder)
        write.publish(folder, target, roles)
    assert {f.name: f.role for f in read.open_bundle(target).files} == {"model.pt2": "artifact", "cache/kernel.cubin": "extra"}
    assert beside(target) == []


def test_a_build_that_fails_leaves_nothing_not_even_the_parents_it_made(tmp_path: Path, manifest: Manifest) -> None:
    def build(folder: Path) -> dict[str, str]:
        (folder / "half").write_bytes(b"x" * 1000)
        raise RuntimeError("the compiler gave up")

    with pytest.raises(RuntimeError, match="gave up"):
        write.publish(build, tmp_path / "a" / "b" / "fast", manifest)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_left_unpublished_goes_away(tmp_path: Path) -> None:
    with write.staging(tmp_path / "fast") as folder:
        (folder / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_of_the_same_target_is_published(tmp_path: Path, manifest: Manifest) -> None:
    with write.staging(tmp_path / "fast") as folder, pytest.raises(ValueError, match="staging folder"):
        write.publish(folder, tmp_path / "other", manifest)


def test_a_backend_that_writes_our_own_files_or_a_link_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    def own(folder: Path) -> dict[str, str]:
        (folder / "manifest.json").write_text("{}")
        return {}

    def link(folder: Path) -> dict[str, str]:
        (folder / "weights").symlink_to("/etc/hostname")
        return {}

    with pytest.raises(ValueError, match=r"manifest\.json"):
        write.publish(own, tmp_path / "fast", manifest)
    with pytest.raises((BadInput, OSError)):
        write.publish(link, tmp_path / "fast", manifest)
    assert list(tmp_path.iterdir()) == []


# -- where a bundle may go ------------------------------------------------------------------------------------------------------------


def test_an_existing_bundle_is_replaced_by_force_alone(bundle: Path, manifest: Manifest, artifact: Artifact) -> None:
    before = snapshot(bundle)
    with pytest.raises(UsageError, match="already") as caught:
        write.publish(artifact, bundle, replace(manifest, seed=9))
    assert "--force" in caught.value.fix
    assert snapshot(bundle) == before
    write.publish(artifact, bundle, replace(manifest, seed=9), force=True)
    assert read.open_bundle(bundle).seed == 9
    assert beside(bundle) == []


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, manifest: Manifest, artifact: Artifact) -> None:
    (tmp_path / "fast").mkdir()
    write.publish(artifact, tmp_path / "fast", manifest)
    read.open_bundle(tmp_path / "fast")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "dangling", "foreign", "foreign manifest", "mixed", "mixed below", "parent file"])
def test_what_is_not_ours_is_never_touched(tmp_path: Path, bundle: Path, kind: str, force: bool) -> None:
    target = tmp_path / "t"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        target.symlink_to(bundle)
    elif kind == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "foreign":
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    elif kind == "foreign manifest":
        target.mkdir()
        (target / "manifest.json").write_text('{"name": "a web app"}')
    elif kind == "parent file":
        (tmp_path / "file").write_text("")
        target = tmp_path / "file" / "t"
    else:
        target = bundle
        (target / ("cache" if kind == "mixed below" else ".") / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError) as caught:
        write.check_target(target, force=force)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["a\nb", "x" * 300, "\x7f"])
def test_an_impossible_name_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        write.check_target(tmp_path / name)


def test_an_output_may_not_lie_in_its_input_nor_the_input_in_it(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    for target, what in (
        (source, source),
        (source / "fast", source),
        (tmp_path, source / "config.json"),
        (tmp_path / "link" / "fast", source),
    ):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(source)
        with pytest.raises(UsageError):
            write.check_target(target, source=what)
    write.check_target(tmp_path / "fast", source=source)
    write.check_target(tmp_path / "fast", source=tmp_path / "not a file: pkg.mod:factory")


def test_a_folder_that_cannot_be_written_to_is_a_resource_error_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = write.tempfile.TemporaryFile

    def refuse(*args: object, dir: Path, **more: object) -> object:
        if Path(dir) == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(write.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ResourceError, match="Read-only"):
        write.check_target(tmp_path / "deep" / "fast")


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="needs /proc")
def test_a_real_unwritable_file_system_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        write.check_target(Path("/proc/fast"))


def fork() -> int:
    """os.fork, without Python 3.12's warning: the children here start no thread and wait for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


# -- kills ----------------------------------------------------------------------------------------------------------------------------

WRITER = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
from pathlib import Path
from gpuopt.bundles import write
from gpuopt.core import codec
from gpuopt.core.result import Manifest
target, manifest = Path(sys.argv[1]), codec.from_json(Manifest, sys.argv[2])
def build(folder):
    for i in range(20):
        (folder / f"part{i}").write_bytes(bytes([seed % 256]) * 50_000)
    return {}
print("ready", flush=True)
from dataclasses import replace
for seed in range(int(sys.argv[3]), 10**6):
    write.publish(build, target, replace(manifest, seed=seed), force=True)
    if len(sys.argv) > 4:
        break
"""


@pytest.fixture
def start(manifest: Manifest) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts writers of bundles, which publish without end; all are gone when the test is."""
    running: list[subprocess.Popen[str]] = []

    def begin(target: Path, seed: int, *more: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target), codec.to_json(manifest), str(seed), *more], stdout=subprocess.PIPE, text=True
        )
        running.append(child)
        return child

    yield begin
    for child in running:
        child.kill()
        child.communicate()


def is_whole(target: Path) -> bool:
    found = read.open_bundle(target)
    return len(found.files) == 20 and all((target / f.name).read_bytes()[0] == found.seed % 256 for f in found.files)


def test_a_writer_killed_at_any_instant_leaves_a_whole_bundle_and_the_next_run_cleans_up(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], manifest: Manifest, artifact: Artifact
) -> None:
    """Forked after the import, so that a dozen kills fit into seconds."""
    target = tmp_path / "fast"

    def fill(seed: int) -> Callable[[Path], dict[str, str]]:
        def build(folder: Path) -> dict[str, str]:
            for i in range(20):
                (folder / f"part{i}").write_bytes(bytes([seed % 256]) * 50_000)
            return {}

        return build

    write.publish(fill(0), target, replace(manifest, seed=0))
    began = time.perf_counter()
    write.publish(fill(1), target, replace(manifest, seed=1), force=True)
    one_s = time.perf_counter() - began
    rng = random.Random(0)
    for kill in range(15):
        pid = fork()
        if pid == 0:
            try:
                for seed in range(kill * 1000, kill * 1000 + 1000):
                    write.publish(fill(seed), target, replace(manifest, seed=seed), force=True)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.2, 3) * one_s)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert is_whole(target)
    write.publish(artifact, target, manifest, force=True)
    assert beside(target) == []


def test_a_run_killed_between_the_two_renames_of_an_old_kernel_is_put_right(
    bundle: Path, manifest: Manifest, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_exchange", lambda one, two: False)
    before = snapshot(bundle)
    pid = fork()
    if pid == 0:
        real = os.rename

        def die_after(a: object, b: object) -> None:
            real(a, b)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = die_after  # type: ignore[assignment]
        try:
            write.publish(artifact, bundle, replace(manifest, seed=5), force=True)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert not bundle.exists()
    with write.staging(bundle, force=True):
        assert snapshot(bundle) == before
    assert beside(bundle) == []
    write.publish(artifact, bundle, replace(manifest, seed=6), force=True)
    assert read.open_bundle(bundle).seed == 6
    assert beside(bundle) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_writer_leaves_the_old_bundle_whole(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]], number: int
) -> None:
    target = tmp_path / "fast"
    child = start(target, 7)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    while not target.exists():
        time.sleep(0.01)
    time.sleep(0.05)
    child.send_signal(number)
    child.wait(60)  # what it imports takes long while other tests do
    assert is_whole(target)
    if number == signal.SIGINT:
        assert beside(target) == []


# -- full disks -----------------------------------------------------------------------------------------------------------------------


def under_limit(num_bytes: int, act: Callable[[], None]) -> str:
    """Runs `act` in a fork whose files may not grow beyond `num_bytes`; returns the class of what it raised."""
    readable, writable = os.pipe()
    pid = fork()
    if pid == 0:
        name = "nothing"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
            act()
        except BaseException as error:
            name = type(error).__name__
        finally:
            os.write(writable, name.encode())
            os._exit(0)
    os.close(writable)
    os.waitpid(pid, 0)
    with os.fdopen(readable) as pipe:
        return pipe.read()


@pytest.mark.parametrize("limit", [0, 64, 1000, 5999])
def test_a_disk_full_at_any_write_is_a_resource_error_and_the_old_bundle_stays(
    bundle: Path, manifest: Manifest, artifact: Artifact, limit: int
) -> None:
    before = snapshot(bundle)
    found = under_limit(limit, lambda: write.publish(artifact, bundle, replace(manifest, seed=5), force=True) and None)
    assert found == "ResourceError"
    assert snapshot(bundle) == before
    assert beside(bundle) == []


@pytest.mark.parametrize("limit", [64, 1000])
def test_a_disk_full_at_the_manifest_is_a_resource_error(bundle: Path, manifest: Manifest, limit: int) -> None:
    def small(folder: Path) -> dict[str, str]:
        (folder / "a").write_bytes(b"")
        return {}

    before = snapshot(bundle)
    assert under_limit(limit, lambda: write.publish(small, bundle, manifest, force=True) and None) == "ResourceError"
    assert snapshot(bundle) == before
    assert beside(bundle) == []


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)", "[Errno 122] Disk quota exceeded"])
def test_a_librarys_own_words_for_a_full_disk_are_understood(tmp_path: Path, manifest: Manifest, text: str) -> None:
    def build(folder: Path) -> dict[str, str]:
        raise RuntimeError(text)

    with pytest.raises(ResourceError, match="no space left"):
        write.publish(build, tmp_path / "fast", manifest)


def test_a_disk_that_is_full_explains_an_odd_error(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path) -> dict[str, str]:
        monkeypatch.setattr(write, "_is_full", lambda folder: True)
        raise RuntimeError("unexpected pos 576 vs 534")

    with pytest.raises(ResourceError):
        write.publish(build, tmp_path / "fast", manifest)


# -- rivals ---------------------------------------------------------------------------------------------------------------------------


def test_two_writers_of_one_target_take_turns(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    target = tmp_path / "fast"
    children = [start(target, seed, "once") for seed in (7, 8, 9)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert is_whole(target)
    assert beside(target) == []


def test_a_second_run_waits_for_the_first(tmp_path: Path, manifest: Manifest, artifact: Artifact) -> None:
    target, order = tmp_path / "fast", []

    def second() -> None:
        write.publish(artifact, target, replace(manifest, seed=2), force=True)
        order.append("second")

    with write.staging(target) as folder:
        rival = threading.Thread(target=second)
        rival.start()
        time.sleep(0.2)
        artifact(folder)
        write.publish(folder, target, replace(manifest, seed=1))
        order.append("first")
    rival.join(20)
    assert order == ["first", "second"]
    assert read.open_bundle(target).seed == 2
    assert beside(target) == []


def test_a_second_run_that_waits_too_long_says_who_holds_the_target(tmp_path: Path) -> None:
    with write.staging(tmp_path / "fast"):
        with pytest.raises(ResourceError, match="another gpuopt run"), write.staging(tmp_path / "fast", lock_timeout_s=0.1):
            pass
        with write.staging(tmp_path / "other", lock_timeout_s=0.1):
            pass
    with write.staging(tmp_path / "fast", lock_timeout_s=0.1):
        pass


def test_a_live_folder_of_another_target_is_not_swept(tmp_path: Path) -> None:
    with write.staging(tmp_path / "fast") as one, write.staging(tmp_path / "fast2") as two:
        with write.staging(tmp_path / "fas"), write.staging(tmp_path / "f"):
            pass
        assert one.is_dir() and two.is_dir()


def test_ctrl_c_in_the_middle_of_cleaning_up_still_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, calls = shutil.rmtree, []

    def interrupted(path: Path, **more: object) -> None:
        calls.append(path)
        if (path / "one").exists():
            (path / "one").unlink()
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=True)

    monkeypatch.setattr(write.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), write.staging(tmp_path / "fast") as folder:
        for name in ("one", "two"):
            (folder / name).write_text("x")
    assert len(calls) >= 2 and beside(tmp_path / "fast") == []
