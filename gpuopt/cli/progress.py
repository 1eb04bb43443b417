"""Steps of a job -> stderr: bars at a terminal for what takes over two seconds, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gpuopt.core.result import Report
from gpuopt.reports.figures import clean, ms

if TYPE_CHECKING:
    from rich.live import Live

SHOW_AFTER_S = 2.0
"""A command shorter than this leaves no trace at a terminal."""
SHORT_S = 0.3
"""And in a longer one, no step shorter than this: it would only flicker."""
LINE_EVERY_S = 5.0
"""Where there is no terminal, a step's notes are printed no more often than this."""
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class _Step:
    def __init__(self, label: str) -> None:
        self.label = clean(label, 100)
        self.started_s = time.monotonic()
        self.fraction: float | None = None
        self.note = ""
        self.printed_s = self.started_s

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.started_s


class Screen:
    """The Progress of a terminal. Never raises: a watcher that went away stops nothing."""

    def __init__(self, *, quiet: bool = False, on_report: Callable[[Report], None] | None = None) -> None:
        self.quiet = quiet
        self.last: Report | None = None
        """The newest report so far."""
        self._on_report = on_report
        self._steps: dict[str, _Step] = {}
        self._live: Live | None = None
        self._warned: set[str] = set()
        self._started_s = time.monotonic()
        self._animated = (
            not quiet and sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown", "")
        )

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pause()

    def start(self, key: str, label: str) -> None:
        """A bar appears when the command is two seconds old; without a terminal, a line says it began."""
        self._steps[key] = _Step(label)
        if self._animated:
            self._animate()
        elif not self.quiet:
            self._line(f"{self._steps[key].label} …")

    def update(self, key: str, fraction: float | None, note: str = "") -> None:
        """How far; unknown keys are ignored."""
        step = self._steps.get(key)
        if step is None:
            return
        step.fraction = None if fraction is None else min(1.0, max(0.0, fraction))
        changed = bool(note) and clean(note, 100) != step.note
        step.note = clean(note, 100) if note else step.note
        now = time.monotonic()
        if changed and not self._animated and not self.quiet and now - step.printed_s >= LINE_EVERY_S:
            step.printed_s = now
            self._line(f"{step.label}: {step.note}")

    def done(self, key: str, note: str = "") -> None:
        """The bar goes; without a terminal, a long step or one with an outcome says so."""
        step = self._steps.pop(key, None)
        if step is None or self.quiet:
            return
        if not self._animated and (note or step.age_s >= SHOW_AFTER_S):
            self._line(f"{step.label}: {clean(note or 'done', 200)}, {ms(step.age_s * 1e3)}")

    def warn(self, text: str) -> None:
        """Once for each text, above the bars."""
        line = clean(text, 2000)
        if line in self._warned:
            return
        self._warned.add(line)
        self._line(f"warning: {line}", style="yellow")

    def so_far(self, report: Report) -> None:
        """Keep it, and hand it to whoever saves it."""
        self.last = report
        if self._on_report is not None:
            self._on_report(report)

    def pause(self) -> None:
        """Take the bars away; the next `start` brings them back."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None

    def _animate(self) -> None:
        if self._live is not None:
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._live = Live(
            get_renderable=self._bars, console=console, transient=True, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False
        )
        with contextlib.suppress(OSError):
            self._live.start()

    def _bars(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        if time.monotonic() - self._started_s < SHOW_AFTER_S:
            return grid
        for step in list(self._steps.values()):
            if step.age_s < SHORT_S:
                continue
            frame = _FRAMES[int(step.age_s * 8) % len(_FRAMES)]
            bar = ProgressBar(
                total=None if step.fraction is None else 1.0, completed=step.fraction or 0.0, width=24, pulse=step.fraction is None
            )
            share = "" if step.fraction is None else f"{step.fraction * 100:.0f}%"
            grid.add_row(
                Text(frame, style="cyan"),
                Text(step.label),
                bar,
                Text(share),
                Text(f"{step.age_s:.0f} s", style="bright_black"),
                Text(step.note or ("starting" if step.fraction is None else ""), style="bright_black"),
            )
        return grid

    def _line(self, text: str, style: str = "") -> None:
        try:
            if self._live is not None:
                from rich.text import Text

                self._live.console.print(Text(text, style=style))
            elif sys.stderr is not None:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
        except UnicodeEncodeError:
            sys.stderr.write(text.encode("ascii", "replace").decode() + "\n")
        except (OSError, ValueError):
            self.quiet, self._animated = True, False  # nobody reads any more
