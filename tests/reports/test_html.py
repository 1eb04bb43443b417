"""The page: nothing from outside, nothing that runs but what was written here, and nothing lost of hostile, missing or very large reports."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import tomllib
from dataclasses import fields, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuopt.core import codec
from gpuopt.core import result as r
from gpuopt.reports import html
from gpuopt.reports.content.blocks import View
from gpuopt.reports.scene import POINT, scene, to_script

ROOT = Path(__file__).parents[2]
ASSETS = resources.files("gpuopt.reports").joinpath("assets")
EVIL = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "<!--<script>",
    "]]>&lt;",
    "{{ 7 * 7 }}{% raw %}",
    "\ud800\udfff\ud800",
    "\u2028\u2029\u202e\x00\x1b[31m",
    "'\"><svg/onload=alert(1)>",
    "__proto__",
    "constructor.prototype",
]


class Parsed(HTMLParser):
    """Elements with their attributes, and what stands in each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for tag, a in self.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")

    @property
    def data(self) -> dict[str, object]:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("type") == "application/json"))


def evil_report(base: r.Report, text: str) -> r.Report:
    """Every text field that a model, a file or a child can fill."""
    run = base.runs[0]
    assert run.waterfall is not None
    bad = replace(
        run,
        model=text,
        backend=text,
        preset=text,
        precision=text,
        transforms=(text,),
        dims={text: 3},
        inputs=(text,),
        input_source="guess: " + text,
        input_mode=text,
        flop_source=text,
        flops_by_dtype={text: 1.0},
        notes=(text,),
        unknown_ops=(text,),
        clock=text,
        reproduce=text,
        waterfall=replace(run.waterfall, parts=(r.WaterfallPart(name=text, ms=3.0, detail=text),), method=text),
        roofline=tuple(replace(p, name=text, module=text, dtype=text, ceiling=text, note=text, bound=text) for p in run.roofline),
        modules=tuple(replace(m, name=text, module_class=text) for m in run.modules),
    )
    lost = r.Run(model=text, backend=text, status=r.Status.CRASH, reason=text, fix=text, reproduce=text)
    finding = r.Finding(
        code=text, severity=text, message=text, fix=text, rule=text, module=text, line=text, op=text, gain_low_ms=1.0, gain_high_ms=2.0
    )
    assert base.device is not None
    rows = tuple(replace(row, source=text) for row in base.device.ceilings.rows)
    odd = r.Ceiling(quantity=text, value=1e12, unit=text, kind=text, source=text)
    return replace(
        base,
        command=text,
        verb=text,
        runs=(bad, replace(bad, dims={text: 6}), lost),
        findings=(finding,),
        gates=(r.GateResult(name=text, passed=False, figure=text, limit=text, run=text),),
        device=replace(base.device, name=text, notes=(text,), ceilings=r.Ceilings(rows=(*rows, odd), notes=(text,))),
        tables={text: [{text: text}]},
        output=text,
        error=r.Failure(id=text, type=text, message=text, fix=text),
    )


def digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def assert_harmless(text: str) -> Parsed:
    page = Parsed(text)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"img", "iframe", "link", "object", "embed", "form", "base", "audio", "video", "image", "foreignobject", "use"})
    for tag, attributes in page.tags:
        loud = {
            name
            for name in attributes
            if name.startswith("on") or name in ("src", "srcset", "action", "style", "background", "xlink:href", "data")
        }
        assert not loud, (tag, loud)
        assert re.fullmatch(r"#[a-z0-9-]+", attributes.get("href") or "#x"), attributes
    runs = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    allowed = re.search(r"script-src ([^;]*);", page.policy)
    assert allowed
    assert allowed[1].split() == ([digest(text) for text in runs] or ["'none'"])
    assert [source.encode() for source in runs] in ([], [html._asset("vendor/d3.min.js").encode(), html._script().encode()])
    assert page.data
    return page


