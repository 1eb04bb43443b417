"""The page in a real browser: pictures are drawn where figures say, answer to mouse and keyboard, ask nobody for anything, and run nothing of a report's."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.core import codec
from gpuopt.core import result as r
from gpuopt.reports import html

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

ROOT = Path(__file__).parents[2]
REAL = [
    "recipes/profile/bert_large-h200.json",
    "recipes/profile/resnet101-h200.json",
    "recipes/resnet101/h200.json",
    "recipes/device/h200.json",
]
BERT, RESNET, BENCH, DEVICE = REAL


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


Opener = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """report -> its page, opened from disk. At the end: nothing was asked for but the file, nothing was thrown, printed or popped up."""
    heard: list[str] = []
    asked: list[str] = []
    contexts: list[Any] = []

    def open_page(report: r.Report, *, width: int = 1280, height: int = 900, **options: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(html.render(report), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"thrown: {error}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_load_state("load")
        return page

    open_page.heard, open_page.asked = heard, asked  # type: ignore[attr-defined]
    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert {url.rpartition("/")[2] for url in asked} <= {"report.html"}


def read(path: str) -> r.Report:
    return codec.read_json(r.Report, ROOT / path)


def profile() -> r.Report:
    return read("tests/golden/reports/profile.json")


def sweep() -> r.Report:
    report = read("tests/golden/reports/bench.json")
    base = report.runs[0]
    runs = [
        replace(base, backend=b, dims={"N": n}, batch=n, samples_per_s=k * n, tflops=k * n / 1000, relative=None)
        for b, k in (("eager", 50.0), ("inductor", 120.0))
        for n in (1, 4, 16, 64)
    ]
    lost = r.Run(model=base.model, backend="eager", precision="fp16", dims={"N": 256}, status=r.Status.OOM_DEVICE, reason="out of memory")
    return replace(report, runs=(*runs, lost), gates=())


def points(page: Any) -> list[tuple[float, float, float]]:
    """(x, y, radius) of the circles of the roofline's last panel: FLOP/s over intensity."""
    return page.evaluate(
        """() => [...[...document.querySelectorAll('[data-picture=roofline] .panels svg')].at(-1).querySelectorAll('circle.point')]
        .map(c => ['cx', 'cy', 'r'].map(a => Number(c.getAttribute(a))))"""
    )


@pytest.mark.parametrize("path", REAL)
def test_a_real_report_is_drawn_without_a_word_on_the_console(path: str, opened: Opener) -> None:
    report = read(path)
    page = opened(report)
    drawn = page.locator("[data-picture=roofline] circle.point").count()
    if any(run.roofline for run in report.runs):
        placed = [p for p in report.runs[0].roofline if p.time_ns and p.bytes and p.flops is not None]
        assert drawn == len(placed) > 100
        assert page.locator("[data-picture=treemap] rect.tile").count() > 30
    elif report.verb == "bench":
        assert drawn == sum(run.latency_ms is not None for run in report.runs)
    else:
        assert page.locator("svg.roofline line.roof").count() > 10  # the ceilings alone, without script


@pytest.mark.parametrize("width", [375, 1000])
def test_no_page_is_wider_than_its_window(width: int, opened: Opener, hostile: r.Report) -> None:
    for report in (read(BERT), sweep(), profile(), hostile):
        page = opened(report, width=width)
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_a_point_lies_where_its_logarithms_say_and_one_at_its_peak_on_the_ceiling(opened: Opener) -> None:
    base = profile().runs[0].roofline[0]
    at = [(1.0, 1e12, 4e6), (10.0, 1e13, 3e6), (100.0, 1e14, 2e6), (1000.0, 800e12, 1e6)]
    made = [replace(base, name=f"op{x:g}", time_ns=t, flops=s * t / 1e9, bytes=s * t / 1e9 / x, intensity=x) for x, s, t in at]
    page = opened(replace(profile(), runs=(replace(profile().runs[0], roofline=tuple(made)),)))
    (x1, _, r1), (x10, y10, _), (x100, y100, _), (x1000, y1000, r1000) = points(page)  # longest first, as given
    assert x10 - x1 == pytest.approx(x100 - x10, abs=0.01)
    assert x1000 - x100 == pytest.approx(x100 - x10, abs=0.01)
    assert y100 - y1000 == pytest.approx((y10 - y100) * math.log10(8), abs=0.01)
    assert r1**2 / r1000**2 == pytest.approx(4.0, rel=0.02)
    peak = page.locator("[data-picture=roofline] line.roof.measured").last
    assert float(peak.get_attribute("y1")) == float(peak.get_attribute("y2")) == pytest.approx(y1000, abs=0.01)
    slope = page.locator("[data-picture=roofline] line.roof.measured").first
    ridge_x, ridge_y = float(slope.get_attribute("x2")), float(slope.get_attribute("y2"))
    assert ridge_y == pytest.approx(y1000, abs=0.01)
    assert ridge_x == pytest.approx(x100 + (x1000 - x100) * math.log10(800e12 / 4000e9 / 100), abs=0.01)


