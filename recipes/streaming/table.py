"""recipes/stream_*/h200.json -> the tables and pictures of docs/streaming.md, between their markers. `python -m recipes.streaming.table`; `--check` says whether they are up to date.

No figure of the page is typed: all are made here from what the tool wrote, and the simulated device's are computed from the rates in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import Report
from gpuopt.core.streamed import OverEager, Ratio, StreamArm, StreamReport, StreamRow
from gpuopt.core.streaming import Plan, Streamed
from gpuopt.reports import figures as f
from gpuopt.reports import frontier
from recipes.streaming.paper import simulated_ms

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "streaming.md"
MARK = re.compile(r"<!-- generated:(?P<name>[\w-]+) -->\n.*?<!-- /generated -->", re.DOTALL)

BOUND = (95.0, 99.0)
"""Of max(C, S / B), percent: what it must be, and the aim."""
MISS = (10.0, 3.0)
"""Of the prediction, percent."""
FITS = 1.0
"""Over eager where everything fits, percent."""
DISK = 85.0
"""Of the disk's rate, or the link's where that is lower, percent."""
SIMULATED = 10.0
"""The simulated device off the measured one, percent."""
SPEEDUPS: Mapping[str, Mapping[str, tuple[float, float | None]]] = {
    "accelerate": {"decode": (5.0, 6.0), "prefill": (5.0, 7.0)},
    "accelerate-pinned": {"decode": (1.3, None), "prefill": (2.0, None)},
    "diffusers": {"decode": (1.0, None), "prefill": (1.0, None)},
    "mmgp": {"decode": (1.0, None), "prefill": (1.0, None)},
}
"""Rival -> workload -> what it must be, and the aim."""

CELLS = ("stream_llama_8b_decode", "stream_llama_8b_prefill_512", "stream_llama_8b_prefill", "stream_llama_8b_prefill_16384")
FIT = ("stream_llama_8b_fits_decode", "stream_llama_8b_fits_prefill")
BESIDE = (
    "stream_llama_8b_rivals_decode",
    "stream_llama_8b_rivals_prefill",
    "stream_llama_8b_budgets_decode",
    "stream_llama_8b_budgets_prefill",
)
LARGE = ("stream_llama_70b_half", "stream_t5_11b")
FROM_DISK = ("stream_llama_8b_disk",)
VERIFIED = ("stream_llama_8b_verify",)
PICTURES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "streaming_decode": ("Llama of the 8B class, decoding", (CELLS[0], BESIDE[0], BESIDE[2])),
    "streaming_prefill": ("Llama of the 8B class, a prompt of 4,096 tokens", (CELLS[2], BESIDE[1], BESIDE[3])),
}
"""SVG file of docs -> its title, and the recipes whose reports are drawn together."""

Reports = Mapping[str, Report]


def read(folder: Path = RECIPES) -> dict[str, Report]:
    """Recipe -> its report, where there is one."""
    names = dict.fromkeys((*CELLS, *FIT, *BESIDE, *LARGE, *FROM_DISK, *VERIFIED))
    there = {name: folder / name / "h200.json" for name in names}
    return {name: codec.read_json(Report, path) for name, path in there.items() if path.exists()}


# -- one part of the page each ------------------------------------------------------------------------------------------------------------------


def bound(reports: Reports) -> Iterator[str]:
    """Every cell against max(C, S / B), its prediction and its budget."""
    seen = [row.measured for name in CELLS for row in _rows(reports, name) if row.measured is not None]
    if seen:
        shares = [one.pct_of_bound for one in seen]
        misses = [abs(_miss(one)) for one in seen]
        above = sum(_within(one) is False for one in seen)
        yield (
            f"Of {f.plural(len(seen), 'cell')} {sum(s >= BOUND[0] for s in shares)} reach {BOUND[0]:g}% of the bound and {sum(s >= BOUND[1] for s in shares)} the aim of {BOUND[1]:g}%; "
            f"the lowest is {min(shares):.1f}%. {sum(m <= MISS[0] for m in misses)} are within {MISS[0]:g}% of what was predicted, {sum(m <= MISS[1] for m in misses)} within "
            f"{MISS[1]:g}%; {above or 'none'} took more of the device than {'their' if above > 1 else 'its'} budget."
        )
        yield ""
        yield from _header("workload", "budget", "weights there", "streamed", "bound", "measured", "of the bound", "predicted", "off by", "peak", "budget, all counted", "same bits")  # fmt: skip
    for name in CELLS:
        for row in _rows(reports, name):
            yield _cell(row)
    yield from _source(reports, CELLS)


def fits(reports: Reports) -> Iterator[str]:
    """Nothing streamed, against plain eager: in one process, by turns, and as two processes stand."""
    header = _header("workload", "eager", "with gpuopt.stream", "over eager", f"must be under {FITS:g}%", "plain eager elsewhere", "across two processes", "same bits")  # fmt: skip
    settings: dict[str, None] = {}
    for name in FIT:
        for row in _rows(reports, name):
            seen, beside = row.measured, row.over_eager
            whole = next((arm for arm in _told(reports, name).arms if arm.rival is None), None)
            if seen is None or (whole is None and beside is None):
                continue
            yield from header
            header = []
            raw = 100 * (seen.median_ms / whole.median_ms - 1) if whole is not None and whole.median_ms else None
            across = f"{f.ms(whole.median_ms)}, {f.ms(seen.median_ms)}: {raw:+.2f}%" if whole is not None and raw is not None else ""
            if beside is None or beside.over is None:
                # Of two processes that are told apart by nothing else: it is held to the goal all the same.
                verdict = "not run" if raw is None else _yes(raw < FITS, "met", "missed")
                reason = f"not measured in one process{f': {_flat(beside.reason)}' if beside is not None and beside.reason else ''}"
                yield _line(_work(seen), "", "", reason, verdict, "", across, _bits(seen.exact))
                continue
            settings[_how(beside)] = None
            under = beside.over.under(FITS)
            verdict = _yes(under == "met", under, under)
            elsewhere = "; ".join(f"{_flat(one.name)}: {_ratio(one.over)}" for one in beside.others)
            yield _line(_work(seen), f.ms(beside.eager_ms), f.ms(beside.streamed_ms), _ratio(beside.over), verdict, elsewhere, across, _bits(seen.exact))  # fmt: skip
    if settings:
        yield ""
        yield " ".join(settings)
    yield from _source(reports, FIT)


def _how(beside: OverEager) -> str:
    assert beside.over is not None
    weights = "weights of its own" if beside.apart else "the plan's weights"
    return f"{beside.over.num_pairs} pairs of blocks of {f.plural(beside.block_forwards, 'forward')}, plain eager with {weights}."


def _ratio(over: Ratio) -> str:
    known = over.percents
    return f"{over.percent:+.2f}% " + (f"({known[0]:+.2f}..{known[1]:+.2f})" if known is not None else "(too few pairs)")


def rivals(reports: Reports) -> Iterator[str]:
    """Other libraries at the same bytes, same run, same weights."""
    header = _header("workload", "library", "budget", "it takes", "streamed, same turns", "speed-up", "goal", "forwards timed", "its peak", "same bits")  # fmt: skip
    settings: dict[str, str] = {}
    for name in BESIDE:
        told = _told(reports, name) if name in reports else None
        for arm in told.arms if told is not None else ():
            if arm.rival is None:
                continue
            yield from header
            header = []
            assert told is not None and arm.row is not None
            row = told.rows[arm.row]
            if arm.setting:
                settings.setdefault(f"{arm.name}", arm.setting)
            yield _against(arm, row)
    if settings:
        yield ""
        yield " ".join(f"{name}: {how}." for name, how in settings.items())
    yield from _source(reports, BESIDE)


def large(reports: Reports) -> Iterator[str]:
    """Models of which little fits."""
    header = _header("model", "workload", "weights", "budget", "streamed", "bound", "measured", "of the bound", "peak", "same bits")
    for name in LARGE:
        for row in _rows(reports, name):
            yield from header
            header = []
            plan, seen = row.planned, row.measured
            if plan is None or seen is None:
                yield _line(_told(reports, name).model, "", "", "", "", "", _flat(row.reason), "", "", "")
                continue
            yield _line(_told(reports, name).model, _work(seen), _gb(plan.anatomy.weight_bytes), frontier.budget(plan), _gb(plan.streamed_bytes), f.ms(plan.bound_ms), f.ms(seen.median_ms), _share(seen.pct_of_bound), _peak(seen), _bits(seen.exact))  # fmt: skip
    yield from _source(reports, LARGE)


def disk(reports: Reports) -> Iterator[str]:
    """Weights that host memory may not hold."""
    header = _header("workload", "from the disk, a forward", "measured", "that is", "the disk alone", "the link", "of the slower", f"must be {DISK:g}%", "same bits")  # fmt: skip
    for name in FROM_DISK:
        for row in _rows(reports, name):
            seen = row.measured
            if seen is None or not seen.plan.calibration.disk_bytes_per_s:
                continue
            yield from header
            header = []
            known = seen.plan.calibration
            num_bytes = sum(unit.num_bytes for unit in seen.plan.anatomy.units if seen.plan.homes.get(unit.name) == "disk")
            rate = num_bytes / seen.median_ms * 1e3
            share = 100 * rate / min(known.disk_bytes_per_s or 0.0, known.link_bytes_per_s)
            yield _line(_work(seen), _gb(num_bytes), f.ms(seen.median_ms), _rate(rate), _rate(known.disk_bytes_per_s or 0.0), _rate(known.link_bytes_per_s), f"{share:.1f}%", _yes(share >= DISK, "met", "missed"), _bits(seen.exact))  # fmt: skip
    yield from _source(reports, FROM_DISK)


def verified(reports: Reports) -> Iterator[str]:
    """What `verify` held against everything resident."""
    header = _header("check", "came out", "of what")
    for name in VERIFIED:
        for check in _told(reports, name).checks if name in reports else ():
            yield from header
            header = []
            yield _line(check.name, {True: "equal", False: "**differs**", None: "not run"}[check.passed], _flat(check.detail))
    yield from _source(reports, VERIFIED)


def simulated(reports: Reports) -> Iterator[str]:
    """The simulated device at each report's own rates, against what was measured."""
    header = _header("workload", "budget", "measured", "simulated", "off by", f"must be within {SIMULATED:g}%")
    last: Plan | None = None
    for name in CELLS:
        for row in _rows(reports, name):
            if row.measured is None:
                continue
            yield from header
            header = []
            last = row.measured.plan
            made = simulated_ms(last)
            off = 100 * (made / row.measured.median_ms - 1)
            yield _line(_work(row.measured), frontier.budget(last), f.ms(row.measured.median_ms), f.ms(made), f"{off:+.1f}%", _yes(abs(off) <= SIMULATED, "met", "missed"))  # fmt: skip
    if last is not None:
        yield ""
        yield f"On a machine without a GPU, with the rates of the last row: `--device {paper_device(last)}`."
    yield from _source(reports, CELLS)


