"""Report -> one roofline as an SVG file that stands alone: light and dark, no script, no font, no reference to anything outside."""

from __future__ import annotations

from html import escape

from gpuopt.core.result import Report
from gpuopt.reports import figures as f
from gpuopt.reports.plots import HEIGHT, TONES, WIDTH, key, roofline, sources, unplaced
from gpuopt.reports.roofline import Picture, pictures

HEAD, FOOT, LEADING = 74, 26, 17

STYLE = """
svg{--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#e3e7ec}
@media(prefers-color-scheme:dark){svg{--bg:#0d1117;--fg:#e6edf3;--dim:#9198a1;--line:#262c34}}
.sheet{fill:var(--bg)}
text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--dim)}
.title{font-size:19px;font-weight:600;fill:var(--fg)}
.heading{font-weight:600;fill:var(--fg)}
.grid{stroke:var(--line)}
.name{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
.roof{fill:none;stroke:var(--fg);stroke-width:2}
.roof.sustained{stroke-width:1.5;stroke-dasharray:9 3 2 3}
.roof.spec{stroke:var(--dim);stroke-width:1.5;stroke-dasharray:5 4}
circle{stroke:var(--bg);stroke-width:1.2;fill-opacity:.78}
""" + "".join(f".t-{name}{{fill:{colour}}}" for name, colour in TONES.items())


def render(report: Report) -> str:
    """The first profiled run's ops; without one the runs, or the ceilings alone; without any a sentence that says so."""
    found = pictures(report)
    picture = found[0] if found else Picture(title="", points=(), compute=(), bandwidth=())
    drawn = roofline(picture)
    body = drawn.replace("<svg ", f'<svg y="{HEAD}" height="{HEIGHT}" ', 1).replace(' width="100%"', f' width="{WIDTH}"', 1)
    notes = (
        _notes(report, picture, len(found))
        if drawn
        else ["no op and no run here has a time, FLOPs and bytes, and no ceiling is known: nothing to draw"]
    )
    height = HEAD + (HEIGHT if drawn else 0) + FOOT + LEADING * len(notes)
    title, below = _title(report, picture)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>{escape(f'{title}, {below}'.strip(' ,'))}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="sheet" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
        f'<text x="24" y="56">{escape(below)}</text>',
        *_key(picture),
        body,
    ]
    top = height - FOOT - LEADING * (len(notes) - 1) + 8
    parts += [f'<text x="24" y="{top + LEADING * index}">{escape(note)}</text>' for index, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(report: Report, picture: Picture) -> tuple[str, str]:
    run = next((r for r in report.runs if r.roofline), report.runs[0] if report.runs else None)
    model = f.clean(run.model, 60) if run else "Ceilings"
    below = []
    if run and not picture.is_runs and run.latency_ms:
        below = [f.clean(run.backend, 40), f.clean(run.precision or "", 20), f"{f.ms(run.latency_ms.median)} a call", f.tflops(run.tflops)]
    if report.device:
        below.append(f.clean(report.device.name, 60))
    return f"Roofline of {model}" if run else model, " · ".join(part for part in below if part and part != f.MISSING)


def _key(picture: Picture) -> list[str]:
    parts, right = [], WIDTH - 24.0
    for name in ["area: share of time", *reversed(key(picture))]:
        if not key(picture) or (picture.is_runs and name.startswith("area")):
            continue
        text = name if name.startswith("area") else f"{name}-bound"
        right -= 7.4 * len(text)
        parts.append(f'<text x="{right:.0f}" y="56">{text}</text>')
        if name in TONES:
            right -= 12
            parts.append(f'<circle class="t-{name}" cx="{right:.0f}" cy="52" r="5"/>')
        right -= 20
    return parts


def _notes(report: Report, picture: Picture, number: int) -> list[str]:
    notes = []
    if picture.is_runs:
        notes.append("each point is a run by its median; bytes are op by op, before any fusion")
    if left := unplaced(picture):
        notes.append(left)
    notes += sources(picture)
    if number > 1:
        notes.append(f"the first of {number} profiled runs; the HTML report shows all")
    notes.append(f"gpuopt {f.clean(report.environment.gpuopt, 30)}: {f.clean(report.command, 140)}")
    return notes
