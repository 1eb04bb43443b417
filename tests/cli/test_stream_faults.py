"""What can go wrong with `gpuopt stream`, as it is typed: the exit code, the numbers, and the flag that would help. Each row of the table of faults that a command line can show.

Rows that only a program can show: a second forward at the same time, training mode, gradients, and weights read, saved or moved while streamed (tests/streaming/test_guards.py);
units whose lock CUDA refuses, and its error that is cleared (tests/streaming/test_engines.py); a disk that hangs or fails, a reader that is killed (tests/streaming/test_disk.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "streamed"))

import streams

from gpuopt.cli import app
from gpuopt.core.errors import OutOfMemory
from gpuopt.pipeline import isolate
from gpuopt.streaming import hostpages
from gpuopt.streaming.engines.simulated import SimulatedEngine

Told = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    yield
    logger.setLevel(level)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """`told("run", model, "--budget", "50%") -> (exit code, all that was written)`. The child is this process."""
    monkeypatch.setattr(isolate, "Child", streams.Inline)

    def run(action: str, model: str, *words: str, device: str = streams.DEVICE) -> tuple[int, str]:
        trust = ["--trust", model.rpartition(":")[0]] if ".py:" in model else []
        code = app.run(["stream", action, model, *trust, "--dim", "S=4", "--device", device, "--quiet", *words])
        seen = capsys.readouterr()
        return code, " ".join((seen.out + seen.err).split())

    return run


@pytest.fixture
def stack(tmp_path: Path) -> str:
    return str(streams.factory(tmp_path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards and their index."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, vocab_size=60
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "llama"
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# --- memory ------------------------------------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_least_names_the_largest_unit_and_the_flags_that_lower_it(told: Told, folder: Path) -> None:
    for action in ("plan", "run", "bench", "verify"):
        code, text = told(action, str(folder), "--budget", "12%")
        assert code == 5
        assert "a budget of 12% of the weights is too small" in text and "the largest unit, model.layers.0" in text
        assert "is the least" in text and "--slots 1 lowers it to" in text and "--granularity sub lowers it to" in text


def test_a_host_or_a_container_smaller_than_the_weights_says_both_numbers_and_the_disk(
    told: Told, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "sys/fs/cgroup"
    for path, text in {
        "proc/meminfo": "MemTotal: 64000000 kB\nMemFree: 64000000 kB\nMemAvailable: 64000000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "350000\n",
        "sys/fs/cgroup/memory.current": "300000\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    real = hostpages.available_bytes
    monkeypatch.setattr(hostpages, "available_bytes", lambda: real(str(tmp_path)))
    assert group.is_dir() and hostpages.available_bytes() == 50_000
    code, text = told("run", str(folder), "--budget", "60%")
    assert code == 5, text
    assert "of weights would wait in host memory, which has 48.83 KiB to spare" in text and "--disk" in text and "--pin-limit" in text


def test_locked_memory_that_is_refused_is_counted_and_the_bits_are_the_same(
    told: Told, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimulatedEngine.__init__
    monkeypatch.setattr(SimulatedEngine, "__init__", lambda self, *a, **k: made(self, *a, **{**k, "max_pinned_bytes": 260_000}))
    code, text = told("run", stack, "--budget", "40%", "--calls", "3")
    assert code == 0 and " units pinned" in text and "would not lock" in text
    code, text = told("verify", stack, "--budget", "40%", "--forwards", "6")
    assert code == 0, text


def test_a_system_that_locks_nothing_says_how_much_is_needed(told: Told, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimulatedEngine.__init__
    monkeypatch.setattr(SimulatedEngine, "__init__", lambda self, *a, **k: made(self, *a, **{**k, "max_pinned_bytes": 1}))
    code, text = told("run", stack, "--budget", "40%")
    assert code == 5 and "locks not even" in text and "limit on locked memory" in text and "--granularity sub" in text


def test_a_device_that_is_full_is_an_error_and_with_elastic_a_smaller_budget(
    told: Told, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SimulatedEngine.slot
    left: list[int] = []

    def slot(self: SimulatedEngine, num_bytes: int) -> torch.Tensor:
        if left and not left.pop():
            raise OutOfMemory(f"the device has no {num_bytes:,} bytes left", fix="a smaller --budget, or --elastic")
        return real(self, num_bytes)

    monkeypatch.setattr(SimulatedEngine, "slot", slot)
    left[:] = [0, 1, 1]
    code, text = told("run", stack, "--budget", "80%")
    assert code == 5 and "bytes left" in text and "--elastic" in text
    left[:] = [0, 1, 1]
    code, text = told("run", stack, "--budget", "80%", "--elastic", "--calls", "3")
    assert code == 0 and "lowered to 85% of what was asked" in text


# --- files -------------------------------------------------------------------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 100)


def longer(folder: Path) -> None:
    with shards(folder)[0].open("ab") as file:
        file.write(bytes(8))


def misaligned(folder: Path) -> None:
    """The payload a byte further on: every number would be noise."""
    content = shards(folder)[0].read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    shards(folder)[0].write_bytes(content[:header] + b"\0" + content[header:])


def header_of_noise(folder: Path) -> None:
    content = bytearray(shards(folder)[0].read_bytes())
    content[8:40] = os.urandom(32)
    shards(folder)[0].write_bytes(content)


def swapped(folder: Path) -> None:
    first, second, *_ = shards(folder)
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def missing(folder: Path) -> None:
    shards(folder)[2].unlink()


def without_a_tensor(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.pop(sorted(tensors)[0]))


def of_another_dtype(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))


def of_another_shape(folder: Path) -> None:
    changed(folder, lambda tensors: tensors.update({name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()}))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(shards(folder)[0])
    change(tensors)
    safetensors.torch.save_file(tensors, shards(folder)[0], metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, ("-00002-of-", "is cut off", "byte")),
        (longer, ("-00001-of-", "bytes")),
        (misaligned, ("-00001-of-", "bytes")),
        (header_of_noise, ("-00001-of-",)),
        (swapped, ("files were swapped",)),
        (missing, ("-00003-of-", "not there")),
        (without_a_tensor, ("no shard has it",)),
        (of_another_dtype, ("float64 in the file, float32 in the model", "--cast")),
        (of_another_shape, ("in the file", "in the model")),
    ],
)
def test_damaged_shards_are_refused_before_a_byte_of_them_is_used(
    told: Told, folder: Path, damage: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    damage(folder)
    for action in ("plan", "run", "verify", "pack"):
        words = ["--disk", str(folder.parent / "packed")] if action == "pack" else ["--budget", "50%"]
        code, text = told(action, str(folder), *words)
        assert code == 3, text
        assert all(word in text for word in said), text


def snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the hub's cache holds it: files named by their sha256, and links to them. Downloads nothing."""
    import hashlib

    root = folder.parent / "models--someone--llama"
    found = root / "snapshots" / ("a" * 40)
    (root / "blobs").mkdir(parents=True)
    found.mkdir(parents=True)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (found / file.name).symlink_to(os.path.relpath(blob, found))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(found))
    return found


