"""Text, tones and figures -> the few kinds of block a page is made of. Values; no format's own marks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuopt.core.errors import UsageError
from gpuopt.core.result import Ceiling, RooflinePoint

ORDERS = ("time", "gap", "flops", "bytes")
"""What tables of ops, kernels and lines may be sorted by; `gap` is time above the floor, the time there is to win."""
GROUPINGS = ("module", "op", "kernel", "line", "all")
"""What the time may be told by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How much of a report is shown; the report itself always holds everything."""

    depth: int = 3
    """Levels of the module tree."""
    top: int = 10
    """Rows of the tables of ops, kernels and lines."""
    by: str = ""
    """One of GROUPINGS: that table alone; "" is the modules, and the ops of layers alike."""
    sort: str = "time"
    """Order of ops, kernels and lines, one of ORDERS; modules stay in the order they run."""

    def __post_init__(self) -> None:
        if self.by and self.by not in GROUPINGS:
            fix = f"--sort {self.by}" if self.by in ORDERS else "--by " + "|".join(GROUPINGS)
            raise UsageError(f"time cannot be told by {self.by!r}", fix=fix)
        if self.sort not in ORDERS:
            raise UsageError(f"nothing can be sorted by {self.sort!r}", fix="--sort " + "|".join(ORDERS))


@dataclass(frozen=True, slots=True)
class Cell:
    """Text with a tone: `good`, `warn`, `bad`, `dim`, `strong` or none."""

    text: str
    tone: str = ""
    meter: float | None = None
    """0..1: a small bar in front of the text where a format can draw one."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column; where the page is too narrow, the highest `spare` goes first, and 0 never."""

    title: str
    right: bool = False
    spare: int = 0
    folds: bool = False
    """Where every row says the same, it is said once, beside the table's title."""
    shrinks: int = 0
    """Where the page is too narrow, names are cut down to so many characters. 0: never cut."""
    wraps: int = 40
    """Where the page is too narrow, prose is broken into lines of no fewer characters than this."""
    is_path: bool = False
    """Cut from the left, as the end of a path tells most; other names lose their middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under columns; `notes` say what the figures are measured against."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    beside: str = ""
    """What holds for all rows."""

    def folded(self) -> Table:
        """Columns that may fold and say the same in every row -> `beside`."""
        if len(self.rows) < 2:
            return self
        same = {i for i, column in enumerate(self.columns) if column.folds and len({row[i].text for row in self.rows}) == 1}
        told = [self.rows[0][i].text for i in sorted(same)]
        rows = tuple(tuple(cell for i, cell in enumerate(row) if i not in same) for row in self.rows)
        return replace(
            self,
            columns=tuple(c for i, c in enumerate(self.columns) if i not in same),
            rows=() if len(self.columns) - len(same) == 1 else rows,  # nothing is left to tell the rows apart but their names
            beside=" · ".join(part for part in (self.beside, *told) if part not in ("", "—")),
        )


@dataclass(frozen=True, slots=True)
class Bar:
    """A slice of a whole."""

    label: str
    value: str
    share: float
    tone: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Slices that add up to a whole."""

    title: str
    bars: tuple[Bar, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names and values."""

    title: str
    rows: tuple[tuple[str, Cell], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """One thing to know: `severity` is `good`, `info`, `warning` or `error`."""

    severity: str
    text: str
    fix: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """Things to know, worst first."""

    title: str
    items: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What to type next, each with its reason."""

    title: str
    steps: tuple[tuple[str, str], ...]
    """(why, command line)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The points of one run under the device's ceilings; drawn where a format can draw."""

    title: str
    points: tuple[RooflinePoint, ...]
    compute: tuple[Ceiling, ...]
    bandwidth: Ceiling | None


Block = Table | Bars | Facts | Messages | Steps | Roofline


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that is shown: a title, the answer in a few sentences, and the evidence."""

    title: str
    subtitle: str = ""
    headline: tuple[Message, ...] = ()
    blocks: tuple[Block, ...] = ()
    next: tuple[Steps, ...] = ()
    footer: str = ""
