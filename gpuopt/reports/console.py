"""Report -> rich renderables for a terminal, and the same as plain text. Adapts to the width it is given."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from rich.box import Box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from gpuopt.core.result import Report
from gpuopt.reports.content.blocks import Bar, Bars, Block, Cell, Column, Facts, Message, Messages, Page, Roofline, Steps, Table, View
from gpuopt.reports.page import page

TEXT_WIDTH = 140
"""Columns of plain text, where no terminal says otherwise."""

STYLES = {
    "good": "green",
    "warn": "yellow",
    "bad": "bold red",
    "dim": "bright_black",
    "strong": "bold",
    "compute": "green",
    "memory": "blue",
    "copy": "magenta",
    "gap": "yellow",
    "other": "cyan",
    "unknown": "bright_black",
}
_SIGNS = {"good": ("✓", "green"), "info": ("•", "cyan"), "warning": ("!", "bold yellow"), "error": ("✗", "bold red")}
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_RULE = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
_METER = 8
_NARROW = 100
"""Columns below which a table has no bars: a figure more says more."""


def render(report: Report, view: View | None = None) -> RenderableType:
    """The page of a report, for `rich.Console.print`."""
    return _Page(page(report, view))


def text(report: Report, view: View | None = None, *, width: int = TEXT_WIDTH) -> str:
    """The same without colours."""
    lines = _print(report, view, width, None).splitlines()
    return "".join(line.rstrip() + "\n" for line in lines)


def coloured(report: Report, view: View | None = None, *, width: int) -> str:
    """The same with escape codes of the terminal's own sixteen colours."""
    return _print(report, view, width, "standard")


def _print(report: Report, view: View | None, width: int, colours: Literal["standard"] | None) -> str:
    out = io.StringIO()
    # An empty environment: NO_COLOR, TERM and COLUMNS were judged by the caller, for the stream it goes to.
    console = Console(
        file=out,
        width=width,
        color_system=colours,
        force_terminal=colours is not None,
        highlight=False,
        markup=False,
        emoji=False,
        _environ={},
    )
    console.print(render(report, view))
    return out.getvalue()


class _Page:
    def __init__(self, shown: Page) -> None:
        self.shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.shown
        for block in shown.blocks:
            renderable = _block(block)
            if renderable is not None:
                yield renderable
                yield Text("")
        yield Text(shown.footer, style="bright_black")
        if shown.headline:  # last: it stays in sight above the prompt
            yield Text("")
            yield Group(*(_message(item) for item in shown.headline))
        for steps in shown.next:
            yield Text("")
            yield _steps(steps)


def _block(block: Block) -> RenderableType | None:
    match block:
        case Table():
            return _Fitted(block)
        case Facts():
            return _facts(block)
        case Bars():
            return _Waterfall(block)
        case Messages():
            return Group(_title(block.title), *(_message(item) for item in block.items))
        case Steps():
            return _steps(block)
        case Roofline():  # a picture; the ops table that follows holds its figures
            return None


def _title(title: str, beside: str = "") -> Text:
    line = Text(title, style="bold")
    if beside:
        line.append(f"   {beside}", style="not bold bright_black")
    return line


def _message(message: Message) -> RenderableType:
    sign, style = _SIGNS.get(message.severity, _SIGNS["info"])
    grid = RichTable.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    line = Text()
    if message.code:
        line.append(f"{message.code} ", style="bold")
    line.append(message.text)
    grid.add_row(Text(sign, style=style), line)
    if message.fix:
        grid.add_row("", Text(f"→ {message.fix}", style="cyan"))
    return grid


def _facts(facts: Facts) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bright_black")
    grid.add_column(overflow="fold")
    for name, cell in facts.rows:
        grid.add_row(Text(name), _cell(cell))
    return Group(_title(facts.title), Padding(grid, (0, 0, 0, 2)), *_notes(facts.notes))


def _steps(steps: Steps) -> RenderableType:
    lines: list[RenderableType] = [_title(steps.title)]
    for why, command in steps.steps:
        lines.append(Padding(Text(why), (0, 0, 0, 2)))
        lines.append(Padding(Text(f"$ {command}", style="cyan", overflow="fold"), (0, 0, 0, 2)))
    return Group(*lines)


def _notes(notes: Sequence[str]) -> Iterator[RenderableType]:
    for note in notes:
        yield Padding(Text(note, style="bright_black"), (0, 0, 0, 2))


def _cell(cell: Cell, width: int = 0) -> Text:
    """`width` is the longest text of the column: beside a bar, figures end at the same place."""
    line = Text(overflow="fold")
    if cell.meter is not None:
        line.append(_bar(cell.meter, _METER).ljust(_METER + 1), style="cyan")
    line.append(cell.text if cell.meter is None else cell.text.rjust(width), style=STYLES.get(cell.tone, ""))
    return line


def _bar(share: float, width: int) -> str:
    """0..1 -> block characters, in eighths of one; anything above nothing is seen."""
    eighths = max(round(max(0.0, min(1.0, share)) * width * 8), 1 if share > 0 else 0)
    full, part = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[part] if part else "")


