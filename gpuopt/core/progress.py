"""How far a job is -> whoever watches: a terminal, a test, nobody."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from gpuopt.core.result import Report


@runtime_checkable
class Progress(Protocol):
    """What a job tells while it works. Implementations never raise and never print to stdout."""

    def start(self, key: str, label: str) -> None:
        """A step begins; `key` names it in the calls that follow, `label` is shown."""

    def update(self, key: str, fraction: float | None, note: str = "") -> None:
        """The step is `fraction` (0..1) done; None where nobody knows."""

    def done(self, key: str, note: str = "") -> None:
        """The step ended; `note` is its outcome in a few words. Harmless for a key never started."""

    def warn(self, text: str) -> None:
        """Something the user should know now, beside the report."""

    def so_far(self, report: Report) -> None:
        """The report as it stands, after each candidate: whoever owns `--json FILE` rewrites it, so that a later crash loses nothing."""


class Silent:
    """Nobody watches: library calls and tests."""

    def start(self, key: str, label: str) -> None:
        """Nothing."""

    def update(self, key: str, fraction: float | None, note: str = "") -> None:
        """Nothing."""

    def done(self, key: str, note: str = "") -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def so_far(self, report: Report) -> None:
        """Nothing."""
