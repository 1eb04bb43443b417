"""The twenty recipes of this folder -> a report each and a verdict: what is fastest at batch 1 and at a large batch, or that eager is kept. From the repository's root:

    python -m recipes.zoo.run --output zoo-out --gpus 2 --deadline 500     all of them, shared out over two GPUs
    python -m recipes.zoo.run --output zoo-out --only gpt2,vit_base
    python -m recipes.zoo.run --output zoo-out --device cpu --tiny         a rehearsal, whose figures mean nothing
    python -m recipes.zoo.table zoo-out                                    the reports -> docs/zoo.md

Each GPU has one `gpuopt run` of its share of the recipes, which builds the next ones while one is timed; each report is OUTPUT/NAME.json, what the commands said is in
OUTPUT/logs. The most different architectures come first, so that a run that is cut short still tells. At the deadline a command is ended with its children, and keeps what
was measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.result import Report
from recipes import lanes
from recipes.zoo.verdict import Verdict, verdicts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ORDER = (
    "resnet50",
    "bert_base",
    "granite_moe",
    "diffusion_unet",
    "whisper_small",
    "detr_resnet50",
    "smollm2_360m",
    "swin_tiny",
    "lstm_tagger",
    "t5_base",
    "wav2vec2_base",
    "mobilenet_v2",
    "deberta_v3_base",
    "vit_base",
    "segformer_b0",
    "clip_vit_base",
    "gpt2",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_4gf",
)
"""The most different ones first."""
GRACE_S = 8.0
"""Between the word to end and the end: a report of what was measured is written in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one GPU's command ended."""

    seconds: float
    reason: str
    """Empty where it came to its end by itself."""
    reports: Mapping[str, Report | None]
    """By recipe; None where there is nothing of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every recipe has a report, 1 when some have none, 2 for a command that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m recipes.zoo.run", description="Twenty architectures against fp16 eager.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="commands run at once, each on a GPU of its own")
    parser.add_argument("--deadline", type=float, default=1200.0, metavar="SECONDS")
    parser.add_argument("--only", default="", metavar="NAME,…")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of the same classes for a laptop: a rehearsal")
    asked = parser.parse_args(arguments)
    try:
        names = chosen(asked.only)
        found = run(names, asked.output, gpus=max(1, asked.gpus), deadline_s=asked.deadline, device=asked.device, tiny=asked.tiny)
    except GpuoptError as error:
        print(f"{error.message}: {error.fix}" if error.fix else error.message, file=sys.stderr)
        return 2
    return 0 if found and all(report is not None for ended in found for report in ended.reports.values()) else 1


def chosen(only: str) -> list[str]:
    """Names in the order they are run. Raises UsageError for one that there is none of."""
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    for word in wanted:
        if word not in ORDER:
            raise UsageError(f"no architecture is called {word!r}", fix="one of " + ", ".join(ORDER))
    return [name for name in ORDER if not wanted or name in wanted]


def run(
    names: Sequence[str], output: Path, *, gpus: int = 1, deadline_s: float = 1200.0, device: str = "cuda", tiny: bool = False
) -> list[Ended]:
    """All recipes named, shared out over the GPUs; at the deadline what still runs is ended. Raises UsageError where the folder cannot be made."""
    began = time.monotonic()
    shares = {f"gpu{gpu}": list(names[gpu::gpus]) for gpu in range(gpus) if names[gpu::gpus]}

    def one(share: str, gpu: int, left_s: float) -> Ended:
        return _share(shares[share], output, gpu=gpu, limit_s=left_s, device=device, tiny=tiny)

    found = lanes.lanes(list(shares), output, one, lines, gpus=gpus, deadline_s=deadline_s, grace_s=GRACE_S)
    there = sum(report is not None for ended in found for report in ended.reports.values())
    print(f"{there} of {len(names)} reports in {time.monotonic() - began:.0f} s", flush=True)
    return found


def lines(ended: Ended) -> str:
    """A command for the terminal, a line for each architecture."""
    told = [f"{ended.seconds:.0f} s" + (f", {ended.reason}" if ended.reason else "")]
    for name, report in ended.reports.items():
        words = " ".join(_told(v) for v in verdicts(report)) if report is not None else "no report"
        told.append(f"{name:<16} {words}")
    return "\n".join(told)


def _told(found: Verdict) -> str:
    failed = f", {len(found.failures)} failed" if found.failures else ""
    if found.eager is None:
        return f"| N={found.batch} no eager to compare with{failed}"
    if found.best is None:
        return f"| N={found.batch} eager kept{failed}"
    return f"| N={found.batch} {found.speedup:.2f}x {found.label}{failed}"


def _share(names: Sequence[str], output: Path, *, gpu: int, limit_s: float, device: str, tiny: bool) -> Ended:
    recipes = [HERE / f"{name}.yaml" for name in names]
    if tiny:
        recipes = [output.resolve() / "logs" / f"{name}.yaml" for name in names]
        for name, recipe in zip(names, recipes, strict=True):
            recipe.write_text(codec.to_json(small((HERE / f"{name}.yaml").read_text(encoding="utf-8")), indent=1), encoding="utf-8")
    reports = {name: output.resolve() / f"{name}.json" for name in names}
    for report in reports.values():
        report.unlink(missing_ok=True)
    # One recipe's --json is a file, several recipes' a folder.
    target = output.resolve() if len(names) > 1 else reports[names[0]]
    command = [sys.executable, "-m", "gpuopt", "run", *map(_shown, recipes), "--device", device, "--json", str(target), "--quiet"]
    began = time.monotonic()
    reason, _ = lanes.ended(
        command, lanes.environment(gpu, on_gpu=device == "cuda"), output / "logs" / f"gpu{gpu}.log", limit_s=limit_s, grace_s=GRACE_S
    )
    return Ended(seconds=time.monotonic() - began, reason=reason, reports={name: _read(path) for name, path in reports.items()})


def small(text: str) -> dict[str, Any]:
    """A recipe as a mapping, for the tiny model of the same name: short texts, batches up to 3, little time."""
    plain: dict[str, Any] = codec.load_yaml(text, what="recipe")
    plain["model"] = str(plain["model"]).replace("recipes.zoo.models:", "recipes.zoo.tiny:")
    if "dims" in plain:
        plain["dims"] = {name: 16 for name in plain["dims"]}
    # A CPU has no CUDA graphs, and computes halves slowly.
    plain["precision"] = "fp32"
    plain["candidates"] = [entry for entry in plain["candidates"] if entry["backend"] != "cudagraphs"]
    for entry in plain["candidates"]:
        entry.pop("precision", None)
        entry.update(batch=min(int(entry["batch"]), 3), backend=str(entry["backend"]).partition(":")[0])
    plain["bench"] = {**plain["bench"], "num_pairs": 3, "min_time_s": 0.02, "max_time_s": 0.1, "warmup_s": 0.02, "build_jobs": 2}
    return plain


def _shown(recipe: Path) -> str:
    return str(recipe.relative_to(ROOT)) if recipe.is_relative_to(ROOT) else str(recipe)


def _read(path: Path) -> Report | None:
    if not path.exists():
        return None
    report = codec.read_json(Report, path)
    return report if report.runs else None


if __name__ == "__main__":
    sys.exit(main())
