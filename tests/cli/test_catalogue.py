"""The catalogue of bad inputs: each ends with its exit code, one line of what happened and one of what to do, and nothing half-written.

Rows go through the whole command, parent and child, in this process (tests/attacks holds the files themselves); a few through processes of their own.
Rows about what is installed and which GPU is there: test_catalogue_machine.py. Which test proves which row: test_catalogue_rows.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_spec = importlib.util.spec_from_file_location("cli_catalogue", Path(__file__).with_name("catalogue.py"))
assert _spec is not None and _spec.loader is not None
shared: Any = sys.modules.get("cli_catalogue")
if shared is None:
    shared = sys.modules["cli_catalogue"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(shared)
command, corpus, left, QUICK = shared.command, shared.corpus, shared.left, shared.QUICK

EXIT_OF_CLASS = {"BadInput": 3, "Untrusted": 3, "Unavailable": 4, "GateFailed": 1}
WANT = {18: 1, 26: 4}
"""Rows of the corpus whose last column is not 3."""


# --- rows 1 to 43: files


@pytest.mark.parametrize("name", corpus.CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_file_ends_with_the_exit_code_of_its_row(name: str, command: Any, tmp_path: Path) -> None:
    row, error, make = corpus.CASES[name]
    place, canary = tmp_path / "place", tmp_path / "canary"
    place.mkdir()
    canary.mkdir()
    path = make(place, canary / name)
    before = left(tmp_path)
    ended = command("convert", str(path), "--arch", corpus.ARCH, "-o", "out.onnx")
    assert ended.code == WANT.get(row, 3) == EXIT_OF_CLASS[error], ended.err
    assert ended.message and ended.fix
    assert left(tmp_path) == before, "something was written, or its code ran"


@pytest.mark.parametrize("name", ["onnx_larger_than_a_protobuf_may_be", "onnx_of_nothing_but_zeros", "onnx_that_is_itself_dev_zero"])
def test_33_and_37_gigabytes_of_onnx_are_refused_at_once_and_without_memory(name: str, tmp_path: Path) -> None:
    from gpuopt import loaders
    from gpuopt.core.errors import BadInput
    from gpuopt.core.spec import ModelRef
    from gpuopt.trust import gate

    path = corpus.CASES[name][2](tmp_path, tmp_path)
    assert path.is_symlink() or (path.stat().st_size >= 2**31 and path.stat().st_blocks * 512 < 2**20), "a hole takes no disk"
    loaders.load  # noqa: B018 - imported before memory is counted
    began = time.monotonic()
    with gate.limit_memory(64 * 2**20), pytest.raises(BadInput) as caught:
        loaders.load(ModelRef(text=str(path)))
    assert time.monotonic() - began < 2.0
    assert "2 GiB" in caught.value.message or name != "onnx_larger_than_a_protobuf_may_be"


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (20, lambda s: s.pop("0.bias"), "0.bias"),
        (20, lambda s: s.update({"0.weight": torch.ones(6, 5)}), "0.weight"),
        (20, lambda s: s.update({f"more.{i}": torch.ones(1) for i in range(30)}), "more."),
        (21, lambda s: s.update({k: v.double() for k, v in s.items()}), "float64"),
        (21, lambda s: s.update({"0.weight": torch.ones(6, 4, dtype=torch.int8)}), "int8"),
    ],
)
def test_20_21_weights_that_do_not_fit_the_architecture_are_3(
    row: int, change: Callable[[dict[str, torch.Tensor]], Any], said: str, command: Any, tmp_path: Path
) -> None:
    state = {"0.weight": torch.ones(6, 4), "0.bias": torch.ones(6), "2.weight": torch.ones(2, 6), "2.bias": torch.ones(2)}
    change(state)
    torch.save(state, tmp_path / "w.pt")
    before = left(tmp_path)
    words = ("convert", "w.pt", "--arch", "m.py:net", "--input", "x:float32[N,4]", "-o", "out.safetensors")
    ended = command(*words)
    assert ended.code == 3 and said in ended.message, ended.err
    assert len(ended.message) < 1000, "the first few are named"
    assert left(tmp_path) == before
    if row == 21:
        assert "--cast" in ended.fix
        assert command(*words, "--cast").code == 0


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the null backend, built for N=2."""
    from dataclasses import replace

    from gpuopt.bundles import write
    from gpuopt.core.spec import BackendSpec, Candidate, DimSpec, InputSpec, ModelRef, Tolerance
    from gpuopt.pipeline import figures, manifests
    from gpuopt.pipeline.session import Session

    place = tmp_path_factory.mktemp("bundle")
    (place / "m.py").write_text(shared.MODELS)
    inputs = InputSpec(dims=(DimSpec(name="N", values=(2,)),))
    given = Candidate(model=ModelRef(text=f"{place / 'm.py'}:net"), backend=BackendSpec(name="null"), device="cpu", inputs=inputs)
    given = replace(given, dims={"N": 2})
    session = Session()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(place / "state"))
        try:
            run = figures.loaded(figures.started(given), session.load(given))
            run = figures.verified(figures.built(run, session.build(), given), session.verify(Tolerance()))
            with write.staging(place / "b") as folder:
                write.publish(folder, place / "b", manifests.assemble(given, run, session.save(str(folder)), verified=True))
        finally:
            session.close()
    return place / "b"