def test_a_model_of_the_hub_is_streamed_from_its_shards_and_its_files_are_compared_with_their_names(
    told: Told, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = snapshot(folder, monkeypatch)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded whole")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", refuse)
    words = ("hf:someone/llama", "--budget", "50%", "--forwards", "6")
    code, text = told("verify", *words)
    assert code == 0 and "as the hub names them" in text, text
    blob = shards(found)[1].resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 0x10
    blob.write_bytes(content)  # sizes and headers fit: only the sum tells
    code, text = told("verify", *words)
    assert code == 1 and "-00002-of-" in text and "sha256" in text and "download" in text


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def test_a_packed_folder_that_is_damaged_or_of_another_model_is_refused(told: Told, stack: str, folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert told("pack", stack, "--disk", str(packed))[0] == 0
    words = ("--budget", "50%", "--pin-limit", "1KiB", "--disk")
    code, text = told("verify", stack, *words, str(packed), "--forwards", "6")
    assert code == 0 and "as they were packed" in text, text

    code, text = told("run", str(folder), *words, str(packed))
    assert code == 3 and "is of another model" in text and "gpuopt stream pack" in text

    units = sorted(packed.glob("unit-*.bin"))
    for unit in units:
        flipped(unit)
    code, text = told("run", stack, *words, str(packed), "--calls", "2")
    assert code == 3 and "is damaged: its checksum differs" in text and "gpuopt stream pack" in text
    code, text = told("verify", stack, *words, str(packed), "--forwards", "6")
    assert code == 1 and "is damaged" in text, text

    os.truncate(units[0], 4096)
    code, text = told("run", stack, *words, str(packed))
    assert code == 3 and "unit-00000.bin has 4096 bytes, not" in text

    code, text = told("run", stack, *words, str(tmp_path / "nowhere"))
    assert code == 2 and "is no packed model" in text and "gpuopt stream pack" in text


def test_weights_of_the_same_shapes_but_other_values_are_another_model(told: Told, stack: str, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert told("pack", stack, "--disk", str(packed))[0] == 0
    source = Path(stack.rpartition(":")[0])
    source.write_text(source.read_text().replace("manual_seed(7)", "manual_seed(8)"))
    code, text = told("run", stack, "--budget", "50%", "--pin-limit", "1KiB", "--disk", str(packed))
    assert code == 3 and "packed from other weights" in text


# --- what is planned without weights -----------------------------------------------------------------------------------------------------------


def test_a_plan_of_a_factory_makes_no_weights_and_one_that_needs_them_says_so(
    told: Told, stack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "plan.json"
    assert told("plan", stack, "--budget", "50%", "--json", str(kept))[0] == 0
    hollow = json.loads(kept.read_text())["streamed"]
    assert not any("built with all its weights" in note for note in hollow["notes"])
    source = Path(stack.rpartition(":")[0])
    source.write_text(
        source.read_text().replace("return Stack().eval()", "model = Stack().eval(); model.head.weight.sum().item(); return model")
    )
    code, _ = told("plan", stack, "--budget", "50%", "--json", str(kept), "--force")
    assert code == 0
    real = json.loads(kept.read_text())["streamed"]
    assert any("built with all its weights, since it cannot be built without them" in note for note in real["notes"])
    assert real["rows"] == hollow["rows"], "the plan is the same"


def test_without_a_gpu_streaming_to_one_is_refused_with_the_device_on_paper(told: Told, stack: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, text = told("run", stack, "--budget", "50%", device="auto")
    assert code == 2 and "--device simulated" in text
