"""`gpuopt bench --precision fp8` and its siblings, typed: what the report says of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("cli_catalogue", Path(__file__).with_name("catalogue.py"))
assert _spec is not None and _spec.loader is not None
shared: Any = sys.modules.get("cli_catalogue")
if shared is None:
    shared = sys.modules["cli_catalogue"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(shared)
command, QUICK = shared.command, shared.QUICK


@pytest.mark.parametrize(("to", "said"), [("fp8", "float8_e4m3fn"), ("int8", "int8"), ("w8", "stored in int8"), ("w4", "stored in int4")])
def test_a_bert_goes_through_at_eight_bits_and_four(to: str, said: str, command: Any, tmp_path: Path) -> None:
    words = ("bench", "gpuopt.models:bert_large_tiny", "--precision", to, "--device", "cpu", "--dim", "S=16")
    ended = command(*words, *QUICK, "--json", "r.json")
    assert ended.code == 0, ended.err
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert run["status"] == "ok" and run["accuracy"]["passed"], run["reason"]
    assert run["precision_audit"]["honoured"] and said in run["precision_audit"]["reason"]
    assert any("13 linear layers" in note for note in run["notes"]) and any("on a CPU" in note for note in run["notes"])


def test_a_model_of_convolutions_is_told_why_not(command: Any) -> None:
    ended = command("convert", "gpuopt.models:resnet101_tiny", "--precision", "fp8", "--device", "cpu", "-o", "out.safetensors")
    assert ended.code == 4 and "made for linear layers" in ended.message and ended.fix == "--precision bf16"