def test_the_filter_leaves_the_points_and_rows_of_one_module_and_says_how_much_of_the_time_they_are(opened: Opener) -> None:
    report = read(BERT)
    ops = [p for p in report.runs[0].roofline if p.time_ns]
    chosen = [p for p in ops if "encoder.layer.7.attention" in p.module]
    page = opened(report)
    page.get_by_role("searchbox").fill("layer.7. attention")
    assert page.locator("[data-picture=roofline] circle.point").count() == len(chosen) > 2
    assert page.locator("table.ops tbody tr").count() == len(chosen)
    share = 100 * sum(p.time_ns or 0 for p in chosen) / sum(p.time_ns or 0 for p in ops)
    assert f"{len(chosen)} of {len(ops)} ops, {share:.1f}% of the time" in page.locator("[data-picture=roofline] .status").inner_text()
    page.get_by_role("searchbox").fill("no such module")
    assert page.locator("[data-picture=roofline] circle.point").count() == 0


def test_bounds_are_switched_and_points_gathered_by_name_and_module(opened: Opener) -> None:
    ops = [p for p in read(BERT).runs[0].roofline if p.time_ns and p.bytes and p.flops is not None]
    page = opened(read(BERT))
    chip = page.get_by_role("button", name="memory-bound")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert page.locator("[data-picture=roofline] circle.point").count() == sum(p.bound != "memory" for p in ops)
    chip.click()
    page.locator("[data-picture=roofline] select").select_option("module")
    assert page.locator("[data-picture=roofline] circle.point").count() == len({p.module for p in ops})
    page.locator("[data-picture=roofline] select").select_option("name")
    assert page.locator("[data-picture=roofline] circle.point").count() == len({(p.name, p.bound, p.dtype, p.flops == 0) for p in ops})
    total = sum(p.time_ns or 0 for p in ops if p.name == "aten.addmm" and p.bound == "compute")
    assert f"{total / 1e6:.1f} ms" in page.locator("table.ops tbody tr").first.inner_text()


def test_a_point_under_the_mouse_tells_op_module_time_flops_bytes_and_percent(opened: Opener) -> None:
    page = opened(profile())
    circle = page.locator("[data-picture=roofline] circle.point").first
    circle.scroll_into_view_if_needed()
    box = circle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = page.locator(".tip").inner_text()
    for text in (
        "aten.convolution ×23",
        "layer3.5.conv2",
        "9.00 ms",
        "3.60 TFLOP",
        "4.00 GB",
        "900 FLOP/B",
        "400 TFLOP/s",
        "50% of fp16 measured",
        "4.50 ms",
        "compute",
        "float16",
    ):
        assert text in told, text
    page.mouse.move(5, 5)
    assert page.locator(".tip").is_hidden()


def test_the_keyboard_walks_the_points_and_the_modules_and_says_what_it_finds(opened: Opener) -> None:
    page = opened(profile())
    page.locator("[data-picture=roofline] svg[tabindex]").last.focus()
    page.keyboard.press("ArrowRight")
    assert "aten.convolution in layer3.5.conv2, 9.00 ms, 50% of fp16 measured" in page.locator("[aria-live]").inner_text()
    page.keyboard.press("ArrowRight")
    assert "aten.batch_norm" in page.locator("[aria-live]").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()
    tile = page.get_by_role("button", name=re.compile("^layer1, Sequential"))
    tile.focus()
    page.keyboard.press("Enter")
    assert page.locator("button.crumb").all_inner_texts() == ["resnet101", "layer1"]
    page.keyboard.press("Escape")
    assert page.locator("button.crumb").all_inner_texts() == ["resnet101"]


