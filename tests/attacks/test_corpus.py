"""No refused file runs anything, and each is refused as the catalogue says."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpuopt

_spec = importlib.util.spec_from_file_location("attack_corpus", Path(__file__).with_name("corpus.py"))
assert _spec is not None and _spec.loader is not None
corpus: Any = importlib.util.module_from_spec(_spec)
sys.modules["attack_corpus"] = corpus
_spec.loader.exec_module(corpus)

ROOT = Path(gpuopt.__file__).parent
OPENERS = {
    "torch.load",
    "torch.jit.load",
    "torch.export.load",
    "aoti_load_package",
    "InferenceSession",
    "deserialize_cuda_engine",
    "pickle.load",
    "pickle.loads",
    "load_pt2",
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    folder = tmp_path / "canary"
    folder.mkdir()
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", corpus.CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_file_is_refused_as_the_catalogue_says(name: str, place: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the environment, which torch reads at every load, says to trust whatever comes."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("GPUOPT_TRUST", "")
    _, wanted, make = corpus.CASES[name]
    assert corpus.attempt(make(place, canary / name)) == wanted
    assert list(canary.iterdir()) == []


def test_the_corpus_covers_the_rows_about_loading() -> None:
    rows = {row for row, _, _ in corpus.CASES.values()}
    assert set(range(1, 39)) - rows == {4, 7, 21, 27, 28, 29, 30}, "those have tests of their own, here, in loaders or in bundles"


@pytest.mark.parametrize(
    "name",
    [
        "reduce_payload",
        "reduce_payload_in_the_old_format",
        "pt2_with_pickled_weights",
        "pt2_with_pickled_sample_inputs",
        "pt2_with_an_expression",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_payloads_are_live(name: str, place: Path, canary: Path) -> None:
    """Without the gate they run: a corpus of duds would prove nothing."""
    path = corpus.CASES[name][2](place, canary / "ran")
    try:
        if path.suffix == ".pt2":
            torch.export.load(path)
        else:
            torch.load(path, weights_only=False)
    except Exception:
        pass
    assert (canary / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_unpickler_alone_would_call_a_constructor(place: Path, canary: Path) -> None:
    """Why the opcodes are read: an admitted class can be called through a function that torch admits itself."""
    path = corpus.CASES["constructor_called_through_rebuild_from_type"][2](place, canary)
    calls: list[tuple[Any, ...]] = []

    class Spy(torch.nn.Linear):
        def __init__(self, *args: Any) -> None:
            calls.append(args)
            super().__init__(*args)

    with torch.serialization.safe_globals([(Spy, "torch.nn.modules.linear.Linear")]):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            pass
    assert calls == [(2, 3)]


def test_neither_optimisation_nor_a_hostile_environment_opens_the_gate(tmp_path: Path, canary: Path) -> None:
    """`python -O` has no asserts, of ours and of torch's; the cases above are an interpreter that has them."""
    place = tmp_path / "cases"
    place.mkdir()
    environment = {
        **os.environ,
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "GPUOPT_TRUST": "",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONPATH": str(ROOT.parent),
    }
    program = str(Path(corpus.__file__))
    done = subprocess.run(
        [sys.executable, "-O", "-W", "ignore", program, str(place), str(canary)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert {n: got for n, (wanted, got) in result["found"].items() if wanted != got} == {}
    assert result["canaries"] == []
    assert result["optimized"] is True


def trees(*words: str) -> dict[Path, ast.Module]:
    """File of the package -> its syntax, of those in which one of these words stands at all."""
    sources = {path: path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    return {path: ast.parse(text) for path, text in sources.items() if any(word in text for word in words)}


def test_every_file_opener_is_in_the_gate() -> None:
    found = []
    names = {opener.rpartition(".")[2] for opener in OPENERS} | {"Unpickler"}
    for path, tree in trees(*names).items():
        if path == ROOT / "trust" / "gate.py":
            continue
        for node in ast.walk(tree):
            last = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if last in names:
                text = ast.unparse(node)
                found += [f"{path.relative_to(ROOT)}:{node.lineno} {text}" for o in OPENERS if text == o or text.endswith("." + o)]
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.jit", "torch.export", "torch.serialization", "pickle"):
                found += [
                    f"{path.relative_to(ROOT)}:{node.lineno} {a.name}" for a in node.names if a.name in ("load", "loads", "Unpickler")
                ]
    assert found == []


def test_the_gate_has_no_assert() -> None:
    for path in (ROOT / "trust").glob("*.py"):
        assert not [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)], path


def test_every_torch_load_says_what_it_admits() -> None:
    calls = [n for n in ast.walk(ast.parse((ROOT / "trust" / "gate.py").read_text())) if isinstance(n, ast.Call)]
    loads = [n for n in calls if ast.unparse(n.func) == "torch.load"]
    assert len(loads) == 2
    assert all("weights_only" in {k.arg for k in n.keywords} for n in loads)


def test_no_file_trusts_remote_code_by_itself() -> None:
    for path, tree in trees("trust_remote_code").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value is True), f"{path}:{node.value.lineno}"


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_byte_changes_the_hash_that_was_trusted(place: Path, canary: Path) -> None:
    """Row 4: torch does not verify checksums, so consent is to the bytes."""
    from gpuopt.core.errors import Untrusted
    from gpuopt.trust import consent, gate

    path = place / "m.pkl"
    path.write_bytes(pickle.dumps({"a": 1, "b": "xyz"}, protocol=4))
    consent.record(path)
    assert gate.load_checkpoint(path) == {"a": 1, "b": "xyz"}
    path.write_bytes(path.read_bytes().replace(b"xyz", b"xyy"))
    with pytest.raises(Untrusted):
        gate.load_checkpoint(path)
