"""What a search asks -> what it is answered: the values that cross between its strategy and whoever does the experiments. Pure.

    Screen  -> Screened     build a candidate, time a few short blocks, verify it where it could still win
    Explain -> Explained    trace one that was screened: its bounds, where its time goes, and the changes the doctor proposes
    Mend    -> Mended       find what must stay in fp32 for one that failed the accuracy gate
    Finals  -> Finalists    the best of them and the input, verified in full, in interleaved pairs

A question's key names its answer in a journal; the key's first word is the kind of the answer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from gpuopt.core.search import Screened, Search, Timed
from gpuopt.core.spec import Candidate, Change
from gpuopt.pipeline.search import tune

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """Try one."""

    candidate: Candidate
    limit_ms: float | None = None
    """Above it verification is left out: it cannot be chosen any more."""
    ahead: tuple[Candidate, ...] = ()
    """Who is likely to be asked for after it, the likeliest first: a hint to whoever builds, which no answer depends on."""

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return f"screen {tune.key(self.candidate)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explain:
    """Trace one that was screened."""

    candidate: Candidate

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return f"explain {tune.key(self.candidate)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """Find the modules that have to stay in fp32 for a candidate that failed the accuracy gate to pass it."""

    candidate: Candidate

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return f"mend {tune.key(self.candidate)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finals:
    """Time these against each other; the first is the input."""

    candidates: tuple[Candidate, ...]

    @property
    def key(self) -> str:
        """Of its answer in a journal."""
        return "finals " + " ".join(tune.key(c) for c in self.candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A change the doctor would make."""

    change: Change
    origin: str
    """The rule's code."""
    gain_low_ms: float = 0.0
    gain_high_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What a trace said."""

    facts: tune.Facts | None = None
    """Of the input alone: the others are judged from it."""
    proposals: tuple[Proposal, ...] = ()
    seconds: float = 0.0
    reason: str = ""
    """Why it could not be traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What has to stay."""

    kept: tuple[str, ...] | None = None
    """For `keep_fp32`; None where no set was found, () where the precision is not at fault."""
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalists:
    """Key -> what the pairs said."""

    timed: dict[str, Timed]
    seconds: float = 0.0


Ask = Screen | Explain | Mend | Finals
Answer = Screened | Explained | Mended | Finalists
Asking = Generator[Ask, Answer, T]
"""A part of a search: it asks, is sent the answers, and returns what came of it."""
Steps = Asking[Search]
"""A whole one."""