def test_the_page_holds_all_it_needs_and_allows_nothing_else(sample: tuple[str, r.Report], hostile: r.Report) -> None:
    for report in (sample[1], hostile):
        page = assert_harmless(html.render(report))
        assert page.policy.startswith("default-src 'none'; script-src ")
        assert "unsafe" not in page.policy
        assert "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'" in page.policy


def test_a_page_without_pictures_has_no_script_at_all(sample: tuple[str, r.Report]) -> None:
    empty = r.Report(schema_version=1, command="gpuopt backends", verb="backends", environment=sample[1].environment)
    page = assert_harmless(html.render(empty))
    assert "script-src 'none'" in page.policy


@pytest.mark.parametrize("text", EVIL)
def test_no_text_of_a_report_becomes_an_element_an_attribute_or_code(text: str) -> None:
    twin = ".".join(["harmless"] * (text.count(".") + 1))  # a dot in a module's name is a level of the tree
    harmless = Parsed(html.render(evil_report(profile(), twin)))
    page = assert_harmless(html.render(evil_report(profile(), text)))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]


def test_a_name_that_looks_like_a_template_is_a_name() -> None:
    text = html.render(evil_report(profile(), "{{ 7 * 7 }}"))
    assert "<h1>{{ 7 * 7 }}</h1>" in text


def profile() -> r.Report:
    return codec.read_json(r.Report, ROOT / "tests" / "golden" / "reports" / "profile.json")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(), max_size=60))
def test_whatever_a_name_is_the_data_of_the_pictures_read_back_as_it_was_cleaned(text: str) -> None:
    report = evil_report(profile(), text)
    page = html.render(report)
    page.encode("utf-8")
    data = assert_harmless(page).data
    assert data == json.loads(json.dumps(scene(report)))


def test_json_in_a_script_element_can_neither_end_it_nor_open_a_comment() -> None:
    text = to_script({"a": "</script><!--", "b": "\u2028&\ud800"})
    assert not set(text) & set("<>&\u2028")
    assert text.isascii()
    assert json.loads(text) == {"a": "</script><!--", "b": "\u2028&\ud800"}


def test_nothing_known_of_anything_is_still_a_page() -> None:
    def bare(cls: type, **given: object) -> object:
        nothing = {f.name: None for f in fields(cls) if "None" in str(f.type)}
        return cls(**{**nothing, **given})

    point = bare(r.RooflinePoint, name="op", module="", count=1, bound="unknown", ceiling="")
    module = bare(r.ModuleRow, name="", module_class="", depth=0)
    stats = bare(r.Stats, num_samples=0, median=0.0, mean=0.0, min=0.0, max=0.0)
    runs = [
        bare(r.Run, model="m", backend="b", roofline=(point,), modules=(module,)),
        bare(r.Run, model="m", backend="b", latency_ms=stats, waterfall=r.Waterfall(wall_ms=0.0, parts=(), unaccounted_ms=0.0)),
        bare(
            r.Run,
            model="m",
            backend="b",
            waterfall=r.Waterfall(wall_ms=0.0, parts=(r.WaterfallPart(name="idle", ms=0.0),), unaccounted_ms=0.0),
        ),
    ]
    finding = bare(r.Finding, code="", severity="", message="")
    environment = r.Environment(gpuopt="", python="", platform="")
    for chosen in ([], *[[run] for run in runs], runs):
        report = r.Report(schema_version=1, command="", verb="", environment=environment, runs=tuple(chosen), findings=(finding,))  # type: ignore[arg-type]
        text = html.render(report)
        assert_harmless(text)
        assert not re.search(r"\b(None|nan|inf)\b", text.split("<main")[1].split("<script")[0])


def test_no_figure_that_is_not_a_number_reaches_the_pictures() -> None:
    report = profile()
    run = report.runs[0]
    points = tuple(replace(p, time_ns=float("nan"), flops=float("inf")) for p in run.roofline)
    data = scene(replace(report, runs=(replace(run, roofline=points),)))
    at = POINT.index("flops")
    assert {row[at] for row in data["rooflines"][0]["points"]} == {None}


