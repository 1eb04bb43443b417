"""Report -> one HTML file that opens offline: pictures to explore, and the same figures as tables for paper, screen readers and browsers without script.

Everything that comes from a model, a file or a child is hostile: the template escapes it, the data of the pictures stand in a JSON block that nothing can end early,
and the policy in the head lets nothing run, load or be sent but the scripts and the style written here, each by its digest.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import jinja2
from markupsafe import Markup

from gpuopt.core.result import Report, Run, Status
from gpuopt.core.streamed import StreamReport
from gpuopt.reports import batches, crossing, frontier, plots, roofline, strips
from gpuopt.reports import figures as f
from gpuopt.reports.content import changes, naming, streaming
from gpuopt.reports.content.blocks import Bars, Block, Cell, Facts, Messages, Page, Roofline, Steps, Table, View
from gpuopt.reports.page import page
from gpuopt.reports.scene import profiled, scene, to_script

MAX_ROWS = 250
"""Rows of a table that stands in the page; what is beyond is said, and lies in the pictures and the JSON."""
SCRIPTS = ("base", "roofline", "ops", "treemap", "curves", "main")
"""Files of the page's own script, in the order they need each other."""


def render(report: Report, view: View | None = None) -> str:
    """The same report gives the same bytes."""
    view = view or View()
    shown = page(report, replace(view, by=view.by or "all", top=min(view.top, MAX_ROWS - 10)))
    data = scene(report)
    has_pictures = bool(data["rooflines"] or data["trees"] or data["curves"])
    rooflines = [_fallback(picture) for picture in roofline.pictures(report)]
    style = _style()
    runs = [_asset("vendor/d3.min.js"), _script()] if has_pictures else []
    text = _template().render(
        policy=_policy(style, runs),
        title=_title(report),
        page=shown,
        device=", ".join(f.clean(device.name, 60) for device in report.devices)
        or (f.clean(report.device.name, 60) if report.device else ""),
        tiles=_tiles(report),
        sections=_sections(report, shown),
        falls=strips.falls(report),
        fall_notes=_fall_notes(shown),
        strips=strips.strips(report),
        findings=strips.findings(report),
        rooflines=rooflines,
        roofline_notes=list(dict.fromkeys(note for picture in rooflines for note in picture.notes)),
        curves=_curve_table(report),
        devices=Markup(crossing.svg(report)),
        frontier=Markup(frontier.svg(report)),
        style=Markup(style),
        scripts=[Markup(source) for source in runs],
        scene=Markup(to_script(data)),
    )
    return text.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gpuopt.reports", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["share"] = lambda value: strips.percent(value)
    environment.filters["command"] = lambda text: text.startswith(("gpuopt ", "pip ", "--"))
    environment.tests["long"] = lambda text: len(text) > 60
    environment.tests["tree"] = lambda text: text[:1] in ("├", "└", "│")
    environment.globals["kind"] = lambda block: type(block).__name__
    return environment.get_template("page.html.j2")


@functools.cache
def _asset(name: str) -> str:
    return resources.files("gpuopt.reports").joinpath("assets", *name.split("/")).read_text(encoding="utf-8")