def pictures(reports: Reports) -> Iterator[str]:
    """The frontier of each workload."""
    drawn = drawings(reports)
    for name, (title, _) in PICTURES.items():
        if name in drawn:
            yield f"![{title}: milliseconds over bytes on the device]({name}.svg)"
            yield ""
    missing = [recipe for name, (_, recipes) in PICTURES.items() if name not in drawn for recipe in recipes]
    if missing:
        yield from _source({}, missing)


PARTS: Mapping[str, Callable[[Reports], Iterator[str]]] = {
    "frontier": pictures,
    "bound": bound,
    "rivals": rivals,
    "fits": fits,
    "large": large,
    "disk": disk,
    "verified": verified,
    "simulated": simulated,
}
"""Marker of the page -> its lines."""


def drawings(reports: Reports) -> dict[str, str]:
    """File of docs, without its suffix -> SVG, for pictures that have points."""
    found = {}
    for name, (title, recipes) in PICTURES.items():
        there = [reports[recipe] for recipe in recipes if recipe in reports]
        text = frontier.sheet(there, title) if there else ""
        if text:
            found[name] = text
    return found


def paper_device(plan: Plan) -> str:
    """The simulated device with a plan's rates, as `--device` takes it."""
    known = plan.calibration
    blocks = sorted(ms for unit, ms in known.compute_ms.items() if unit)
    settings = [f"link={known.link_bytes_per_s:.4g}", f"pageable={known.pageable_bytes_per_s:.4g}"]
    if blocks:
        settings.append(f"block={blocks[len(blocks) // 2]:.4g}ms")
    queued = sorted(ms for unit, ms in known.host_ms.items() if unit)
    if queued:
        settings.append(f"host={queued[len(queued) // 2]:.4g}ms")
    return "simulated:" + ",".join([*settings, f"outside={known.compute_ms.get('', 0.0):.4g}ms"])


