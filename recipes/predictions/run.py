"""Every pair of defects.py -> predicted beside measured, in one JSON file. `make predictions`, or `python -m recipes.predictions.run`, from the repository's root.

Each bad side is explained by the doctor, which predicts what the fix gives back as a range; both sides are timed in interleaved blocks, which says what it does give back.

    python -m recipes.predictions.run                          all pairs on the GPU -> recipes/predictions/h200.json (about eight minutes)
    python -m recipes.predictions.run --only GPU303,bert-item  some of them, by code or name; --keep leaves the file's other rows
    python -m recipes.predictions.run --device cpu --small --output rehearsal.json
    python -m recipes.predictions.table                        the file -> docs/predictions.md

The file is a `Predictions` of rows.py, where every field is explained:

    command, small, seconds       how it was made; `small` is a rehearsal on tiny models
    device, environment           with the ceilings the prices are made of, and the versions
    rows[].name, code, what, change        the pair, and the rule that is to find it
    rows[].held_out                        whether prices were never worked on with it in sight
    rows[].status, reason                  `measured`, or why not
    rows[].bad_ms, fixed_ms                median wall time of a call
    rows[].predicted_low_ms, predicted_high_ms, gain_ms, gain_low_ms, gain_high_ms, num_pairs
    rows[].in_range, miss                  the judgement: miss is |gain - middle| / middle
    rows[].difference                      relative RMSE between the outputs of the two sides
    rows[].fired, fired_on_fixed, findings, findings_fixed

It is written anew after each pair. Pairs run in children, a few to each: one that crashes or hangs loses its row, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.errors import GpuoptError, UsageError
from gpuopt.core.result import Device, Environment
from gpuopt.pipeline import facts
from gpuopt.pipeline.isolate import Child, ChildFailed
from recipes import result_file
from recipes.predictions.rows import Predictions, Row, Timed, Told, judged, score

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WORKER = "recipes.predictions.worker"
PER_CHILD = 12
"""Pairs a child: all are timed before the first is traced, and all stay in memory until then."""
BUDGET_S = 540.0
"""No pair is begun after this; what is timed by then is still explained."""
EXPLAIN_S = 4.0
"""Kept of the budget for each pair that was timed and not yet explained."""
PAIR_TIMEOUT_S = 120.0
SURVEY_TIMEOUT_S = 180.0

Say = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every pair was measured, 1 when some were not, 2 for a command that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m recipes.predictions.run", description="Predicted gains beside measured ones.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal, whose figures mean nothing")
    parser.add_argument("--only", default="", metavar="CODE,NAME,…")
    parser.add_argument("--output", type=Path, default=None, help="where the JSON goes; recipes/predictions/h200.json on an H200")
    parser.add_argument("--keep", action="store_true", help="keep the rows the output already has of other pairs")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    typed = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(typed)
    try:
        names = chosen(asked.only)
        found = run(
            names,
            device=asked.device,
            small=asked.small,
            output=asked.output,
            keep=asked.keep,
            budget_s=asked.budget,
            command=result_file.command("recipes.predictions.run", typed),
        )
    except GpuoptError as error:
        print(f"{error.message}: {error.fix}" if error.fix else error.message, file=sys.stderr)
        return 2
    return 0 if all(row.status == "measured" for row in found.rows) else 1


def chosen(only: str) -> list[str]:
    """Names of the pairs, in their order. Raises UsageError for a code or a name that none has."""
    from recipes.predictions.defects import DEFECTS

    wanted = [w.strip() for w in only.split(",") if w.strip()]
    for word in wanted:
        if not any(word in (d.code, d.name) for d in DEFECTS.values()):
            raise UsageError(f"no pair is called {word!r}", fix="one of " + ", ".join(f"{d.code} {d.name}" for d in DEFECTS.values()))
    return [d.name for d in DEFECTS.values() if not wanted or d.code in wanted or d.name in wanted]


def run(
    names: Sequence[str],
    *,
    device: str,
    small: bool = False,
    output: Path | None = None,
    keep: bool = False,
    budget_s: float = BUDGET_S,
    command: str = "python -m recipes.predictions.run",
    say: Say = print,
    child: Callable[[], Child] | None = None,
) -> Predictions:
    """Measure these pairs and write the file after each. Raises GpuoptError where the device is missing or the file cannot be kept."""
    began = time.monotonic()
    start = child or (
        lambda: Child(WORKER, environment={"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])})
    )
    rows: dict[str, Row] = {}
    machine: tuple[Device, Environment] | None = None
    kept: tuple[Row, ...] = ()

    def found() -> Predictions:
        assert machine is not None
        return Predictions(
            command=command,
            small=small,
            device=machine[0],
            environment=machine[1],
            seconds=time.monotonic() - began,
            rows=_merged(kept, rows),
        )

    def settle(row: Row) -> None:
        rows[row.name] = row
        assert output is not None
        say(line(row))
        result_file.write(found(), output)

    while pending := [name for name in names if name not in rows]:
        with start() as process:
            if machine is None:
                machine = _surveyed(process, device, small, ceilings=not small)  # a rehearsal's prices mean nothing
                output = output or _default(machine[0], small)
                kept = _kept(output, machine, names) if keep else ()
                say(f"{machine[0].name}: {len(names)} pairs -> {output.name} ({time.monotonic() - began:.0f} s)")
            else:
                _surveyed(process, device, small, ceilings=False)  # they are known
            timed: dict[str, tuple[Timed, float]] = {}
            for name in pending[:PER_CHILD]:
                if time.monotonic() - began > budget_s - EXPLAIN_S * len(timed):
                    settle(replace(_empty(name), status="skipped", reason=f"the {budget_s:.0f} s were over"))
                    continue
                at = time.monotonic()
                try:
                    timed[name] = (
                        process.call("time", Timed, timeout_s=PAIR_TIMEOUT_S, name=name, device=machine[0].id),
                        time.monotonic() - at,
                    )
                    say(f"  {name}: {timed[name][0].bad_ms:.4g} -> {timed[name][0].fixed_ms:.4g} ms ({timed[name][1]:.1f} s)")
                except ChildFailed as failure:
                    settle(_failed(name, failure, time.monotonic() - at))
                    if not process.alive:
                        break  # what was timed in it has no trace yet: another child times it again
            for name, (figures, took) in timed.items() if process.alive else ():
                at = time.monotonic()
                try:
                    told = process.call("explain", Told, timeout_s=PAIR_TIMEOUT_S, name=name, device=machine[0])
                    settle(judged(_empty(name), figures, told, seconds=took + time.monotonic() - at))
                except ChildFailed as failure:
                    settle(
                        replace(
                            _failed(name, failure, took + time.monotonic() - at),
                            bad_ms=figures.bad_ms,
                            fixed_ms=figures.fixed_ms,
                            gain_ms=figures.gain_ms,
                        )
                    )
                    if not process.alive:
                        break
    if machine is None:
        raise UsageError("no pair was asked for", fix="--only CODE, or none")
    result = found()
    assert output is not None
    result_file.write(result, output)
    say(summary(result))
    return result


def line(row: Row) -> str:
    """One pair for the terminal."""
    head = f"{row.code} {row.name:<24}"
    if row.status != "measured" or row.gain_ms is None:
        return f"{head} {row.status}: {row.reason[:160]} ({row.seconds:.1f} s)"
    if row.predicted_low_ms is None or row.predicted_high_ms is None:
        told = "fired without a price" if row.fired else "SILENT"
    else:
        told = f"predicted {row.predicted_low_ms:.3g} to {row.predicted_high_ms:.3g}, " + ("in range" if row.in_range else "MISSED")
        told += f" ({row.miss:.0%} from the middle)" if row.miss is not None else ""
    alarm = "; STILL FIRES ON THE FIXED SIDE" if row.fired_on_fixed else ""
    differs = f"; outputs differ by {row.difference:.1e}" if row.difference is not None and row.difference > 2e-2 else ""
    return f"{head} {row.bad_ms:.4g} -> {row.fixed_ms:.4g} ms: gain {row.gain_ms:.3g}, {told}{alarm}{differs} ({row.seconds:.1f} s)"


def summary(found: Predictions) -> str:
    """The score of all, and of those held out."""

    def told(rows: Sequence[Row]) -> str:
        total = score(rows)
        share = f"{total.share:.0%}" if total.share is not None else "no"
        miss = f"{total.median_miss:.1%}" if total.median_miss is not None else "none: half of them have no prediction"
        return f"{total.num_in_range} of {total.num_measured} measured gains in range ({share}), median miss {miss}"

    held_out = [row for row in found.rows if row.held_out]
    return told(found.rows) + (f"; held out: {told(held_out)}" if held_out else "") + f"; {found.seconds:.0f} s"


def _surveyed(process: Child, device: str, small: bool, *, ceilings: bool) -> tuple[Device, Environment]:
    try:
        found = process.call("survey", facts.Survey, timeout_s=SURVEY_TIMEOUT_S, device=device, small=small, ceilings=ceilings)
    except ChildFailed as failure:
        raise failure.error or UsageError(failure.reason, fix="--device cpu --small rehearses without a GPU") from failure
    return found.device, found.environment


def _default(device: Device, small: bool) -> Path:
    if "H200" in device.name and not small:
        return HERE / "h200.json"
    raise UsageError(f"{device.name} is not what recipes/predictions/h200.json is about", fix="--output FILE.json")


def _kept(output: Path, machine: tuple[Device, Environment], names: Sequence[str]) -> tuple[Row, ...]:
    """Rows of other pairs in the file, from a device of this name under the same versions. Raises UsageError for any other file."""
    if not output.exists():
        return ()
    before = codec.read_json(Predictions, output)
    if (before.device.name, before.device.driver, before.environment.packages) != (machine[0].name, machine[0].driver, machine[1].packages):
        raise UsageError(
            f"{output.name} was made on another machine or with other versions", fix="leave --keep out: all pairs are measured anew"
        )
    return tuple(row for row in before.rows if row.name not in names)


def _merged(kept: Sequence[Row], rows: dict[str, Row]) -> tuple[Row, ...]:
    from recipes.predictions.defects import DEFECTS

    both = {**{row.name: row for row in kept}, **rows}
    return tuple(both[name] for name in DEFECTS if name in both)


def _empty(name: str) -> Row:
    from recipes.predictions.defects import DEFECTS, HELD_OUT

    defect = DEFECTS[name]
    return Row(name=name, code=defect.code, what=defect.what, change=defect.change, held_out=defect in HELD_OUT)


def _failed(name: str, failure: ChildFailed, seconds: float) -> Row:
    # A reason may quote a compiler: paths are this machine's.
    reason = re.sub(r"(?:/[\w.+-]+){2,}/", "", failure.reason)[:400]
    return replace(_empty(name), status=failure.status.value, reason=reason, seconds=seconds)


if __name__ == "__main__":
    sys.exit(main())