class _Fitted:
    """A table that gives up its spare columns, most spare first, until the rest fits."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.table.rows:
            yield _title(self.table.title, self.table.beside)
            yield from _notes(self.table.notes)
            return
        widths = _fit(self.table, options.max_width)
        has_meters = options.max_width >= _NARROW
        rich_table = RichTable(
            box=_RULE,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 1),
            collapse_padding=True,
            header_style="bright_black",
            border_style="bright_black",
        )
        for index, room in widths.items():
            column = self.table.columns[index]
            whole = column.right or bool(column.shrinks) or (len(widths) > 1 and _width(self.table, index) <= 12)
            # Prose may be broken between words, where it must; a word never is, but for one longer than the column.
            least = None if whole else min(room, max(_longest_word(self.table, index), len(column.title)))
            is_bar = any(row[index].meter is not None for row in self.table.rows)
            justify: Literal["left", "right"] = "right" if column.right or (is_bar and not has_meters) else "left"
            rich_table.add_column(Text(column.title), justify=justify, no_wrap=whole, overflow="fold", min_width=least)
        texts = {index: max(len(row[index].text) for row in self.table.rows) for index in widths}
        for row in self.table.rows:
            cells = []
            for index, room in widths.items():
                cell = row[index] if has_meters else replace(row[index], meter=None)
                if self.table.columns[index].shrinks:
                    cell = replace(cell, text=_cut(cell.text, room, is_path=self.table.columns[index].is_path))
                cells.append(_cell(cell, texts[index] if row[index].meter is not None else 0))
            rich_table.add_row(*cells)
        yield _title(self.table.title, self.table.beside)
        yield rich_table
        yield from _notes(self.table.notes)
        left_out = [
            column.title for index, column in enumerate(self.table.columns) if index not in widths and _says_something(self.table, index)
        ]
        if left_out:
            yield from _notes([f"a wider terminal, or --json, also shows: {', '.join(left_out)}"])


def _width(table: Table, index: int, *, meters: bool = True) -> int:
    """Cells the column needs at most."""
    widths = [len(table.columns[index].title)]
    for row in table.rows:
        cell = row[index]
        widths.append(Text(cell.text).cell_len + (_METER + 1 if cell.meter is not None and meters else 0))
    return max(widths)


def _longest_word(table: Table, index: int) -> int:
    return max((Text(word).cell_len for row in table.rows for word in row[index].text.split()), default=0)


def _fit(table: Table, width: int) -> dict[int, int]:
    """Column -> its width. Names that may be cut are, before a column goes; what then is free is theirs again."""
    meters = width >= _NARROW
    full = {index: _width(table, index, meters=meters) for index in range(len(table.columns)) if _says_something(table, index)}
    kept = set(full)
    least: dict[int, int] = {}
    for names, dispensable in ((_READABLE, _EASILY_SPARED), (0, 1)):  # first what is seldom missed goes, for names that can be read
        least = {index: min(max(_least(table.columns[index]), names), full[index]) for index in full if index in kept}
        while sum(least.values()) + 2 * (len(least) - 1) > width:
            column = max(least, key=lambda i: (table.columns[i].spare, i))
            if table.columns[column].spare < dispensable:
                break
            del least[column]
        kept = set(least)
    free = width - sum(least.values()) - 2 * (len(least) - 1)
    for index in sorted(least, key=lambda i: full[i] - least[i]):  # the one that lacks least first: it is whole soonest
        given = max(0, min(free, full[index] - least[index]))
        least[index] += given
        free -= given
    return least


_READABLE = 36
"""Characters of a name that are nearly always enough."""
_EASILY_SPARED = 6
"""Columns as spare as this are worth less than a readable name."""


def _least(column: Column) -> int:
    """Cells that a column may not go below."""
    return column.shrinks or column.wraps


def _cut(text: str, room: int, *, is_path: bool) -> str:
    """A path without its beginning, another name without its middle; the lines of a tree stay."""
    if Text(text).cell_len <= room:
        return text
    stem = re.match(r"[│├└─ ]*", text)
    kept = stem[0] if stem else ""
    left = max(1, room - len(kept) - 1)
    name = text[len(kept) :]
    tail = left if is_path else left // 3
    return f"{kept}{name[: left - tail]}…{name[-tail:] if tail else ''}"


def _says_something(table: Table, index: int) -> bool:
    """A column of dashes is left out, unless it may never be."""
    column: Column = table.columns[index]
    return column.spare == 0 or any(row[index].text not in ("", "—") for row in table.rows)


class _Waterfall:
    """Each bar begins where the one above ended, so that the row of them is the whole."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = self.bars.bars
        yield _title(self.bars.title, self.bars.notes[0] if self.bars.notes else "")
        names = max((Text(bar.label).cell_len for bar in bars), default=0)
        values = max((len(bar.value) for bar in bars), default=0)
        room = options.max_width - names - values - 14
        width = max(8, min(40, room))
        detail_room = room - width - 2
        start = 0.0
        for bar in bars:
            line = Text("  ", no_wrap=True, overflow="ellipsis")
            line.append(bar.label.ljust(names) + "  ")
            line.append_text(_placed(bar, start, width))
            line.append(f"  {bar.value:>{values}}", style="bold" if bar.share >= 0.25 else "")
            line.append(f" {_percent(bar.share):>5}")
            if bar.detail and len(bar.detail) <= detail_room:
                line.append(f"  {bar.detail}", style="bright_black")
            yield line
            start += max(0.0, bar.share)
        # Half a sentence says less than none: what has no room beside its bar stands below them, whole.
        yield from _notes([f"{bar.label}: {bar.detail}" for bar in bars if len(bar.detail) > max(0, detail_room)])
        yield from _notes(self.bars.notes[1:])


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.01 else f"{share * 100:.0f}%"


def _placed(bar: Bar, start: float, width: int) -> Text:
    offset = min(width - 1, round(max(0.0, min(1.0, start)) * width))
    length = min(width - offset, max(round(max(0.0, bar.share) * width), 1 if bar.share > 0 else 0))
    line = Text("·" * offset, style="bright_black")
    line.append("█" * length, style=STYLES[bar.tone])
    line.append("·" * (width - offset - length), style="bright_black")
    return line