# -- cells --------------------------------------------------------------------------------------------------------------------------------------


def _told(reports: Reports, name: str) -> StreamReport:
    found = reports[name].streamed
    assert found is not None, "a report of gpuopt stream"
    return found


def _rows(reports: Reports, name: str) -> Sequence[StreamRow]:
    return _told(reports, name).rows if name in reports else ()


def _cell(row: StreamRow) -> str:
    seen = row.measured
    if seen is None:
        return _line("", "", "", "", "", _flat(row.reason), "", "", "", "", "", "")
    plan, off = seen.plan, _miss(seen)
    told = f"{off:+.1f}% " + _goal(abs(off) <= MISS[0], abs(off) <= MISS[1])
    return _line(_work(seen), frontier.budget(plan), _gb(frontier.held(plan)), _gb(plan.streamed_bytes), f.ms(plan.bound_ms), f.ms(seen.median_ms), _share(seen.pct_of_bound), f.ms(plan.predicted_ms), told, _peak(seen), _gb(plan.budget_bytes), _bits(seen.exact))  # fmt: skip


def _against(arm: StreamArm, row: StreamRow) -> str:
    plan, seen = row.planned, row.measured
    assert plan is not None and seen is not None and arm.rival is not None
    given = frontier.budget(plan) if arm.budgeted else "takes none"
    if arm.speedup is None:
        return _line(_work(seen), arm.name, given, f"not run: {_flat(arm.reason)}", "", "", "", "", "", "")
    must, aim = SPEEDUPS[arm.rival]["decode" if seen.workload.startswith("decode") else "prefill"]
    met = _goal(arm.speedup >= must if must > 1 else arm.speedup > 1, aim is not None and arm.speedup >= aim)
    goal = f"{must:g}×" + (f", aim {aim:g}×" if aim is not None else "") if must > 1 else "faster"
    # A goal at another budget than the one it was set for is only to be faster.
    if plan.spec.budget_share != 0.5 and must > 1:
        goal, met = "faster", _goal(arm.speedup > 1, False)
    return _line(_work(seen), arm.name, given, f.ms(arm.median_ms), f.ms(arm.streamed_ms), f"{arm.speedup:.2f}× {met}", goal, str(arm.num_calls), _gb(arm.peak_device_bytes), _bits(arm.exact))  # fmt: skip