def test_areas_of_the_treemap_are_times_and_a_click_goes_in_and_a_crumb_out(opened: Opener) -> None:
    rows = [r.ModuleRow(name="", module_class="Net", depth=0, time_ns=8e6, flops=None, bytes=None)]
    for name, time, pct in (("big", 6e6, 90.0), ("small", 2e6, None)):
        rows.append(r.ModuleRow(name=name, module_class="Block", depth=1, time_ns=time, flops=1e9, bytes=1e6, pct_of_ceiling=pct))
    op = replace(profile().runs[0].roofline[0], name="mm", module="big.inner.fc", time_ns=4e6, floor_ns=1e6, pct_of_ceiling=25.0)
    page = opened(replace(profile(), runs=(replace(profile().runs[0], modules=tuple(rows), roofline=(op,)),)))

    def area(name: str) -> float:
        box = page.locator(f"[data-picture=treemap] rect[aria-label^='{name}']").bounding_box()
        return box["width"] * box["height"]

    assert area("big") / area("small") == pytest.approx(3.0, rel=0.05)
    assert page.locator("rect[aria-label^='small']").get_attribute("class") == "tile missing"
    page.locator("rect[aria-label^='big']").click(position={"x": 30, "y": 8})
    assert page.locator("button.crumb").all_inner_texts() == ["resnet101", "big"]
    labels = page.locator("[data-picture=treemap] rect.tile").evaluate_all("rects => rects.map(r => r.getAttribute('aria-label'))")
    assert any(label.startswith("inner.fc, 4.00 ms, 50% of the time, 25% of its ceiling") for label in labels)
    assert any(label.startswith("not broken down, 2.00 ms") for label in labels)
    page.locator("button.crumb").first.click()
    assert area("big") > 0


def test_a_module_of_the_treemap_filters_the_roofline(opened: Opener) -> None:
    page = opened(read(BERT))
    page.get_by_role("button", name=re.compile(r"^3, BertLayer")).click(position={"x": 20, "y": 8})
    page.get_by_role("button", name="These ops on the roofline").click()
    assert page.get_by_role("searchbox").input_value() == "encoder.layer.3"
    assert page.locator("[data-picture=roofline] circle.point").count() >= 12


def test_columns_sort_and_the_rest_of_the_ops_is_a_click_away(opened: Opener) -> None:
    page = opened(read(RESNET))
    page.get_by_role("button", name="bytes", exact=True).click()
    cells = page.locator("table.ops tbody tr td:nth-child(7)").all_inner_texts()
    values = [float(text.split()[0]) * {"GB": 1e9, "MB": 1e6}[text.split()[1]] for text in cells]
    assert values == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text() == "bytes"
    page.get_by_role("button", name=re.compile("^Show 100 of")).click()
    assert page.locator("table.ops tbody tr").count() == 115


def test_zooming_moves_the_points_and_resetting_brings_them_back(opened: Opener) -> None:
    page = opened(profile())
    before = points(page)
    page.get_by_role("button", name="Zoom in").click()
    page.wait_for_timeout(50)
    assert points(page) != before
    page.get_by_role("button", name="Reset view").click()
    page.wait_for_timeout(50)
    assert [tuple(map(round, p)) for p in points(page)] == [tuple(map(round, p)) for p in before]


def test_sizes_are_drawn_as_curves_under_the_ceilings_and_what_was_lost_is_marked(opened: Opener) -> None:
    page = opened(sweep())
    panels = page.locator("[data-picture=curves] .panels svg")
    assert panels.count() == 2
    assert [panels.nth(i).locator("circle").count() for i in range(2)] == [8, 8]
    assert panels.nth(1).locator("line.roof").count() == 2
    assert page.locator("[data-picture=curves] svg text", has_text="×").count() == 2
    page.locator("#curves summary").click()
    assert "oom device" in page.locator("#curves table").first.inner_text()


def test_nothing_of_a_hostile_report_runs_or_is_lost(opened: Opener, hostile: r.Report) -> None:
    texts = [
        "</script><script>window.pwned=1</script>",
        "<img src=x onerror=window.pwned=1>",
        "javascript:window.pwned=1",
        "\ud800",
        "__proto__.x",
        "constructor",
    ]
    for text in (*texts, hostile.runs[0].model):
        run = hostile.runs[0]
        row = replace(run.modules[0], module_class=text)
        rows = (row, replace(row, name=f"a.{text}", depth=1, time_ns=1e6))
        bad = replace(run, model=text, backend=text, roofline=(replace(run.roofline[0], name=text, module=text, note=text),), modules=rows)
        page = opened(replace(hostile, runs=(bad, replace(bad, backend=text + "2")), command=text))
        page.locator("[data-picture=roofline] circle.point").first.hover(force=True)
        page.locator("[data-picture=treemap] rect.tile").first.hover(force=True)
        assert page.evaluate("[window.pwned, Object.prototype.x, document.images.length]") == [None, None, 0]
        assert page.locator("script").count() == 3
        if text.isprintable():
            assert page.locator("h1").inner_text() == text.strip()


