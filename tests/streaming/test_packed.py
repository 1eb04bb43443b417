"""The packed folder: there whole or not at all, and refused as soon as it is not of this very model."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.core import codec
from gpuopt.core.errors import BadInput, ResourceError, UsageError
from gpuopt.core.streaming import Anatomy, Unit
from gpuopt.streaming import packed, slabs
from gpuopt.streaming.anatomy import dissect
from gpuopt.streaming.owned import Owned


def model(seed: int = 0, width: int = 33, depth: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(width, width) for _ in range(depth))}))


def of(module: nn.Module) -> tuple[Owned, Anatomy]:
    return Owned(module, free=False), dissect(module, small_bytes=1)


def held(unit: Unit, module: nn.Module) -> torch.Tensor:
    memory = torch.zeros(unit.num_bytes, dtype=torch.uint8)
    slabs.fill_from_module(unit, module, memory)
    return memory


def test_what_was_packed_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    module = model()
    weights, anatomy = of(module)
    seen: list[tuple[str, int, int]] = []
    with packed.pack(weights, anatomy, tmp_path / "p", on_unit=lambda *args: seen.append(args)) as found:
        assert [name for name, _, _ in seen] == [unit.name for unit in anatomy.units] and seen[-1][1] == seen[-1][2] == found.num_bytes
        found.verify()
        for unit in anatomy.units:
            memory = torch.full((unit.num_bytes,), 0xAA, dtype=torch.uint8)
            found.read_into(unit.name, memory)
            assert torch.equal(memory, held(unit, module))
            assert found.checksum(unit.name) == slabs.checksum(memory), "what a device would sum"
            size = (tmp_path / "p" / found.manifest.units[unit.order].file).stat().st_size
            assert size % 4096 == 0 and size >= unit.num_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_packing_twice_gives_the_same_bytes_and_an_existing_folder_is_used(tmp_path: Path) -> None:
    weights, anatomy = of(model())
    (tmp_path / "a").mkdir()  # empty: not in the way
    packed.pack(weights, anatomy, tmp_path / "a").close()
    packed.pack(weights, anatomy, tmp_path / "b").close()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    for name in before:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    packed.pack(weights, anatomy, tmp_path / "a").close()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: model(seed=1), "other weights"),
        (lambda: model(width=35), r"weight: shape is \(33, 33\) in the folder, \(35, 35\) in the model"),
        (lambda: model(depth=4), "the folder has not the unit"),
        (lambda: model(depth=2), "the model has not the unit"),
        (lambda: model().bfloat16(), "dtype is float32 in the folder, bfloat16 in the model"),
    ],
)
def test_a_changed_model_is_refused_with_the_field_that_changed(tmp_path: Path, other: Callable[[], nn.Module], said: str) -> None:
    packed.pack(*of(model()), tmp_path / "p").close()
    weights, anatomy = of(other())
    with pytest.raises(BadInput, match=said):
        packed.opened(tmp_path / "p", anatomy=anatomy, weights=weights.fingerprint())
    with pytest.raises(UsageError, match="not this model packed"):
        packed.pack(weights, anatomy, tmp_path / "p")


def test_one_changed_weight_in_one_layer_changes_the_fingerprint() -> None:
    one, other = model(), model()
    with torch.no_grad():
        other[0]["layers"][1].weight.mul_(1.001)
    assert Owned(one, free=False).fingerprint() == Owned(model(), free=False).fingerprint() != Owned(other, free=False).fingerprint()


def damage_byte(folder: Path) -> None:
    path = folder / "unit-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 4
    path.write_bytes(raw)


def test_a_flipped_bit_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    weights, anatomy = of(model())
    packed.pack(weights, anatomy, tmp_path / "p").close()
    damage_byte(tmp_path / "p")
    with packed.opened(tmp_path / "p", anatomy=anatomy) as found:
        unit = anatomy.units[1]
        with pytest.raises(BadInput, match="unit-00001.bin .* is damaged"):
            found.read_into(unit.name, torch.empty(unit.num_bytes, dtype=torch.uint8))
        with pytest.raises(BadInput, match="unit-00001.bin .* is damaged"):
            found.verify()


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / packed.MANIFEST).read_bytes())
        change(content)
        (folder / packed.MANIFEST).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: os.truncate(folder / "unit-00000.bin", 4096), "unit-00000.bin has 4096 bytes, not"),
        (lambda folder: (folder / "unit-00002.bin").unlink(), "unit-00002.bin cannot be opened"),
        (lambda folder: (folder / packed.MANIFEST).write_bytes(b"{"), "packed.json"),
        (lambda folder: (folder / packed.MANIFEST).write_bytes(b"[" * 100_000), "packed.json"),
        (edit(lambda m: m.update(format=1)), "has format 1"),
        (edit(lambda m: m.update(surprise=1)), "surprise"),
        (edit(lambda m: m["units"][0].update(file="../x")), "names the file"),
        (edit(lambda m: m["units"][0].update(file="unit-00001.bin")), "names the file"),
        (edit(lambda m: m["units"][0]["unit"]["places"][0].update(offset=1 << 40)), "outside its unit"),
        (edit(lambda m: m["units"][0]["unit"]["places"][0].update(num_bytes=-1)), "outside its unit"),
        (edit(lambda m: m["units"].append(m["units"][0])), "names the file"),
        (edit(lambda m: m["units"][1]["unit"].update(name=m["units"][0]["unit"]["name"])), "there twice"),
    ],
)
def test_a_folder_that_was_tampered_with_is_refused(tmp_path: Path, break_it: Callable[[Path], object], said: str) -> None:
    packed.pack(*of(model()), tmp_path / "p").close()
    break_it(tmp_path / "p")
    with pytest.raises(BadInput, match=said):
        packed.opened(tmp_path / "p")


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    packed.pack(*of(model()), tmp_path / "p").close()
    file = tmp_path / "p" / "unit-00000.bin"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="is a link"):
        packed.opened(tmp_path / "p")


def test_a_folder_without_a_manifest_is_no_packed_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no packed model"):
        packed.opened(tmp_path)


# --- killed, and out of room -----------------------------------------------------------------------------------------------------------------

PACKER = """
    import sys, time, torch
    from pathlib import Path
    from gpuopt.core.streaming import Anatomy, Place, Unit
    from gpuopt.streaming import packed

    class Slow:
        def fill_unit(self, unit, target):
            print(unit.name, flush=True)
            time.sleep({pause})
            target.fill_(int(unit.name))
        def fingerprint(self):
            return "f"

    def unit(i):
        place = Place(name=str(i), dtype="uint8", shape=(1 << 20,), stride=(1,), offset=0, num_bytes=1 << 20)
        return Unit(name=str(i), ring="r", order=i, num_bytes=1 << 20, places=(place,))

    anatomy = Anatomy(units=tuple(unit(i) for i in range(20)), fixed={{}})
    packed.pack(Slow(), anatomy, Path(sys.argv[1]))
    print("done", flush=True)
