"""Shared references: the same bits as computed ones, computed once, and never somebody else's."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import ModelRef, Precision
from gpuopt.pipeline import commons, references, verification
from gpuopt.pipeline.references import Shared


def net(seed: int = 0, slope: float = 0.1) -> Model:
    torch.manual_seed(seed)
    return Model(
        form="module", name="net", module=nn.Sequential(nn.Linear(6, 9), nn.LeakyReLU(slope), nn.Linear(9, 3)).eval(), dtype="float32"
    )


def shared(model: Model | None = None, *, seed: int = 0, rows: int = 4, text: str = "net") -> Shared:
    batches = [Inputs(args=(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)),))]
    return Shared(ModelRef(text=text), model or net(), batches, "cpu")


@dataclass
class Calls:
    made: list[Precision] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, computed = Calls(), verification._eager

    def counted(model: Model, precision: Precision, *args: Any, **more: Any) -> Any:
        found.made.append(precision)
        return computed(model, precision, *args, **more)

    monkeypatch.setattr(verification, "_eager", counted)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "shared"
    made.mkdir(mode=0o700)
    monkeypatch.setenv(commons.VARIABLE, str(made))
    return made


def same(one: list[Any], other: list[Any]) -> bool:
    return all(
        a == b and x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y)
        for first, second in zip(one, other, strict=True)
        for (a, x), (b, y) in zip(first, second, strict=True)
    )


def test_a_second_child_reads_the_same_bits(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (shared().reference(), shared().twin(Precision.BF16), shared().eager_outputs(Precision.FP32))
    assert len(calls.made) == 3
    second = (shared().reference(), shared().twin(Precision.BF16), shared().eager_outputs(Precision.FP32))
    assert len(calls.made) == 3
    monkeypatch.delenv(commons.VARIABLE)
    alone = (shared().reference(), shared().twin(Precision.BF16), shared().eager_outputs(Precision.FP32))
    assert len(calls.made) == 6
    for others in (second, alone):
        assert same(first[0].outputs, others[0].outputs) and same(first[1].outputs, others[1].outputs) and same(first[2], others[2])
        assert (first[0].kind, first[0].refused, first[1].unstable) == (others[0].kind, others[0].refused, others[1].unstable)


@pytest.mark.parametrize(
    "other",
    [
        lambda: shared(net(seed=1)),
        lambda: shared(net(slope=0.2)),
        lambda: shared(seed=1),
        lambda: shared(rows=5),
        lambda: shared(text="another file"),
    ],
    ids=["weights", "an attribute", "inputs", "a size", "where it came from"],
)
def test_another_model_or_input_is_computed(other: Any, folder: Path, calls: Calls) -> None:
    shared().reference()
    other().reference()
    assert len(calls.made) == 2


def test_another_precision_is_computed_and_a_quantised_one_shares_its_carriers(folder: Path, calls: Calls) -> None:
    for precision in (Precision.BF16, Precision.FP16, Precision.FP8):
        shared().twin(precision)
    assert calls.made == [Precision.BF16, Precision.FP16]


def test_children_that_come_together_compute_once(folder: Path, calls: Calls) -> None:
    made = [shared() for _ in range(4)]
    threads = [threading.Thread(target=one.reference) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls.made) == 1


def test_after_waiting_too_long_a_child_computes_for_itself(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "WAIT_S", 0.05)
    entry = shared()._entry("reference")
    assert entry is not None
    with entry.locked():
        shared().reference()
    assert calls.made == [Precision.FP64]
    assert not entry.facts.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("cut", [True, False], ids=["truncated", "one bit"])
def test_a_damaged_file_is_computed_again(suffix: str, cut: bool, folder: Path, calls: Calls) -> None:
    shared().reference()
    (path,) = folder.glob(f"*.{suffix}")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data[: len(data) // 2] if cut else data)
    shared().reference()
    assert len(calls.made) == 2
    shared().reference()  # and written again
    assert len(calls.made) == 2


def test_a_writer_killed_between_its_files_leaves_nothing_that_is_read(folder: Path, calls: Calls) -> None:
    shared().reference()
    (path,) = folder.glob("*.json")
    path.rename(path.with_name(f"{path.name}.tmp-1"))
    shared().reference()
    assert len(calls.made) == 2


def test_a_full_disk_is_no_error(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(references, "save_file", full)
    assert shared().reference().kind == "fp64"
    assert not [p for p in folder.iterdir() if p.suffix != ".lock"]


def test_what_is_too_large_or_cannot_be_read_is_not_shared(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as small:
        small.setattr(references, "MOST_BYTES", 10)
        shared().reference()
    assert not list(folder.glob("*.json"))
    odd = net()
    odd.module.lock = threading.Event  # a class is read by its name
    shared(odd).reference()
    assert len(list(folder.glob("*.json"))) == 1
    odd.module.lock = iter([1])
    entry = shared(odd)._entry("reference")
    assert entry is None


def test_a_folder_that_others_can_read_is_not_used(folder: Path, calls: Calls) -> None:
    folder.chmod(0o755)
    shared().reference()
    assert not list(folder.iterdir())


def test_a_dead_processs_folder_is_swept_and_a_live_ones_stays(tmp_path: Path) -> None:
    parent = tmp_path / "references"
    parent.mkdir(mode=0o700)
    for name in ("1-dead", "2-live"):
        (parent / name).mkdir(mode=0o700)
        (parent / name / "x.safetensors").write_bytes(b"x")
    lock = commons.locked(parent / "2-live" / commons.LOCK, wait_s=0.0)
    path = Path(commons.environment(tmp_path)[commons.VARIABLE])
    assert path.is_dir() and path.stat().st_mode & 0o777 == 0o700
    assert commons.environment(tmp_path)[commons.VARIABLE] == str(path)
    assert sorted(p.name for p in parent.iterdir() if p.is_dir()) == sorted(["2-live", path.name])
    os.close(lock)
    owned = commons._owned[(os.getpid(), tmp_path)]
    commons._removed(owned, os.getpid() + 1)  # a fork
    assert path.is_dir()
    commons._removed(owned, os.getpid())
    assert not path.exists()


def test_without_a_cache_that_can_be_written_children_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "references").write_text("a file")
    assert commons.environment(tmp_path) == {commons.VARIABLE: ""}


def test_candidates_that_differ_in_tuning_alone_share_their_fp32_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt.core.spec import BackendSpec, Candidate, InputSpec, Tolerance, Transforms
    from gpuopt.pipeline.session import Session

    monkeypatch.setenv(commons.VARIABLE, str(folder))
    built: list[tuple[str, str]] = []
    construct = Session._construct

    def noted(self: Any, candidate: Any, model: Any, precision: Precision, **more: Any) -> Any:
        options = more.get("options") or self._options(candidate, precision)
        built.append((precision.value, str(options["preset"])))
        return construct(self, candidate, model, precision, **more)

    monkeypatch.setattr(Session, "_construct", noted)

    def stages(preset: str, transforms: Transforms) -> list[str]:
        candidate = Candidate(
            model=ModelRef(text="net"),
            inputs=InputSpec(),
            precision=Precision.BF16,
            backend=BackendSpec(name="inductor", preset=preset),
            transforms=transforms,
            device="cpu",
        )
        given = Inputs(args=(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),))
        session = Session()
        session.adopt(candidate, net(), given)
        session.build()
        accuracy = session.verify(Tolerance(), "full").accuracy
        session.close()
        assert accuracy.passed
        return [stage.name for stage in accuracy.stages]

    for preset in ("default", "max-autotune-no-cudagraphs"):
        assert stages(preset, Transforms())[0] == "structure"
    assert stages("default", Transforms(keep_fp32=("2",)))[0] == "structure"
    fp32 = [preset for precision, preset in built if precision == "fp32"]
    assert fp32 == ["default", "default"], built  # the second is for the other transforms