def _miss(seen: Streamed) -> float:
    """Percent that the measured time lies above the predicted one."""
    return 100 * (seen.median_ms / seen.plan.predicted_ms - 1) if seen.plan.predicted_ms else 0.0


def _within(seen: Streamed) -> bool | None:
    return None if seen.peak_device_bytes is None else seen.peak_device_bytes <= seen.plan.budget_bytes


def _peak(seen: Streamed) -> str:
    inside = _within(seen)
    return "" if inside is None else _gb(seen.peak_device_bytes) + ("" if inside else " **above**")


def _share(percent: float) -> str:
    return f"{percent:.1f}% " + _goal(percent >= BOUND[0], percent >= BOUND[1])


def _goal(must: bool, aim: bool) -> str:
    return "(aim)" if aim and must else "(must)" if must else "**(missed)**"


def _yes(met: bool, yes: str, no: str) -> str:
    return yes if met else f"**{no}**"


def _bits(exact: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "not compared"}[exact]


def _work(seen: Streamed) -> str:
    return _flat(seen.workload)


def _gb(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


def _rate(value: float) -> str:
    return f"{value / 1e9:.3g} GB/s"


def _flat(text: str) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= 200 else flat[:199] + "…"


def _header(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _source(reports: Reports, names: Sequence[str]) -> Iterator[str]:
    """Where the figures come from; what has not been run says so, with the line that runs it."""
    there = [name for name in names if name in reports]
    missing = [name for name in names if name not in reports]
    if there:
        report = reports[there[0]]
        device = f"{report.device.name}, driver {report.device.driver}, " if report.device is not None else "a device on paper, "
        files = ", ".join(f"[`recipes/{name}`](../recipes/{name}/h200.json)" for name in there)
        yield ""
        medians = "" if names is VERIFIED else "; medians"
        yield f"{device}torch {report.environment.packages.get('torch')}{medians}. From {files}."
        for name in there:
            error = reports[name].error
            if error is not None:
                yield ""
                yield f"[`recipes/{name}`](../recipes/{name}/h200.json) was cut short ({_flat(error.message)}): it has what was measured by then."
    if missing:
        files = ", ".join(f"[`recipes/{name}`](../recipes/{name}/recipe.yaml)" for name in missing)
        yield ""
        yield f"Not run yet: {files}. The first lines of a recipe say how."


# -- the page -----------------------------------------------------------------------------------------------------------------------------------


def render(text: str, reports: Reports) -> str:
    """The page with its parts made again. Raises KeyError for a marker there is no part of."""

    def part(found: re.Match[str]) -> str:
        body = "\n".join(PARTS[found["name"]](reports)).strip("\n")
        return f"<!-- generated:{found['name']} -->\n{body}\n<!-- /generated -->"

    return MARK.sub(part, text)


def main() -> None:
    """Write docs/streaming.md and its pictures, or check them."""
    reports = read()
    made = render(PAGE.read_text(encoding="utf-8"), reports)
    files = {PAGE: made, **{PAGE.with_name(f"{name}.svg"): text for name, text in drawings(reports).items()}}
    if "--check" in sys.argv:
        stale = [path.name for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        sys.exit(0 if not stale else f"{', '.join(stale)}: not what the reports say: python -m recipes.streaming.table")
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