def test_the_policy_stops_what_a_hole_would_let_in(opened: Opener) -> None:
    page = opened(profile())
    holes = (
        "document.body.innerHTML = '<img src=x onerror=window.pwned=1>'",
        "document.body.setAttribute('onclick', 'window.pwned=1')",
        "const s = document.createElement('script'); s.text = 'window.pwned=1'; document.body.append(s)",
    )
    for hole in holes:
        with pytest.raises(playwright.Error, match="requires 'Trusted"):
            page.evaluate(f"() => {{ {hole} }}")
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.com/x.png'}))")
    blocked = page.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'blocked')")
    assert (page.evaluate("window.pwned"), blocked) == (None, "blocked")
    assert sum("Content Security Policy" in line for line in opened.heard) >= 2  # type: ignore[attr-defined]
    assert all(url.endswith(("report.html", "x.png")) for url in opened.asked)  # type: ignore[attr-defined]
    opened.heard.clear()  # type: ignore[attr-defined]
    opened.asked.clear()  # type: ignore[attr-defined]


def test_without_script_the_page_has_the_roofline_and_every_table(opened: Opener) -> None:
    page = opened(profile(), java_script_enabled=False)
    assert page.locator("svg.roofline circle").count() == 3
    assert page.locator("svg.roofline").is_visible()
    for name in ("Findings", "Where the time goes", "Speed"):
        assert page.get_by_role("heading", name=name, exact=True).is_visible()
    assert "aten.convolution" in page.locator("#roofline table").inner_text()


def luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: str, opened: Opener) -> None:
    finding = r.Finding(
        code="X1", severity="warning", message="slow", fix="do", gain_low_ms=1.0, gain_high_ms=2.0, measured_gain_ms=3.0, confirmed=False
    )
    page = opened(replace(read("tests/golden/reports/bench.json"), findings=(finding,)), color_scheme=scheme)
    found = page.evaluate(
        """() => [...document.querySelectorAll('h1, h2, p, td, th, dt, dd, li, span, a, button, code')].filter(e => e.offsetParent && e.textContent.trim()).map(e => {
            let back = e; while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(back ?? document.body).backgroundColor, e.textContent.trim().slice(0, 40)];
        })"""
    )
    assert len(found) > 100
    for ink, paper, text in found:
        high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper, text)
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) > 0.5) == (scheme == "light")


def test_what_is_drawn_has_a_name_and_what_is_pressed_too(opened: Opener) -> None:
    for report in (profile(), sweep(), read("tests/golden/reports/bench.json")):
        page = opened(report)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('svg:not([aria-hidden]), button, input, select, [tabindex]')]
            .filter(e => !e.closest('[role=img]') || e.matches('[role=img]'))
            .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML.slice(0, 90))"""
        )
        assert nameless == []
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == 1
        for picture in page.locator("section:has([data-picture])").all():
            assert picture.locator("table").count() >= 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))


def test_paper_gets_dark_text_on_white_without_controls_and_all_pictures(opened: Opener) -> None:
    page = opened(profile(), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("nav").is_hidden()
    assert page.locator("[data-picture=roofline] .tools").is_hidden()
    assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.1
    assert page.locator("[data-picture=roofline] svg").first.is_visible()
    assert len(page.pdf()) > 20_000


@pytest.mark.slow
def test_ten_thousand_modules_stay_quick_to_open_and_to_search(opened: Opener) -> None:
    run = profile().runs[0]
    modules = [replace(run.modules[0], name="", depth=0, time_ns=1e9)]
    modules += [replace(run.modules[1], name=f"block{i // 100}.layer{i % 100}", depth=2, time_ns=1e5) for i in range(10_000)]
    ops = [
        replace(
            run.roofline[i % 2],
            module=f"block{i // 100}.layer{i % 100}",
            time_ns=1e5 * (1 + i % 7),
            flops=1e9 * (1 + i % 11) if i % 3 else 0.0,
        )
        for i in range(10_000)
    ]
    page = opened(replace(profile(), runs=(replace(run, modules=tuple(modules), roofline=tuple(ops)),)))
    took = page.evaluate("performance.timing.loadEventEnd - performance.timing.responseEnd")
    assert took < 10_000
    assert page.locator("[data-picture=roofline] circle.point").count() == 10_000
    search = """() => { const box = document.querySelector('input[type=search]'), start = performance.now();
        box.value = 'block42'; box.dispatchEvent(new Event('input')); return performance.now() - start; }"""
    assert page.evaluate(search) < 3_000
    assert page.locator("[data-picture=roofline] circle.point").count() == 100
    assert page.evaluate("document.querySelectorAll('*').length") < 40_000
