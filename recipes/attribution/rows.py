"""What the file of run.py holds."""

from __future__ import annotations

from dataclasses import dataclass

from gpuopt.core.result import Device, Environment

GOALS = {"eager": 0.95}
"""Share of the time that must have a module; GOAL for the others."""
GOAL = 0.90
GOAL_UNACCOUNTED = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model through a backend."""

    model: str
    backend: str
    command: str
    share: float | None = None
    """Of the time on the device (on a CPU: of the ops), 0..1, in rows that name a module; None where it was not measured."""
    line_share: float | None = None
    """The same for a line of the model's own code."""
    time_ms: float | None = None
    """On the device, of one call, as traced."""
    wall_ms: float | None = None
    """Of one call, untraced."""
    unaccounted_ms: float | None = None
    """Of the waterfall of that call."""
    reason: str = ""
    """Why it was not measured."""
    seconds: float = 0.0

    @property
    def goal(self) -> float:
        """Share that is asked of this backend."""
        return GOALS.get(self.backend, GOAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The file."""

    schema_version: int = 1
    command: str
    small: bool
    device: Device | None = None
    environment: Environment | None = None
    cases: tuple[Case, ...] = ()
