"""The catalogue of bad inputs: each ends with its exit code, one line of what happened and one of what to do, and nothing half-written.

Rows about files are driven through Session.load in this process (tests/attacks holds the files themselves); a row of each exit code, and those
that are about the command line, go through the whole command. Row 39 (graphs that never end) belongs to the child's timeout: tests/pipeline.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.errors import GpuoptError, Unavailable
from gpuopt.core.result import Status
from gpuopt.core.spec import BackendSpec, Candidate, DimSpec, InputSpec, ModelRef, Precision, TensorSpec, Tolerance
from gpuopt.pipeline.session import Session
from gpuopt.pipeline.worker import describe

_spec = importlib.util.spec_from_file_location("attack_corpus", Path(__file__).parents[1] / "attacks" / "corpus.py")
assert _spec is not None and _spec.loader is not None
corpus: Any = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("attack_corpus", corpus)
_spec.loader.exec_module(corpus)

EXIT_OF_CLASS = {"BadInput": 3, "Untrusted": 3, "Unavailable": 4, "GateFailed": 1}
WANT = {18: 1, 26: 4}
"""Rows of the corpus whose last column is not 3."""

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
net.input_specs = ("x:float32[N,4]",)

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 4)
    def forward(self, x):
        return self.line(x) if x.sum() > 0 else self.line(x) * 2
def branches():
    return Branches().eval()
branches.input_specs = ("x:float32[N,4]",)

def training():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
training.input_specs = ("x:float32[N,4]",)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "models.py").write_text(MODELS)
    return f"{tmp_path / 'models.py'}:net"


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


def told(work: Callable[[], Any]) -> GpuoptError:
    """The error, once it is sure that its two lines are lines, that a child could hand it on, and that it suggests nothing unsafe."""
    with pytest.raises(GpuoptError) as caught:
        work()
    error = caught.value
    assert error.message and "\n" not in error.message and "Traceback" not in error.message
    assert error.fix and "\n" not in error.fix
    assert "weights_only" not in error.message + error.fix
    failure = describe(error, "load")
    assert failure.type == type(error).__name__ and not failure.traceback
    return error


def candidate(text: str, backend: str = "eager", **fields: Any) -> Candidate:
    return Candidate(model=ModelRef(text=text), backend=BackendSpec.parse(backend), device="cpu", **fields)


# --- rows 1 to 43: files


@pytest.mark.parametrize("name", corpus.CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_file_ends_with_the_exit_code_of_its_row(name: str, session: Session, tmp_path: Path) -> None:
    row, error, make = corpus.CASES[name]
    place, canary = tmp_path / "place", tmp_path / "canary"
    place.mkdir()
    canary.mkdir()
    path = make(place, canary / name)
    before = sorted(p.relative_to(place) for p in place.rglob("*"))
    found = told(lambda: session.load(replace(candidate(str(path)), model=ModelRef(text=str(path), arch=corpus.ARCH))))
    assert found.exit_code == WANT.get(row, 3) == EXIT_OF_CLASS[error]
    assert list(canary.iterdir()) == [], "its code ran"
    assert sorted(p.relative_to(place) for p in place.rglob("*")) == before


def test_21_weights_of_another_dtype_are_3_unless_cast(session: Session, net: str, tmp_path: Path) -> None:
    from gpuopt.loaders import factory

    torch.save({k: v.double() for k, v in factory.build(net).module.state_dict().items()}, tmp_path / "w.pt")
    ref = ModelRef(text=str(tmp_path / "w.pt"), arch=net)
    given = replace(candidate(""), model=ref, inputs=InputSpec(tensors=(TensorSpec.parse("x:float32[N,4]"),)))
    assert told(lambda: session.load(given)).exit_code == 3
    assert session.load(replace(given, model=replace(ref, cast=True))).num_parameters == 44


def compiled(net: str, folder: Path, backend: str = "null") -> Path:
    from gpuopt.bundles import write
    from gpuopt.pipeline import figures, manifests

    session = Session()
    try:
        given = candidate(net, backend, dims={"N": 2}, inputs=InputSpec(dims=(DimSpec(name="N", values=(2,)),)))
        run = figures.loaded(figures.started(given), session.load(given))
        run = figures.verified(figures.built(run, session.build(), given), session.verify(Tolerance()))
        with write.staging(folder) as place:
            write.publish(place, folder, manifests.assemble(given, run, session.save(str(place)), verified=True))
    finally:
        session.close()
    return folder


def test_4_and_28_a_flipped_byte_of_a_bundle_is_3(session: Session, net: str, tmp_path: Path) -> None:
    bundle = compiled(net, tmp_path / "b")
    for victim in sorted(bundle.iterdir()):
        if victim.name == "manifest.mac":
            continue
        original = victim.read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        victim.write_bytes(changed)
        assert told(lambda: session.load(candidate(str(bundle)))).exit_code == 3, victim.name
        victim.write_bytes(original)
    assert session.load(candidate(str(bundle))).form == "bundle"


@pytest.mark.parametrize("field", ["torch", "platform"])
def test_27_41_42_a_bundle_built_for_something_else_is_4_and_names_it(field: str, session: Session, net: str, tmp_path: Path) -> None:
    import json

    from gpuopt.bundles.manifest import MAC, MANIFEST
    from gpuopt.trust import consent

    bundle = compiled(net, tmp_path / "b")
    plain = json.loads((bundle / MANIFEST).read_text())
    plain["backend"]["name"] = "aoti"  # native code, as far as anyone can tell before it is opened
    plain["fingerprint"][field] = "7.7.7"
    data = json.dumps(plain).encode()
    (bundle / MANIFEST).write_bytes(data)
    (bundle / MAC).write_text(consent.sign(data) + "\n")
    error = told(lambda: session.load(candidate(str(bundle))))
    assert error.exit_code == 4 and "7.7.7" in error.message


def test_29_57_sizes_a_bundle_was_not_built_for_are_2(session: Session, net: str, tmp_path: Path) -> None:
    bundle = compiled(net, tmp_path / "b")
    error = told(lambda: session.load(replace(candidate(str(bundle)), dims={"N": 3})))
    assert error.exit_code == 2 and "N" in error.message


# --- rows 44 to 51: what is not here


@pytest.mark.parametrize(
    ("row", "change", "code"),
    [
        (45, {"device": "cuda"}, 4),
        (46, {"device": "cuda:99"}, 4),
        (46, {"device": "cuda:-1"}, 2),
        (46, {"device": "tpu"}, 2),
        (46, {"device": "null"}, 4),
        (51, {"precision": Precision.FP8}, 4),
        (51, {"precision": Precision.TF32}, 4),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_device_that_cannot_is_told_before_any_work(row: int, change: dict[str, Any], code: int, session: Session, net: str) -> None:
    assert told(lambda: session.load(replace(candidate(net), **change))).exit_code == code


@pytest.mark.parametrize(
    ("row", "backend", "codes"),
    [
        (44, "ort:cuda", {2, 4}),
        (48, "trt", {4}),
        (48, "torch-trt", {4}),
        (48, "eagre", {2}),
        (48, "eager:fast", {2}),
        (48, "eager:x=1", {2}),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_backend_that_cannot_is_told(row: int, backend: str, codes: set[int], session: Session, net: str) -> None:
    session.load(candidate(net, backend))
    assert told(session.build).exit_code in codes


@pytest.mark.parametrize("how", ["raise ImportError('undefined symbol: _ZN2at')", "raise OSError('libcudart.so.99: cannot open')"])
def test_49_a_package_that_is_there_and_does_not_import_is_4(
    how: str, session: Session, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "site" / "onnxruntime"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(how + "\n")
    for name in [n for n in sys.modules if n.split(".")[0] == "onnxruntime" or n == "gpuopt.backends.ort"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    session.load(candidate(net, "ort"))
    error = told(session.build)
    assert isinstance(error, Unavailable) and error.exit_code == 4
    for name in [n for n in sys.modules if n == "gpuopt.backends.ort"]:
        monkeypatch.delitem(sys.modules, name)


# --- rows 52 to 62: models and inputs (52 to 56 in full: tests/pipeline)


def test_55_a_model_in_training_mode_is_run_in_eval_mode_and_says_so(session: Session, net: str) -> None:
    found = session.load(replace(candidate(net.replace(":net", ":training")), dims={"N": 4}))
    session.build()
    accuracy = session.verify(Tolerance()).accuracy
    assert accuracy.passed and accuracy.deterministic, accuracy.reason
    assert any("eval" in note for note in (*found.notes, *session._notes))


@pytest.mark.parametrize(
    ("row", "inputs", "dims", "code"),
    [
        (57, InputSpec(), {"Q": 3}, 2),
        (59, InputSpec(tensors=(TensorSpec.parse("x:float32[N,4]"),)), {"N": 2**31}, 5),
        (60, InputSpec(tensors=(TensorSpec.parse("x:float32[N,4]"), TensorSpec.parse("y:float32[N,4]"))), {}, 2),
        (60, InputSpec(file="nothing.npz"), {}, 2),
    ],
)
def test_inputs_that_cannot_be_are_told_at_load(
    row: int, inputs: InputSpec, dims: dict[str, int], code: int, session: Session, net: str
) -> None:
    assert told(lambda: session.load(replace(candidate(net), inputs=inputs, dims=dims))).exit_code == code


@pytest.mark.parametrize("text", ["x:float32[N,5]", "x:float32[N]", "x:int64[N,4]"])
@pytest.mark.parametrize("backend", ["eager", "null", "ort"])
def test_60_a_wrong_rank_size_or_dtype_is_2_whatever_runs_it(text: str, backend: str, session: Session, net: str) -> None:
    def loaded_and_built() -> None:
        session.load(replace(candidate(net, backend), inputs=InputSpec(tensors=(TensorSpec.parse(text),))))
        session.build()

    error = told(loaded_and_built)
    assert error.exit_code == 2, error.message
    assert "x" in error.message


def test_58_a_batch_of_zero_is_defined(session: Session, net: str) -> None:
    found = session.load(replace(candidate(net), dims={"N": 0}))
    assert found.dims == {"N": 0}
    session.build()
    given = session._given()
    assert session.runner()(*given.args, **given.kwargs).shape == (0, 2)


def test_61_control_flow_that_depends_on_data_is_the_backends_failure_with_its_reason(session: Session, net: str) -> None:
    session.load(candidate(net.replace(":net", ":branches"), "ort"))
    with pytest.raises(Exception) as caught:
        session.build()
    failure = describe(caught.value, "build")
    assert Status(failure.status) in (Status.UNSUPPORTED, Status.COMPILE_ERROR)
    assert failure.message


@pytest.mark.parametrize(
    "text", ["", "a\nb", "a\0b", "x" * 300, "../../nothing", "nömodel☃", "hf:../x@main", ":", "a:", ":b", "no.such:thing"]
)
def test_62_a_name_that_is_none_is_2(text: str, session: Session) -> None:
    error = told(lambda: session.load(candidate(text)))
    assert error.exit_code == 2
    assert len(error.message) < 1000


# --- through the whole command


def gpuopt(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", "gpuopt", *words],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def two_lines(result: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("error GPO"))
    assert lines[at + 1].startswith("  → ")
    assert len(lines) == at + 2, "the error comes last, in two lines"


SMALL_RECIPE = "model: x\nbatch: [1]\nnonsense: 1\n"


@pytest.mark.parametrize(
    ("row", "words", "code"),
    [
        (57, ["bench", "m.py:net", "--batch", "0"], 2),
        (57, ["bench", "m.py:net", "--batch", "-1"], 2),
        (60, ["bench", "m.py:net", "--input", "x:float99[1]"], 2),
        (63, ["run", "recipe.yaml"], 2),
        (63, ["run", "nothing.yaml"], 2),
        (63, ["bench", "m.py:net", "--max-latency", "nan"], 2),
        (63, ["bench", "m.py:net", "--min-time", "-1s"], 2),
        (63, ["bench", "m.py:net", "--precision", "fp12"], 2),
        (63, ["bench", "m.py:net", "--nonsense"], 2),
        (64, ["compile", "m.py:net", "-b", "eager", "-o", "/proc/nothing/out"], 5),
        (64, ["convert", "m.py:net", "-o", "no/such/folder/m.onnx"], 5),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "recipe.yaml"], 2),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "link"], 2),
        (65, ["compile", "inner", "-b", "eager", "-o", "inner/out"], 2),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "foreign"], 2),
        (65, ["compile", "m.py:net", "-b", "eager", "-o", "foreign", "--force"], 2),
        (65, ["convert", "m.py:net", "-o", "recipe.onnx"], 2),
        (65, ["convert", "m.py:net", "-o", "foreign"], 2),
        (62, ["compile", "m.py:net", "-b", "eager", "-o", "n" * 300], 2),
        (62, ["compile", "m.py:net", "-b", "eager", "-o", "a\nb"], 2),
    ],
)
def test_what_is_wrong_with_the_command_line_is_told_before_any_work(
    row: int, words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: these end before anything heavy is imported, and a child of the pipeline would be an error."""
    from gpuopt.cli import app
    from gpuopt.pipeline import jobs

    def no_child(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr(jobs, "Child", no_child)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(MODELS)
    (tmp_path / "recipe.yaml").write_text(SMALL_RECIPE)
    (tmp_path / "recipe.onnx").write_text("not ours")
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "inner")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("only copy")
    before = {p: p.read_bytes() if p.is_file() else b"" for p in tmp_path.rglob("*")}
    assert app.run(words) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-2].startswith("error GPO") and err.splitlines()[-1].startswith("  → ")
    assert {p: p.read_bytes() if p.is_file() else b"" for p in tmp_path.rglob("*")} == before


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_an_untrusted_pickle_is_3_and_its_payload_does_not_run(tmp_path: Path, shared_cache: str) -> None:
    """Rows 6 and 7, with the variable that tells torch to run everything."""
    canary = tmp_path / "canary"
    corpus.saved(tmp_path / "model.pt", {"weight": torch.ones(2), "x": corpus.Payload(canary)})
    for extra in ({}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
        result = gpuopt("convert", "model.pt", "-o", "m.safetensors", cwd=tmp_path, XDG_CACHE_HOME=shared_cache, **extra)
        assert result.returncode == 3, result.stderr
        two_lines(result)
        assert "GPO210" in result.stderr and "mkdir" in result.stderr
        assert "gpuopt trust" in result.stderr
        assert result.stdout == ""
        assert not canary.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt"]


@pytest.mark.parametrize(
    ("row", "words", "code"),
    [
        (3, ["convert", "page.pt", "-o", "m.onnx"], 3),
        (18, ["convert", "nan.safetensors", "--arch", "m.py:net", "-o", "m.onnx"], 1),
        (57, ["convert", "m.py:net", "--dim", "Q=2", "-o", "m.onnx"], 2),
        (59, ["convert", "m.py:net", "--batch", str(2**31), "-o", "m.onnx"], 5),
        (45, ["convert", "m.py:net", "--device", "cuda", "-o", "m.onnx"], 4),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="row 45 is about a machine without a GPU")
def test_a_row_of_each_exit_code_through_the_whole_command(
    row: int, words: list[str], code: int, tmp_path: Path, shared_cache: str
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "m.py").write_text(MODELS)
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html></html>")
    save_file({"0.weight": torch.full((6, 4), float("nan"))}, tmp_path / "nan.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    result = gpuopt(*words, cwd=tmp_path, XDG_CACHE_HOME=shared_cache, PYTHONDONTWRITEBYTECODE="1")
    assert result.returncode == code, result.stderr
    two_lines(result)
    assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before
