"""Report -> Markdown, for pull-request comments and READMEs."""

from __future__ import annotations

import re

from gpuopt.core.result import Report
from gpuopt.reports.content.blocks import Bars, Block, Cell, Facts, Message, Messages, Roofline, Steps, Table, View
from gpuopt.reports.page import page

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")
_MARKS = {"good": "✅ ", "error": "❌ ", "warning": "⚠️ ", "info": ""}


def render(report: Report, view: View | None = None) -> str:
    """GitHub-flavoured; everything that comes from a model or a file is escaped."""
    shown = page(report, view)
    lines = [f"### {escape(shown.title)}", ""]
    lines += [line for message in shown.headline for line in _message(message)]
    for block in (*shown.blocks, *shown.next):
        lines += ["", *_block(block)]
    if shown.subtitle:
        lines += ["", f"Made by {code(shown.subtitle)}"]
    lines += ["", f"<sub>{escape(shown.footer)}</sub>"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def escape(text: str) -> str:
    """Text as text: no emphasis, link, HTML, mention or table cell can come of it."""
    return _SPECIAL.sub(r"\\\1", text).replace("@", "@\N{ZERO WIDTH JOINER}")


def code(text: str) -> str:
    """A code span whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("\n", " ")


def _message(message: Message) -> list[str]:
    fix = f" → {_fix(message.fix)}" if message.fix else ""
    label = f"**{escape(message.code)}** " if message.code else ""
    return [f"- {_MARKS.get(message.severity, '')}{label}{escape(message.text)}{fix}"]


def _fix(text: str) -> str:
    return code(text) if text.startswith(("gpuopt ", "pip ", "--")) else escape(text)


def _block(block: Block) -> list[str]:
    match block:
        case Table():
            return _table(block)
        case Facts():
            return [
                f"**{escape(block.title)}**",
                "",
                *(f"- {escape(name)}{': ' if name else ''}{escape(cell.text)}" for name, cell in block.rows),
                *_notes(block.notes),
            ]
        case Bars():
            return _bars(block)
        case Messages():
            return [f"**{escape(block.title)}**", "", *(line for item in block.items for line in _message(item))]
        case Steps():
            return [f"**{escape(block.title)}**", "", *(f"- {escape(why)}: {code(command)}" for why, command in block.steps)]
        case Roofline():  # a picture; the ops table that follows holds its figures
            return []


def _table(table: Table) -> list[str]:
    head = "| " + " | ".join(escape(column.title) for column in table.columns) + " |"
    rule = "|" + "|".join("--:" if column.right else "---" for column in table.columns) + "|"
    rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    beside = f" ({escape(table.beside)})" if table.beside else ""
    if not table.rows:
        return [f"**{escape(table.title)}**{beside}", *_notes(table.notes)]
    return [f"**{escape(table.title)}**{beside}", "", head, rule, *rows, *_notes(table.notes)]


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.tone == "bad" and text:
        return f"❌ {text}"
    return f"**{text}**" if cell.tone == "strong" and text else text


def _bars(bars: Bars) -> list[str]:
    rows = []
    for bar in bars.bars:
        picture = "█" * round(20 * max(0.0, min(1.0, bar.share)))
        rows.append(f"| {escape(bar.label)} | {picture} | {escape(bar.value)} | {bar.share * 100:.0f}% | {escape(bar.detail)} |")
    return [f"**{escape(bars.title)}**", "", "| | | time | share | |", "|---|---|--:|--:|---|", *rows, *_notes(bars.notes)]


def _notes(notes: tuple[str, ...]) -> list[str]:
    return ["", *(f"<sub>{escape(note)}</sub><br>" for note in notes)] if notes else []