def test_ten_thousand_modules_fit_into_twenty_megabytes_and_tables_end_with_what_they_leave_out() -> None:
    report = profile()
    run = report.runs[0]
    modules = tuple(replace(run.modules[1], name=f"block_{i // 100}.layer_{i}", depth=1) for i in range(10_000))
    points = tuple(replace(run.roofline[i % 3], module=f"block_{i // 100}.layer_{i}") for i in range(10_000))
    text = html.render(replace(report, runs=(replace(run, modules=modules, roofline=points),)), View(top=10_000))
    assert len(text) < 20_000_000
    assert text.count("<tr") < 3 * html.MAX_ROWS
    assert f"{10_000 - (html.MAX_ROWS - 10)} more</span>" in text  # of the ops, with their sum
    assert re.search(r"\d+ more rows are not in this page&#39;s tables", text)
    data = Parsed(text).data
    assert len(data["rooflines"][0]["points"]) == 10_000  # type: ignore[index]
    assert len(data["trees"][0]["modules"]) == 10_000  # type: ignore[index]


def test_every_block_of_the_page_is_shown_once(sample: tuple[str, r.Report]) -> None:
    text = html.render(sample[1])
    if sample[0] == "profile":
        main = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        for title in ("Findings", "Where the time goes", "Roofline", "Modules", "Speed", "Machine"):
            assert main.count(f">{title}</h2>") == 1, title
        assert (
            main.index(">Findings</h2>")
            < main.index(">Where the time goes</h2>")
            < main.index(">Roofline</h2>")
            < main.index(">Speed</h2>")
        )


def test_findings_stand_by_what_they_give_back_with_the_measured_gain_beside_the_predicted() -> None:
    small = r.Finding(code="GPU1", severity="warning", message="small", gain_low_ms=1.0, gain_high_ms=2.0)
    large = r.Finding(
        code="GPU2", severity="info", message="large", gain_low_ms=8.0, gain_high_ms=12.0, measured_gain_ms=10.0, confirmed=True
    )
    wrong = r.Finding(code="GPU3", severity="error", message="broken")
    text = html.render(replace(profile(), findings=(small, large, wrong)))
    assert text.index("<b>GPU3</b>") < text.index("<b>GPU2</b>") < text.index("<b>GPU1</b>")
    assert "predicted gain 8.00 ms to 12.0 ms, 20% to 30% of a call" in text
    assert "measured 10.0 ms, as predicted" in text
    assert "no price" in text


def test_the_vendored_library_is_the_one_its_note_names() -> None:
    note = ASSETS.joinpath("vendor", "README.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|.*`([0-9a-f]{64})` \|$", note, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {p.name for p in ASSETS.joinpath("vendor").iterdir() if p.name.endswith(".js")}
    for name, sha256 in rows:
        source = ASSETS.joinpath("vendor", name).read_bytes()
        assert hashlib.sha256(source).hexdigest() == sha256
        assert ASSETS.joinpath("vendor", name.split(".")[0] + ".LICENSE").is_file()
        assert b"</script" not in source
        assert b"<!--" not in source


def test_every_asset_is_packed() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gpuopt.reports"]
    base = Path(str(ASSETS)).parent
    files = [str(p.relative_to(base)) for p in Path(str(ASSETS)).rglob("*") if p.is_file()]
    assert len(files) > 8
    assert [f for f in files if not any(fnmatch.fnmatch(f, p) and f.count("/") == p.count("/") for p in patterns)] == []


def test_the_pages_own_script_writes_no_markup_and_reaches_for_nothing() -> None:
    source = html._script()
    assert "</script" not in source
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        ".html(",
        "eval(",
        "new Function",
        "fetch(",
        "XMLHttpRequest",
        "import(",
        "http:",
        "https:",
    ):
        assert word not in source, word
