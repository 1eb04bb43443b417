"""Report JSON -> a PNG of the top of its page, as docs/report.png: `python tests/reports/screenshot.py REPORT.json docs/report.png`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from gpuopt.core import codec
from gpuopt.core.result import Report
from gpuopt.reports import html

WIDTH = 1200


def main(report: Path, picture: Path) -> None:
    """From the title to the end of the roofline, without the tables below it."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "report.html"
        file.write_text(html.render(codec.read_json(Report, report)), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light", reduced_motion="reduce")
        page.goto(file.as_uri())
        end = page.locator("[data-picture=roofline] .panels").bounding_box()
        assert end is not None
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + 2})
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
