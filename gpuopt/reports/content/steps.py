"""Profile -> what to type next, and why."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from gpuopt.core.result import Ceilings, Report, Run, Status
from gpuopt.reports import figures as f
from gpuopt.reports.content.blocks import Steps
from gpuopt.reports.content.breakdown import part_tone
from gpuopt.reports.content.naming import compute_quantity
from gpuopt.reports.content.program import OBSERVED

_KEEP_WITH_VALUE = {"--input", "--inputs", "--dim", "--batch", "-b", "--arch", "--trust", "--device", "--seed", "--precision", "-p"}
_KEEP_FLAGS = {"--cast", "--allow-nonfinite", "--trust-remote-code"}


def build(report: Report, ceilings: Ceilings) -> list[Steps]:
    """At most two lines, only after a profile: what its biggest slice and the machine's own ceilings suggest."""
    if report.error or report.verb != "profile" or len(report.runs) != 1:
        return []
    run = report.runs[0]
    if run.backend in OBSERVED:
        return []  # a program is changed by hand first: the findings say where
    base = _model_and_inputs(report.command)
    if run.status != Status.OK or run.waterfall is None or not base or not run.waterfall.parts:
        return []
    steps: list[tuple[str, str]] = []
    faster = _faster_precision(run, ceilings)
    without = _without_precision(base)
    tones: dict[str, float] = {}
    for part in run.waterfall.parts:
        tone = part_tone(part.name)
        tones[tone] = tones.get(tone, 0.0) + part.ms
    biggest = max(tones, key=lambda t: tones[t])
    is_cuda = report.device is not None and report.device.kind == "cuda"
    mine = ":".join(word for word in (run.backend, run.preset) if word)
    better = "inductor:reduce-overhead" if biggest == "gap" and is_cuda else "inductor"
    why = {
        "gap": "the device waits between kernels: compile, and launch them as one graph",
        "memory": "memory traffic dominates: a compiler fuses passes over the same data",
        "compute": "arithmetic dominates: see what a compiler's kernels do",
        "copy": "copies dominate: see what the model does with its inputs already there",
    }.get(biggest, "see what a compiler makes of it, verified and interleaved with this one")
    if run.backend != "inductor" or (better != "inductor" and run.preset is None):  # what is compiled already need not be told to compile
        steps.append((why, shlex.join(["gpuopt", "bench", *base, "--backend", mine, "--backend", better])))
    if faster:
        name, gain, current = faster
        steps.append(
            (
                f"{name} reaches {f.ratio(gain)} the measured {current} ceiling here; its accuracy is checked",
                shlex.join(
                    [
                        "gpuopt",
                        "bench",
                        *without,
                        "--precision",
                        current,
                        "--precision",
                        name,
                        "--backend",
                        better if run.backend == "eager" else mine,
                    ]
                ),
            )
        )
    return [Steps(title="Next", steps=tuple(steps))] if steps else []


def _faster_precision(run: Run, ceilings: Ceilings) -> tuple[str, float, str] | None:
    """The 16-bit or TF32 format whose measured ceiling is well above this run's, if any: (name, gain, current)."""
    current = compute_quantity(run)
    here = ceilings.find(current, "measured") if current else None
    if here is None or current is None or here.value <= 0:
        return None
    rows = [row for name in ("fp16", "bf16", "tf32") if name != current and (row := ceilings.find(name, "measured")) is not None]
    best = max(rows, key=lambda row: row.value, default=None)
    if best is None or best.value < 1.5 * here.value:
        return None
    return best.quantity, best.value / here.value, current


def _model_and_inputs(command: str) -> list[str]:
    """The words of a typed line that name the model and its inputs: what a next command keeps."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    if len(words) < 3:
        return []
    kept: list[str] = []
    rest = iter(words[2:])
    for word in rest:
        name = word.partition("=")[0]
        if not word.startswith("-"):
            kept.append(word)
        elif name in _KEEP_FLAGS:
            kept.append(word)
        elif name in _KEEP_WITH_VALUE:
            kept.append(word)
            if "=" not in word:
                kept += [next(rest, "")]
        elif "=" not in word and name not in _FLAGS_WITHOUT_VALUE:
            next(rest, None)  # an option of another command, and its value
    return kept


_FLAGS_WITHOUT_VALUE = {
    "--channels-last",
    "--fold-bn",
    "--quiet",
    "-q",
    "--force",
    "--strict",
    "--no-input",
    "--allow-inaccurate",
    "--build-only",
    "--allow-inconclusive",
}


def _without_precision(words: Iterable[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("--precision", "-p"):
            skip = True
        elif not word.startswith("--precision="):
            kept.append(word)
    return kept
