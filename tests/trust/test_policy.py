"""Content decides what a file is; its name may only agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gpuopt.core.errors import BadInput, UsageError
from gpuopt.trust.policy import POLICY, Format, classify, printable


def test_each_format_is_known_by_its_content(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "no-suffix")
    with pytest.MonkeyPatch.context():
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "s.pt"))
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2),)), tmp_path / "e.pt2")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text("{}")
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": {}}))
    found = {
        name: classify(tmp_path / name) for name in ("a.pt", "old.pth", "a.safetensors", "no-suffix", "s.pt", "e.pt2", "b", "t", "i.json")
    }
    assert found == {
        "a.pt": Format.CHECKPOINT,
        "old.pth": Format.CHECKPOINT,
        "a.safetensors": Format.SAFETENSORS,
        "no-suffix": Format.SAFETENSORS,
        "s.pt": Format.TORCHSCRIPT,
        "e.pt2": Format.EXPORTED,
        "b": Format.BUNDLE,
        "t": Format.TRANSFORMERS,
        "i.json": Format.SHARDED_SAFETENSORS,
    }


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder"):
        classify(tmp_path / "none.pt")
    with pytest.raises(UsageError):
        classify(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x93NUMPY" + bytes(90), "NumPy"),
        (b"\x7fELF" + bytes(90), "native"),
        (b"GGUF" + bytes(90), "GGUF"),
        (b"hello world\n" * 9, "text"),
        (b'{"a": 1}', "JSON"),
        (b"<html>", "HTML"),
        (b"\x1f\x8b" + bytes(90), "gzip"),
    ],
)
def test_what_is_no_model_is_called_by_its_name(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(BadInput, match=says):
        classify(tmp_path / "m.pt")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".pt", ".onnx", ".safetensors", ".pt2", ""]))
def test_random_bytes_never_escape_as_anything_but_our_errors(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    try:
        classify(path)
    except BadInput as error:
        assert "\n" not in error.message and error.fix


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, 1200), flip=st.integers(0, 1200), bit=st.integers(0, 7))
def test_a_damaged_checkpoint_loads_or_is_bad_input(cut: int, flip: int, bit: int, tmp_path: Path) -> None:
    from gpuopt.trust import gate

    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(2)}, path)
    raw = bytearray(path.read_bytes())
    raw[flip % len(raw)] ^= 1 << bit
    path.write_bytes(bytes(raw[: len(raw) - cut % 7]))
    try:
        gate.load_tensors(path)
    except BadInput as error:
        assert "\n" not in error.message and error.fix


def test_every_format_has_a_rule() -> None:
    assert set(POLICY) == set(Format)


@given(st.text(max_size=300))
def test_printable_text_is_one_short_line(text: str) -> None:
    assert len(printable(text)) <= 120
    assert printable(text).isprintable()
