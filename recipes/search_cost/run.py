"""The models of space.py -> a record each: every candidate of a declared space measured, on which replay.py replays the search. From the repository's root:

    python -m recipes.search_cost.run --output OUT --gpus 2 --deadline 560      all of them, one at a time on each of two GPUs
    python -m recipes.search_cost.run --output OUT --only resnet101 --resume    what a run that was cut short left out
    python -m recipes.search_cost.run --output OUT --device cpu --tiny --most 4     a rehearsal, whose figures mean nothing
    python -m recipes.search_cost.table                                         recipes/search_cost/h200/*.json -> docs/search_cost.md

Each model is a process of its own (measure.py) with an equal share of the cores, as a search on a machine of one GPU has them; its record is OUTPUT/NAME.json, what it said
OUTPUT/logs/NAME.log. Six different models come first, so that a run that is cut short still tells. At the deadline those still running are ended with their children: their
records keep what was measured, count for nothing until they are whole, and --resume goes on with them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuopt.core.errors import GpuoptError, UsageError
from recipes import lanes, result_file
from recipes.search_cost import record as records
from recipes.search_cost.record import Record
from recipes.search_cost.replay import replay
from recipes.search_cost.space import MOST, chosen

LIMIT_S = 400.0
"""For one model."""
GRACE_S = 15.0
"""Between the word to end and the end: its children are ended in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one model's process ended."""

    name: str
    seconds: float
    reason: str
    """Empty where it came to its end by itself, and well."""
    record: Record | None

    @property
    def is_whole(self) -> bool:
        """Every candidate was measured."""
        return self.record is not None and not self.record.missing()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every model has a whole record, 1 when some have none, 2 for a command that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m recipes.search_cost.run", description="Whole spaces, measured once.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="models measured at once, each on a GPU of its own")
    parser.add_argument("--deadline", type=float, default=1200.0, metavar="SECONDS")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for one model")
    parser.add_argument("--only", default="", metavar="NAME,…")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of the same classes for a laptop: a rehearsal")
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help="candidates of a space, the input among them")
    parser.add_argument(
        "--build-jobs", type=int, default=None, metavar="N", help="candidates built at once; as `gpuopt optimize` would, without"
    )
    parser.add_argument("--resume", action="store_true", help="measure only what the records in DIR lack")
    typed = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(typed)
    try:
        if not 2 <= asked.most <= MOST:
            raise UsageError(f"--most is {asked.most}", fix=f"2 to {MOST}")
        if asked.gpus < 1:
            raise UsageError(f"--gpus is {asked.gpus}", fix="1 or more")
        extra = ["--device", asked.device, "--most", str(asked.most), "--command", result_file.command("recipes.search_cost.run", typed)]
        extra += ["--tiny"] if asked.tiny else []
        extra += ["--resume"] if asked.resume else []
        extra += ["--build-jobs", str(asked.build_jobs)] if asked.build_jobs is not None else []
        names = chosen(asked.only)
        found = run(
            names, asked.output, extra, gpus=asked.gpus, deadline_s=asked.deadline, limit_s=asked.limit, on_gpu=asked.device == "cuda"
        )
    except GpuoptError as error:
        print(f"{error.message}: {error.fix}" if error.fix else error.message, file=sys.stderr)
        return 2
    return 0 if len(found) == len(names) and all(ended.is_whole for ended in found) else 1


def run(
    names: Sequence[str], output: Path, extra: Sequence[str], *, gpus: int, deadline_s: float, limit_s: float, on_gpu: bool
) -> list[Ended]:
    """All models named, `gpus` at a time. Nothing is begun shortly before the deadline, and what runs then is ended. Raises UsageError where the folder cannot be made."""
    began = time.monotonic()

    def one(name: str, gpu: int, left_s: float) -> Ended:
        cores = _cores(gpu, gpus)
        return _one(name, output, [*extra, *cores], lanes.environment(gpu, on_gpu=on_gpu), limit_s=min(limit_s, left_s))

    found = lanes.lanes(names, output, one, line, gpus=gpus, deadline_s=deadline_s, grace_s=GRACE_S)
    print(f"{sum(e.is_whole for e in found)} of {len(names)} whole records in {time.monotonic() - began:.0f} s", flush=True)
    return found


def line(ended: Ended) -> str:
    """One model for the terminal."""
    head = f"{ended.name:<16} {ended.seconds:5.0f} s"
    told = f" ({ended.reason})" if ended.reason else ""
    if ended.record is None:
        return f"{head} no record{told}"
    size = len(ended.record.space())
    if not ended.is_whole:
        return f"{head} {size - len(ended.record.missing())} of {size} candidates{told}"
    one = replay(ended.record)
    reached = (
        f"98% of the optimum after {one.until_share:.0%} of the time" if one.until_share is not None else "98% of the optimum never reached"
    )
    return f"{head} {size} candidates, {one.whole_s:.0f} s; {reached}; chose {one.chosen} at {one.reached:.1%}{told}"


def _cores(gpu: int, gpus: int) -> list[str]:
    """The share of the cores of the model on this GPU: those it builds on are none of those another GPU's launches need."""
    each = len(os.sched_getaffinity(0)) // gpus if hasattr(os, "sched_getaffinity") else 0
    return ["--cores", f"{gpu * each}-{(gpu + 1) * each - 1}"] if gpus > 1 and each else []


def _one(name: str, output: Path, extra: Sequence[str], environment: dict[str, str], *, limit_s: float) -> Ended:
    path, log = output.resolve() / f"{name}.json", output / "logs" / f"{name}.log"
    if "--resume" not in extra:
        path.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "recipes.search_cost.measure", name, "--output", str(path), *extra]
    began = time.monotonic()
    reason, code = lanes.ended(command, environment, log, limit_s=limit_s, grace_s=GRACE_S)
    if code and not reason:
        said = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
        reason = said[-1][:200] if said else f"ended with {code}"
    return Ended(name=name, seconds=time.monotonic() - began, reason=reason, record=records.read(path) if path.exists() else None)


if __name__ == "__main__":
    sys.exit(main())