"""


@pytest.fixture
def packer() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that pack, and ends them."""
    started: list[subprocess.Popen[str]] = []

    def start(target: Path, *, pause: float) -> subprocess.Popen[str]:
        script = textwrap.dedent(PACKER).format(pause=pause)
        command = [sys.executable, "-c", script, str(target)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up_but_leaves_a_living_one_alone(
    tmp_path: Path, packer: Callable[..., subprocess.Popen[str]]
) -> None:
    target = tmp_path / "p"
    killed, living = packer(target, pause=1.0), packer(target, pause=1.0)
    for process in (killed, living):
        assert process.stdout is not None
        while process.stdout.readline().strip() != "2":
            assert process.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not target.exists() and len(list(tmp_path.iterdir())) == 2
    with packed.pack(*of(model()), target) as found:
        found.verify()
    assert living.poll() is None and len(list(tmp_path.iterdir())) == 2, "its workshop is locked"
    living.send_signal(signal.SIGINT)
    assert living.wait(30) != 0 and [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_full_disk_leaves_nothing_behind_and_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, anatomy = of(model())
    real, calls = os.pwrite, []

    def full(fd: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"has room for \d+ bytes, and the packed model has \d+ .*nothing was left behind"):
        packed.pack(weights, anatomy, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, anatomy = of(model())
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written"))
    huge = dataclasses.replace(anatomy, units=(dataclasses.replace(anatomy.units[0], num_bytes=1 << 60),))
    with pytest.raises(ResourceError, match=str(1 << 60)):
        packed.pack(weights, huge, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    weights, anatomy = of(model(width=200))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="File too large.*nothing was left behind"):
            packed.pack(weights, anatomy, tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(Owned):
        def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
            if unit.order == 1:
                raise BadInput("the shard ends early", fix="copy it again")
            super().fill_unit(unit, target)

    module = model()
    with pytest.raises(BadInput, match="ends early"):
        packed.pack(Failing(module, free=False), of(module)[1], tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_survives_a_round_trip() -> None:
    unit = of(model())[1].units[0]
    manifest = packed.PackedManifest(
        format=1,
        weights="w",
        dtypes=("float32",),
        units=(packed.PackedUnit(unit=unit, file="unit-00000.bin", checksum=-5, sha256="0" * 64),),
    )
    assert codec.from_json(packed.PackedManifest, codec.to_json(manifest)) == manifest
