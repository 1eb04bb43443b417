"""Report -> one self-contained HTML page: roofline plot, waterfall, tables. No script, no external resource."""

from __future__ import annotations

from html import escape

from gpuopt.core.result import Report
from gpuopt.reports.content.blocks import Bars, Block, Cell, Facts, Message, Messages, Roofline, Steps, Table, View
from gpuopt.reports.page import page
from gpuopt.reports.plots import TONES, roofline

_STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#656d76;--line:#d8dee4;--soft:#f6f8fa;--good:#1a7f37;--warn:#9a6700;--bad:#cf222e;--link:#0969da}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#8d96a0;--line:#30363d;--soft:#161b22;--good:#3fb950;--warn:#d29922;--bad:#f85149;--link:#4493f8}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1320px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:17px;margin:36px 0 10px}
h2 small{font-weight:400;color:var(--dim);margin-left:10px;font-size:14px}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;background:var(--soft);padding:1px 5px;border-radius:4px;overflow-wrap:anywhere}
.command{color:var(--dim)}
.answer{margin:22px 0 0;padding:0;list-style:none;border-left:4px solid var(--line)}
.answer li{padding:5px 16px}
.answer li:first-child{font-size:19px}
ul.told{margin:0;padding:0;list-style:none}
ul.told li{padding:6px 0;border-top:1px solid var(--line)}
.fix{display:block;color:var(--dim)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th{font-weight:500;color:var(--dim);text-align:left;white-space:nowrap}
th,td{padding:6px 15px 6px 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
td.long{white-space:normal;min-width:220px}
td.tree{white-space:pre;font-family:ui-monospace,Menlo,monospace;font-size:13px}
.r{text-align:right;white-space:nowrap}
.good{color:var(--good)}.warn,.warning{color:var(--warn)}.bad,.error{color:var(--bad)}.dim{color:var(--dim)}.strong{font-weight:650}
.error>b,.bad{font-weight:650}
.meter{display:inline-block;width:64px;height:8px;margin-right:8px;background:var(--line);border-radius:4px;overflow:hidden;vertical-align:middle}
.meter i{display:block;height:100%;background:#3987e5}
.note{color:var(--dim);font-size:13px;margin:6px 0 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0}
dt{color:var(--dim)}dd{margin:0}
.fall{display:grid;grid-template-columns:max-content minmax(160px,1fr) max-content max-content minmax(0,max-content);gap:5px 14px;align-items:center;font-size:14px;font-variant-numeric:tabular-nums}
.fall .bar{position:relative;height:18px;background:var(--soft);border-radius:3px}
.fall .bar i{position:absolute;top:0;bottom:0;border-radius:3px;min-width:2px}
svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
svg .axis{stroke:var(--line)}
svg .name{fill:var(--fg);paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
svg .roof{fill:none;stroke:var(--fg);stroke-width:2}svg .roof.spec{stroke:var(--dim);stroke-width:1.5;stroke-dasharray:5 4}
svg circle{stroke:var(--bg);stroke-width:2}
svg circle:hover{stroke:var(--fg)}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;color:var(--dim);font-size:13px;margin:6px 0 0}
.key i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px}
footer{margin-top:48px;color:var(--dim);font-size:13px}
""" + "".join(f".t-{name}{{background:{colour};fill:{colour}}}" for name, colour in TONES.items())


def render(report: Report, view: View | None = None) -> str:
    """Everything that comes from a model, a file or a child is escaped; the policy in the head forbids scripts and fetches besides."""
    shown = page(report, view)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escape(shown.title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(shown.title)}</h1>",
    ]
    if shown.subtitle:
        parts.append(f'<p class="command"><code>{escape(shown.subtitle)}</code></p>')
    if shown.headline:
        parts.append('<ul class="answer">' + "".join(_message(item) for item in shown.headline) + "</ul>")
    parts += [_block(block) for block in (*shown.blocks, *shown.next)]
    parts += [f"<footer>{escape(shown.footer)}</footer>", "</main>", "</body>", "</html>"]
    return "\n".join(parts) + "\n"


def _message(message: Message) -> str:
    code = f"<b>{escape(message.code)}</b> " if message.code else ""
    fix = f'<span class="fix">→ {_command(message.fix)}</span>' if message.fix else ""
    return f'<li><span class="{escape(message.severity)}">{code}{escape(message.text)}</span>{fix}</li>'


def _command(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text.startswith(("gpuopt ", "pip ", "--")) else escape(text)


def _block(block: Block) -> str:
    match block:
        case Table():
            return _section(block.title, _table(block), block.notes, block.beside)
        case Facts():
            rows = "".join(f"<dt>{escape(name)}</dt><dd>{_cell(cell)}</dd>" for name, cell in block.rows)
            return _section(block.title, f"<dl>{rows}</dl>", block.notes)
        case Bars():
            return _section(block.title, _waterfall(block), block.notes[1:], block.notes[0] if block.notes else "")
        case Messages():
            return _section(block.title, '<ul class="told">' + "".join(_message(item) for item in block.items) + "</ul>")
        case Steps():
            steps = "".join(
                f'<li>{escape(why)}<span class="fix"><code>{escape(command)}</code></span></li>' for why, command in block.steps
            )
            return _section(block.title, f'<ul class="told">{steps}</ul>')
        case Roofline():
            return _section(block.title, roofline(block))


def _section(title: str, body: str, notes: tuple[str, ...] = (), beside: str = "") -> str:
    aside = f"<small>{escape(beside)}</small>" if beside else ""
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"<section><h2>{escape(title)}{aside}</h2>{body}{told}</section>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th{_right(column.right)}>{escape(column.title)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_right(column.right, cell)}>{_cell(cell)}</td>" for column, cell in zip(table.columns, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _right(right: bool, cell: Cell | None = None) -> str:
    if right:
        return ' class="r"'
    if cell is None or not cell.text:
        return ""
    return ' class="tree"' if cell.text[0] in "├└│" else ' class="long"' if len(cell.text) > 60 else ""


def _cell(cell: Cell) -> str:
    meter = ""
    if cell.meter is not None:
        meter = f'<span class="meter"><i style="width:{max(0.0, min(1.0, cell.meter)) * 100:.1f}%"></i></span>'
    text = escape(cell.text)
    if cell.tone in ("compute", "memory"):
        return f'{meter}<span class="dot"><i class="t-{cell.tone}" style="display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px"></i>{text}</span>'
    return meter + (f'<span class="{escape(cell.tone)}">{text}</span>' if cell.tone else text)


def _waterfall(bars: Bars) -> str:
    start = 0.0
    rows = []
    for bar in bars.bars:
        left, width = max(0.0, min(1.0, start)), max(0.0, min(1.0 - min(1.0, start), bar.share))
        drawn = f'<i class="t-{escape(bar.tone)}" style="left:{left * 100:.2f}%;width:{width * 100:.2f}%"></i>' if bar.share > 0 else ""
        rows.append(
            f'<span>{escape(bar.label)}</span><span class="bar">{drawn}</span><span class="r strong">{escape(bar.value)}</span>'
            f'<span class="r">{_percent(bar.share)}</span><span class="dim">{escape(bar.detail)}</span>'
        )
        start += max(0.0, bar.share)
    return f'<div class="fall">{"".join(rows)}</div>'


def _percent(share: float) -> str:
    return "&lt;1%" if 0 < share < 0.01 else f"{share * 100:.0f}%"
