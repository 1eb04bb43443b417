"""Models x backends -> the share of the device's time that `gpuopt profile` gives to a module, in one JSON file. `make attribution`, or `python -m recipes.attribution.run`.

    python -m recipes.attribution.run                         all cases on the GPU -> recipes/attribution/h200.json (about six minutes)
    python -m recipes.attribution.run --only bert_large,eager some of them, by model or backend
    python -m recipes.attribution.run --device cpu --small --output rehearsal.json
    python -m recipes.attribution.table                       the file -> docs/attribution.md

Each case is a `gpuopt profile` of its own, whose command is kept beside its figures. The file is written anew after each: a run that is ended keeps what it has.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import Report
from gpuopt.reports import groups
from recipes import result_file
from recipes.attribution.rows import Case, Shares

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASE_TIMEOUT_S = 180.0

MODELS: dict[str, tuple[str, ...]] = {
    "bert_large": ("--batch", "64", "--dim", "S=512", "-i", "input_ids:int64[N,S]<30522", "-i", "attention_mask:int64[N,S]=1", "--precision", "fp16"),
    "resnet101": ("--batch", "256", "--channels-last", "--precision", "fp16"),
    "llama_8b": ("--batch", "1", "--dim", "S=512"),
}  # fmt: skip
SMALL: dict[str, tuple[str, ...]] = {
    "bert_large": ("--batch", "2", "--dim", "S=16", "-i", "input_ids:int64[N,S]<99", "-i", "attention_mask:int64[N,S]=1"),
    "resnet101": ("--batch", "2"),
    "llama_8b": ("--batch", "1", "--dim", "S=16"),
}
BACKENDS = ("eager", "inductor", "inductor:reduce-overhead", "cudagraphs", "ort")
LEFT_OUT = {("llama_8b", "ort"): "left out: 16 GB of weights would have to be exported to ONNX first"}
QUICK = ("--verify", "off", "--max-time", "1", "--no-input", "--quiet")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every case was measured, 1 when some were not."""
    parser = argparse.ArgumentParser(prog="python -m recipes.attribution.run", description="How much of a profile's time has a module.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal")
    parser.add_argument("--only", default="", metavar="MODEL,BACKEND,…")
    parser.add_argument("--output", type=Path, default=HERE / "h200.json")
    typed = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(typed)
    wanted = {w for w in asked.only.split(",") if w}
    models, backends = wanted & set(MODELS) or set(MODELS), wanted & set(BACKENDS) or set(BACKENDS)
    if unknown := wanted - set(MODELS) - set(BACKENDS):
        print(f"no model and no backend is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    found = Shares(command=result_file.command("recipes.attribution.run", typed), small=asked.small)
    for model in (m for m in MODELS if m in models):
        for backend in (b for b in BACKENDS if b in backends):
            if not asked.small and (model, backend) in LEFT_OUT:
                found = replace(
                    found, cases=(*found.cases, Case(model=model, backend=backend, command="", reason=LEFT_OUT[model, backend]))
                )
                continue
            case, report = measured(model, backend, device=asked.device, small=asked.small)
            if report is not None and report.device is not None:
                found = replace(found, device=report.device, environment=report.environment)
            found = replace(found, cases=(*found.cases, case))
            print(
                f"{case.model:<12} {case.backend:<26} "
                + (f"{case.share:.1%} of {case.time_ms:.4g} ms" if case.share is not None else case.reason),
                flush=True,
            )
            result_file.write(found, asked.output)
    return 0 if all(case.share is not None or (case.model, case.backend) in LEFT_OUT for case in found.cases) else 1


def measured(model: str, backend: str, *, device: str, small: bool) -> tuple[Case, Report | None]:
    """One profile in a process of its own."""
    factory = f"gpuopt.models:{model}" + ("_tiny" if small else "")
    words = ["gpuopt", "profile", factory, *(SMALL if small else MODELS)[model], "--backend", backend, "--device", device, *QUICK]
    case = Case(model=model, backend=backend, command=shlex.join(words))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpuopt-attribution-") as folder:
        path = Path(folder) / "profile.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        try:
            ended = subprocess.run(
                [sys.executable, "-m", *words, "--json", str(path)], capture_output=True, text=True, timeout=CASE_TIMEOUT_S, env=environment, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return replace(case, reason=f"not done in {CASE_TIMEOUT_S:.0f} s", seconds=CASE_TIMEOUT_S), None
        seconds = time.monotonic() - began
        if ended.returncode or not path.exists():
            told = [line for line in ended.stderr.splitlines() if line.startswith("error")]
            return replace(case, reason=(told[-1] if told else f"exit code {ended.returncode}")[:200], seconds=seconds), None
        report = codec.read_json(Report, path)
    run = report.runs[0]
    times = groups.grouped(run, "place")
    return (
        replace(
            case, share=times.attributed, line_share=groups.grouped(run, "line").attributed, seconds=seconds,
            time_ms=sum(p.time_ns or 0.0 for p in run.roofline) / 1e6,
            wall_ms=run.waterfall.wall_ms if run.waterfall else None,
            unaccounted_ms=run.waterfall.unaccounted_ms if run.waterfall else None,
        ),
        report,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