def _script() -> str:
    body = "\n".join(_asset(f"script/{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}\n}})();\n'


def _style() -> str:
    colours = "".join(f".t-{name}{{background:{c};fill:{c}}}" for name, c in plots.TONES.items())
    return _asset("report.css") + colours


def _policy(style: str, scripts: Iterable[str]) -> str:
    allowed = " ".join(f"'{_digest(source)}'" for source in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _title(report: Report) -> str:
    models = list(dict.fromkeys(f.clean(run.model, 60) for run in report.runs))
    if report.verb == "compare" and (pairs := changes.of_report(report)):
        told = [f.clean(f"{pair.before} -> {pair.after}" if pair.before != "before" else pair.run, 80) for pair in pairs]
        return told[0] + (f" and {len(told) - 1} more" if len(told) > 1 else "")
    if not models:
        return f.clean(report.device.name, 60) if report.device and report.verb == "device" else f.clean(f"gpuopt {report.verb}", 60)
    return ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """A figure to be seen first."""

    name: str
    value: str
    beside: str = ""
    tone: str = ""
    meter: float | None = None


def _tiles(report: Report) -> list[_Tile]:
    """Of the only run that worked, or of the fastest; none where several models are told of."""
    if report.streamed is not None:
        return _streamed(report.streamed)
    timed = [run for run in report.runs if run.status == Status.OK and run.latency_ms is not None]
    if not timed or naming.several_models(report):
        return []
    run = max(timed, key=lambda r: r.samples_per_s or 0.0)
    stats = run.latency_ms
    assert stats is not None
    half = ""
    if stats.ci95_low is not None and stats.ci95_high is not None and stats.median > 0:
        half = f"±{f.percent((stats.ci95_high - stats.ci95_low) / 2 / stats.median * 100)}, ".replace("±<", "<±")
    tiles = [
        _Tile(
            name=f"a call, fastest of {len(timed)}" if len(timed) > 1 else "a call",
            value=f.ms(stats.median),
            beside=f"{half}{f.plural(stats.num_samples, 'sample')}",
        )
    ]
    if run.samples_per_s is not None:
        tiles.append(_Tile(name="samples a second", value=f.rate(run.samples_per_s), beside=naming.dims_label(run)))
    if run.tflops is not None:
        tiles.append(_Tile(name="arithmetic", value=f.tflops(run.tflops), beside=naming.compute_quantity(run) or ""))
    for name, value in (
        ("of measured peak", run.pct_of_measured),
        ("of sustained peak", run.pct_of_sustained),
        ("of roofline", run.pct_of_roofline),
    ):
        if value is not None:
            tiles.append(_Tile(name=name, value=f.percent(value), meter=value / 100))
    if run.peak_bytes is not None:
        tiles.append(_Tile(name="peak memory", value=f.memory(run.peak_bytes)))
    tiles.append(_verified(run))
    return tiles


def _streamed(told: StreamReport) -> list[_Tile]:
    """Of all budgets, the worst in each respect."""
    seen = [row.measured for row in told.rows if row.measured is not None]
    if not seen:
        return []
    least = min(one.pct_of_bound for one in seen)
    off = max(abs(one.median_ms / one.plan.predicted_ms - 1) for one in seen)
    lowest, furthest = ("lowest of ", "largest of ") if len(seen) > 1 else ("", "")
    each = f.plural(len(seen), "budget")
    bits = {one.exact for one in seen}
    same = ("no", "bad") if False in bits else ("bit for bit", "good") if bits == {True} else ("not compared", "warn")
    return [
        _Tile(name="of the bound", value=f.percent(least), beside=f"{lowest}{each}", tone="good" if least >= streaming.CLOSE_PCT else "warn"),
        _Tile(
            name="off the prediction", value=f.percent(100 * off), beside=f"{furthest}{each}", tone="good" if 100 * off <= streaming.TRUE_PCT else "warn"
        ),
        _Tile(name="same model", value=same[0], tone=same[1]),
    ]  # fmt: skip


def _verified(run: Run) -> _Tile:
    if run.accuracy is None:
        return _Tile(name="same model", value="not verified", tone="warn")
    if not run.accuracy.passed:
        return _Tile(name="same model", value="no", tone="bad")
    told = f"error {f.error(run.accuracy.relative_rmse)}" if run.accuracy.relative_rmse is not None else ""
    return _Tile(name="same model", value="verified", beside=told, tone="good")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """A heading of the page: a picture, tables, or both."""

    id: str
    title: str
    figure: str = ""
    blocks: tuple[Block, ...] = ()


def _sections(report: Report, shown: Page) -> list[_Section]:
    """The page's blocks under the pictures they belong to; what is not known here stays a section of its own, in its place."""
    first = {
        "verdict": "Before and after",
        "search": "What was tried",
        "devices": "Devices",
        "frontier": "Frontier",
        "findings": "Findings",
        "time": "Where the time goes",
        "roofline": "Roofline",
        "modules": "Modules",
        "speed": "Speed",
    }
    blocks: dict[str, list[Block]] = {name: [] for name in (*first, "curves")}
    rest: list[Block] = []
    machine: list[Block] = []
    for block in map(_trimmed, (*shown.blocks, *shown.next)):
        home = _home(block)
        if home == "frontier" and block.title.startswith("Frontier, drawn") and frontier.svg(report):
            home = "drawn"
        if home == "time" and isinstance(block, Table) and not block.notes and strips.falls(report) is not None:
            home = "drawn"  # the picture has the same figures
        if home != "drawn":
            (blocks[home] if home in blocks else machine if home == "machine" else rest).append(block)
    has = {
        "verdict": False,
        "search": False,
        "devices": bool(crossing.svg(report)),
        "frontier": bool(frontier.svg(report)),
        "findings": bool(report.findings and strips.findings(report)),
        "time": strips.falls(report) is not None,
        "roofline": bool(roofline.pictures(report)),
        "modules": bool(profiled(report)),
        "speed": strips.strips(report) is not None,
        "curves": bool(batches.curves(report)),
    }
    titles = {**first, "curves": "Over sizes"}
    if not any(run.roofline for run in report.runs):  # runs as points explain the times, so they follow them
        titles["roofline"] = titles.pop("roofline")
    if report.search is not None:  # the finalists are the answer; the trace is the input's, and says so
        titles = {name: titles[name] for name in ("verdict", "search", "speed", *titles)}
        titles["time"] += " in the model as it is"
    sections = [
        _Section(id=name, title=titles[name], figure=name if has[name] else "", blocks=tuple(blocks[name]))
        for name in titles
        if has[name] or blocks[name]
    ]
    sections += [_Section(id=f"part-{index}", title=block.title, blocks=(block,)) for index, block in enumerate(rest)]
    if machine:
        sections.append(_Section(id="machine", title="Machine", blocks=tuple(machine)))
    return sections


def _home(block: Block) -> str:
    """Which section a block belongs to; `drawn` where a picture says all of it, "" for a section of its own."""
    match block:
        case Bars():
            return "drawn" if block.title.startswith("Where the time goes") else ""
        case Roofline():
            return "drawn"
        case Messages() if block.title == "Findings":
            return "drawn"
        case Table() | Facts() | Messages() | Steps():
            for start, home in _HOMES:
                if block.title.startswith(start):
                    return home
    return ""


def _fall_notes(shown: Page) -> list[str]:
    """What the page says of its waterfalls, but for the wall time, which stands beside the bar; of several, each note says whose it is."""
    bars = [block for block in shown.blocks if isinstance(block, Bars) and _home(block) == "drawn"]
    notes = dict.fromkeys(note for block in bars for note in block.notes[1:])
    if len(bars) < 2:
        return list(notes)
    told = []
    for note in notes:
        having = [block.title.partition(": ")[2] for block in bars if note in block.notes]
        told.append(note if len(having) == len(bars) else f"{', '.join(having)}: {note}")
    return told


_HOMES = (
    ("Over batch", "devices"),
    ("Frontier", "frontier"),
    ("Ops that changed", "modules"),
    ("Kernels that came", "modules"),
    ("Lines that changed", "modules"),
    ("Ops by name", "modules"),
    ("Ops", "roofline"),
    ("Kernels", "modules"),
    ("Lines", "modules"),
    ("Modules", "modules"),
    ("Speed", "speed"),
    ("Costs", "speed"),
    ("Not ranked", "speed"),
    ("No result", "speed"),
    ("Where the difference lies", "time"),
    ("Before and after", "verdict"),
    ("What was tried", "search"),
    ("What failed", "search"),
    ("What it cost", "search"),
    ("Inputs", "machine"),
    ("Device", "machine"),
    ("Ceilings", "machine"),
)


def _trimmed(block: Block) -> Block:
    if not isinstance(block, Table) or len(block.rows) <= MAX_ROWS:
        return block
    note = f"{len(block.rows) - MAX_ROWS} more rows are not in this page's tables: the report's JSON has all"
    return replace(block, rows=block.rows[:MAX_ROWS], notes=(*block.notes, note))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fallback:
    """A roofline without script."""

    title: str
    svg: Markup
    key: tuple[str, ...]
    notes: tuple[str, ...]


def _fallback(picture: roofline.Picture) -> _Fallback:
    notes = []
    if picture.is_runs:
        notes.append("each point is a run by its median; bytes are op by op, before any fusion")
    if left := plots.unplaced(picture):
        notes.append(left)
    drawn = plots.roofline(picture)
    if not drawn:
        notes.append("no op has a time, a FLOP count and a byte count, so there is nothing to draw")
    notes += plots.sources(picture)
    return _Fallback(title=picture.title, svg=Markup(drawn), key=tuple(plots.key(picture)), notes=tuple(notes))


def _curve_table(report: Report) -> Sequence[tuple[str, str, list[list[Cell]]]]:
    """(label, dimension, rows of size, samples/s, TFLOP/s, of measured) a curve."""
    found = []
    for curve in batches.curves(report):
        rows = [
            [
                Cell(str(size)),
                Cell(f.ms(run.latency_ms.median if run.latency_ms else None)),
                Cell(f.rate(run.samples_per_s)),
                Cell(f.tflops(run.tflops)),
                Cell(f.percent(run.pct_of_measured)),
            ]
            for size, run in curve.runs
        ]
        rows += [
            [Cell(str(size)), Cell(run.status.value.replace("_", " "), "bad"), Cell(f.MISSING), Cell(f.MISSING), Cell(f.MISSING)]
            for size, run in curve.lost
        ]
        found.append((curve.label, f.clean(curve.dim, 20), rows))
    return found