@pytest.fixture
def bundle(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, signed by this user."""
    import shutil

    monkeypatch.setenv("XDG_STATE_HOME", str(compiled.parent / "state"))
    return shutil.copytree(compiled, tmp_path / "b")


def test_4_28_43_a_flipped_byte_of_a_bundle_is_3(bundle: Path, command: Any) -> None:
    for victim in sorted(bundle.iterdir()):
        if victim.name == "manifest.mac":
            continue
        original = victim.read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        victim.write_bytes(changed)
        ended = command("bench", "b", *QUICK)
        assert ended.code == 3 and ended.message and ended.fix, victim.name
        victim.write_bytes(original)
    assert command("bench", "b", *QUICK).code == 0, "as it was, it runs"


def resigned(bundle: Path, backend: str, **changes: str) -> None:
    """The bundle as this user would have built it elsewhere: signed, for another backend, with these facts different."""
    from gpuopt.bundles import fingerprint
    from gpuopt.bundles.manifest import MAC, MANIFEST
    from gpuopt.devices import info
    from gpuopt.trust import consent

    plain = json.loads((bundle / MANIFEST).read_text())
    plain["backend"]["name"] = backend  # native code, as far as anyone can tell before it is opened
    plain["fingerprint"] = fingerprint.current(backend, info.describe(plain["device"])) | changes
    data = json.dumps(plain).encode()
    (bundle / MANIFEST).write_bytes(data)
    (bundle / MAC).write_text(consent.sign(data) + "\n")


@pytest.mark.parametrize(
    ("row", "backend", "field", "theirs", "ours"),
    [
        (27, "aoti", "platform", "linux-s390x", "linux-"),
        (27, "aoti", "cpu_isa", "AVX1024", torch.backends.cpu.get_cpu_capability()),
        (27, "aoti", "device", "NVIDIA A100", ""),
        (41, "aoti", "torch", "7.7.7", torch.__version__),
        (41, "trt", "tensorrt", "9.9.9", ""),
        (42, "trt", "platform", "linux-s390x", "linux-"),
    ],
)
def test_27_41_42_a_bundle_built_for_something_else_is_4_and_names_both(
    row: int, backend: str, field: str, theirs: str, ours: str, bundle: Path, command: Any
) -> None:
    resigned(bundle, backend, **{field: theirs})
    ended = command("bench", "b", *QUICK)
    assert ended.code == 4, ended.err
    assert field in ended.message and theirs in ended.message and f", here it is {ours}" in ended.message
    assert "gpuopt compile" in ended.fix


def test_29_57_sizes_a_bundle_was_not_built_for_are_2(bundle: Path, command: Any) -> None:
    ended = command("bench", "b", "--dim", "N=3", *QUICK)
    assert ended.code == 2 and "N=3" in ended.message and "N = 2" in ended.fix


# --- rows 52 to 62: models and inputs


LIES = {
    "nan": "nan",
    "slightly_wrong": "accuracy_fail",
    "missing_output": "accuracy_fail",
    "wrong_dtype": "accuracy_fail",
    "mutate_inputs": "accuracy_fail",
}


def test_52_53_54_56_a_candidate_that_lies_is_named_for_it_and_never_ranked(command: Any, tmp_path: Path) -> None:
    liars = [word for lie in LIES for word in ("-b", f"null:fail={lie}")]
    ended = command("bench", "m.py:net", "-b", "eager", *liars, *QUICK, "--json", "r.json")
    assert ended.code == 0 and "Traceback" not in ended.err, ended.err
    honest, *others = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert honest["status"] == "ok" and honest["latency_ms"]
    for lie, run in zip(LIES, others, strict=True):
        assert run["status"] == LIES[lie], lie
        assert run["reason"] and "\n" not in run["reason"]
        assert not run.get("latency_ms") and not run.get("relative") and not run.get("samples_ns")
    assert command("bench", "m.py:net", "-b", "null:fail=nan", *QUICK).code == 1, "alone, it is a verdict"


def test_55_a_model_in_training_mode_is_run_in_eval_mode_and_says_so(command: Any, tmp_path: Path) -> None:
    ended = command("bench", "m.py:training", "--batch", "4", *QUICK, "--json", "r.json")
    assert ended.code == 0, ended.err
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert run["accuracy"]["passed"] and run["accuracy"]["deterministic"]
    assert any("eval" in note for note in run["notes"])


@pytest.mark.parametrize(
    ("row", "words", "code", "said"),
    [
        (57, ["--dim", "Q=3"], 2, "Q"),
        (59, ["--batch", str(2**31)], 5, ""),
        (59, ["--input", "x:float32[65536,65536]"], 5, ""),
        (60, ["--input", "x:float32[N,4]", "--input", "y:float32[N,4]"], 2, "y"),
        (60, ["--inputs", "nothing.npz"], 2, "nothing.npz"),
        (58, ["--input", ""], 2, ""),
        (58, ["--batch", ""], 2, ""),
        (58, ["--dim", "N="], 2, ""),
    ],
)
def test_57_to_60_inputs_that_cannot_be_are_told(row: int, words: list[str], code: int, said: str, command: Any, tmp_path: Path) -> None:
    before = left(tmp_path)
    ended = command("convert", "m.py:net", *words, "-o", "out.onnx")
    assert ended.code == code and said in ended.message and ended.fix, ended.err
    assert left(tmp_path) == before


@pytest.mark.parametrize("text", ["x:float32[N,5]", "x:float32[N]", "x:int64[N,4]"])
@pytest.mark.parametrize("backend", ["eager", "null", "ort"])
def test_60_a_wrong_rank_size_or_dtype_is_2_whatever_runs_it(text: str, backend: str, command: Any) -> None:
    ended = command("bench", "m.py:net", "--input", text, "-b", backend, *QUICK)
    assert ended.code == 2 and "x" in ended.message and ended.fix, ended.err


def test_58_a_batch_of_zero_is_a_usage_error_and_an_empty_tensor_is_defined(command: Any, tmp_path: Path) -> None:
    assert command("bench", "m.py:net", "--batch", "0").code == 2
    ended = command("bench", "m.py:net", "--input", "x:float32[0,4]", *QUICK, "--json", "r.json")
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["status"] == "ok"


def test_61_control_flow_that_depends_on_data_is_unsupported_with_its_reason(command: Any, tmp_path: Path) -> None:
    ended = command("bench", "m.py:branches", "-b", "eager", "-b", "ort", *QUICK, "--json", "r.json")
    assert ended.code == 0, ended.err
    eager, ort = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert eager["status"] == "ok"
    assert ort["status"] == "unsupported" and ort["reason"] and "\n" not in ort["reason"]


@pytest.mark.parametrize(
    "text", ["", "a\nb", "a\0b", "x" * 300, "../../nothing", "nömodel☃", "hf:../x@main", ":", "a:", ":b", "no.such:thing"]
)
def test_62_a_name_that_is_none_is_2(text: str, command: Any, tmp_path: Path) -> None:
    before = left(tmp_path)
    ended = command("convert", text, "-o", "out.onnx")
    assert ended.code == 2 and ended.fix, ended.err
    assert len(ended.message) < 1000
    assert left(tmp_path) == before


# --- rows 57 to 65: the command line

SMALL_RECIPE = "model: x\nbatch: [1]\nnonsense: 1\n"
RECIPES = {
    "twice.yaml": ("model: x\nbatch: 1\nbatch: 2\n", "line 3"),
    "bomb.yaml": ("model: x\na: &a [1,1]\nb: &b [*a,*a]\nbatch: *b\n", "bomb.yaml"),
    "typed.yaml": ("model: x\nbatch: [many]\n", "line 2"),
    "nan.yaml": ("model: x\ntolerance:\n  max_error: .nan\n", "tolerance.max_error"),
    "negative.yaml": ("model: x\nbatch: -1\n", "batch"),
    "object.yaml": ("model: !!python/object/apply:os.system ['true']\n", "object.yaml"),
}


@pytest.mark.parametrize(
    ("row", "words", "code"),
    [
        (57, ["bench", "m.py:net", "--batch", "0"], 2),
        (57, ["bench", "m.py:net", "--batch", "-1"], 2),
        (60, ["bench", "m.py:net", "--input", "x:float99[1]"], 2),
        (63, ["run", "recipe.yaml"], 2),
        (63, ["run", "nothing.yaml"], 2),
        *((63, ["run", name], 2) for name in RECIPES),
        (63, ["bench", "m.py:net", "--max-latency", "nan"], 2),
        (63, ["bench", "m.py:net", "--min-time", "-1s"], 2),
        (63, ["bench", "m.py:net", "--precision", "fp12"], 2),
        (63, ["bench", "m.py:net", "--nonsense"], 2),
        (64, ["compile", "m.py:net", "-b", "eager", "-o", "/proc/nothing/out"], 5),
        (64, ["convert", "m.py:net", "-o", "no/such/folder/m.onnx"], 5),
        (64, ["bench", "m.py:net", "--json", "no/such/folder/r.json"], 5),
        (64, ["bench", "m.py:net", "--json", "/proc/nothing/r.json"], 5),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "recipe.yaml"], 2),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "link"], 2),
        (65, ["compile", "inner", "-b", "eager", "-o", "inner/out"], 2),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "foreign"], 2),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "foreign", "--force"], 2),
        (65, ["convert", "m.py:net", "-o", "recipe.onnx"], 2),
        (65, ["convert", "m.py:net", "-o", "foreign"], 2),
        (65, ["bench", "m.py:net", "--json", "recipe.yaml"], 2),
        (62, ["compile", "m.py:net", "-b", "eager", "-o", "n" * 300], 2),
        (62, ["compile", "m.py:net", "-b", "eager", "-o", "a\nb"], 2),
    ],
)
def test_57_to_65_what_is_wrong_with_the_command_line_is_told_before_any_work(
    row: int, words: list[str], code: int, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.pipeline import isolate

    def no_child(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(isolate, "Child", no_child)
    (tmp_path / "recipe.yaml").write_text(SMALL_RECIPE)
    for name, (text, _) in RECIPES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "recipe.onnx").write_text("not ours")
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "inner")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("only copy")
    before = left(tmp_path)
    ended = command(*words)
    assert ended.code == code and ended.message and ended.fix, ended.err
    if words[0] == "run" and words[1] in RECIPES:
        assert RECIPES[words[1]][1] in ended.message, "where it is"
    assert left(tmp_path) == before


# --- through processes of their own


@pytest.mark.parametrize(
    ("row", "words", "code"),
    [
        (7, ["convert", "model.pt", "-o", "m.safetensors"], 3),
        (18, ["convert", "nan.safetensors", "--arch", "m.py:net", "-o", "m.onnx"], 1),
    ],
)
def test_7_18_a_row_of_each_kind_in_processes_of_its_own(row: int, words: list[str], code: int, tmp_path: Path) -> None:
    """With the variable that tells torch to run everything: row 7."""
    from safetensors.torch import save_file

    canary = tmp_path / "canary"
    (tmp_path / "m.py").write_text(shared.MODELS)
    corpus.saved(tmp_path / "model.pt", {"weight": torch.ones(2), "x": corpus.Payload(canary)})
    save_file({"0.weight": torch.full((6, 4), float("nan"))}, tmp_path / "nan.safetensors")
    before = left(tmp_path)
    ended = shared.gpuopt(*words, cwd=tmp_path, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    assert ended.code == code and ended.message and ended.fix, ended.err
    if row == 7:
        assert "GPO210" in ended.err and "mkdir" in ended.message and "gpuopt trust" in ended.fix
    assert left(tmp_path) == before
