"""A folder of reports -> docs/zoo.md. `python -m recipes.zoo.table [DIR]`, recipes/zoo/h200 without one; `--check` says whether the page is up to date.

No figure of the page is typed: all are made here from what the tool wrote.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import Report
from recipes.zoo.run import HERE, ORDER, ROOT
from recipes.zoo.verdict import Verdict, label, verdicts

REPORTS = HERE / "h200"
PAGE = ROOT / "docs" / "zoo.md"
GOALS = {"1": (3.0, 5.0), "large": (1.3, 1.6)}
"""Median speed-up over fp16 eager: what it must be, and the aim."""
INTRO = """# Twenty architectures

What gpuopt's candidates give over plain fp16 eager on twenty architectures built from their configurations with random weights: at batch 1, and at a large batch. Each row
is one command over a recipe of [`recipes/zoo`](../recipes/zoo), its candidates verified and timed in interleaved pairs. The fastest one that is right and beats eager
beyond the noise is what would be put into service; where none does, eager is kept and counts as 1.00x. `python -m recipes.zoo.run` measures them again.
The reports in the tree were taken while other commands used the other GPUs of the host: what waits for the host, as eager at batch 1 does, is slower for it.
"""
NOTHING = "They have not been measured yet: `python -m recipes.zoo.run --output recipes/zoo/h200` on an H200 measures them, and `python -m recipes.zoo.table` writes this page."


def read(folder: Path) -> dict[str, Report]:
    """Name -> report, in the order they are run; what is not there is left out."""
    there = {name: folder / f"{name}.json" for name in ORDER}
    return {name: codec.read_json(Report, path) for name, path in there.items() if path.exists()}


def render(reports: Mapping[str, Report], where: str = "recipes/zoo/h200") -> str:
    """The page."""
    if not reports:
        return f"{INTRO}\n{NOTHING}\n"
    found = {name: verdicts(report) for name, report in reports.items()}
    one = {name: next((v for v in rows if v.batch == 1), None) for name, rows in found.items()}
    large = {name: next((v for v in rows if v.batch != 1), None) for name, rows in found.items()}
    lines = [INTRO, _medians("batch 1", one, GOALS["1"]), "", _medians("the large batch", large, GOALS["large"]), ""]
    missing = [name for name in ORDER if name not in reports]
    if missing:
        lines += [f"Not measured, and in no median: {', '.join(missing)}.", ""]
    lines += [
        "| architecture | batch | eager, ms | best, ms | speed-up | 95% interval | samples/s | what |",
        "|---|--:|--:|--:|--:|---|--:|---|",
        *(_row(name, verdict) for name, rows in found.items() for verdict in rows),
    ]
    failures = [f"- {name}, batch {v.batch}: {_cell(text)}" for name, rows in found.items() for v in rows for text in v.failures]
    slower = [f"- {name}, batch {v.batch}: {_cell(text)}" for name, rows in found.items() for v in rows for text in v.slower]
    if failures:
        lines += ["", "## What failed", "", *failures]
    if slower:
        lines += ["", "## What is right and no faster than eager", "", *slower]
    first = next(iter(reports.values()))
    packages = first.environment.packages
    if first.device is not None:
        lines += [
            "",
            f"{first.device.name}, driver {first.device.driver}, torch {packages.get('torch')}, transformers {packages.get('transformers')}. "
            f"Times are medians of a call; a speed-up is the median over pairs of blocks. The reports are in `{where}`.",
        ]
    return "\n".join(lines) + "\n"


def _medians(what: str, rows: Mapping[str, Verdict | None], goal: tuple[float, float]) -> str:
    speedups = [v.speedup for v in rows.values() if v is not None and v.speedup is not None]
    without = sorted(name for name, v in rows.items() if v is None or v.speedup is None)
    if not speedups:
        return f"At {what}: nothing was compared."
    kept = sum(v is not None and v.eager is not None and v.best is None for v in rows.values())
    median = statistics.median(speedups)
    met = "the aim is met" if median >= goal[1] else "the goal is met, the aim is not" if median >= goal[0] else "the goal is missed"
    told = f"**At {what}: median {median:.2f}x over {len(speedups)} architectures**, from {min(speedups):.2f}x to {max(speedups):.2f}x; eager is kept for {kept}."
    told += f" The goal is {goal[0]:g}x, the aim {goal[1]:g}x: {met}."
    return told + (f" Without a comparison: {', '.join(without)}." if without else "")


def _row(name: str, verdict: Verdict) -> str:
    shown = verdict.best or verdict.eager
    interval = verdict.best.relative if verdict.best is not None else None
    cells = [
        f"[{name}](../recipes/zoo/{name}.yaml)",
        str(verdict.batch),
        _ms(verdict.eager.latency_ms.median) if verdict.eager is not None and verdict.eager.latency_ms is not None else "",
        _ms(verdict.best.latency_ms.median) if verdict.best is not None and verdict.best.latency_ms is not None else "",
        f"{verdict.speedup:.2f}x" if verdict.speedup is not None else "",
        f"{interval.ci95_low:.2f} to {interval.ci95_high:.2f}" if interval is not None else "",
        f"{shown.samples_per_s:,.0f}" if shown is not None and shown.samples_per_s else "",
        _cell(label(verdict.best)) if verdict.best is not None else "eager, kept" if verdict.eager is not None else "eager failed",
    ]
    return "| " + " | ".join(cells) + " |"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(text: str) -> str:
    """One line, without the paths of one machine."""
    flat = " ".join(re.sub(r"(?:/[\w.+-]+){2,}/", "", text).replace("|", "/").split())
    return flat if len(flat) <= 300 else flat[:299] + "…"


def main() -> None:
    """Write docs/zoo.md, or check it."""
    given = [Path(word) for word in sys.argv[1:] if not word.startswith("-")]
    folder = given[0] if given else REPORTS
    made = render(read(folder), where="recipes/zoo/h200" if folder == REPORTS else folder.name)
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made
            else "docs/zoo.md is not what the reports say: python -m recipes.zoo.table"
        )
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
