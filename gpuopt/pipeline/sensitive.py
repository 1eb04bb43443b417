"""A tree of modules + a verdict on any set of them kept in fp32 -> the smallest set that passes. Pure: whoever asks brings the verdict.

Four steps. Overflow is followed first: the module that makes the first NaN or Inf is kept, then the next one, and where a kept module's own output is too large
for the narrow type, the module around it. What still fails is ranked: each block cast alone, all others kept, tells its share of the error; then the shortest
prefix of that ranking that passes is found by bisection. Kept blocks are opened into their parts. Last, each kept module is left out alone until none can be.

Nothing is taken for granted but what was evaluated: the result passed, and where `is_minimal` is said, each of its modules was left out and failed. That no
quite different set is smaller is only known of a set of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpuopt.core.result import SensitivityRow

MIN_BLOCKS = 6
"""The first ranking is of at least this many modules: a model of two halves says nothing about where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A module that is called by itself, so that it can be kept in fp32 by itself."""

    name: str
    children: tuple[Unit, ...] = ()
    weight: float = 0.0
    """What keeping it costs, as a share of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One set, evaluated."""

    passed: bool
    error: float | None = None
    """As a multiple of the limit; None where there are NaN or Inf, or it does not run."""
    culprit: str | None = None
    """The module that makes the first NaN or Inf, where one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search came to."""

    kept: tuple[str, ...] | None
    """In the model's order; None where no set that was tried passed."""
    outcome: Outcome | None
    """Of that set."""
    before: Outcome | None
    """Of none kept."""
    evaluations: int
    is_minimal: bool
    ranking: tuple[SensitivityRow, ...]
    note: str


Passes = Callable[[tuple[str, ...]], Outcome]
"""Names of the modules kept -> the verdict; asked once a set."""


def search(roots: Sequence[Unit], passes: Passes, *, budget: int = 64, stop: Callable[[], bool] | None = None) -> Found:
    """The smallest set of modules that has to be kept. At most `budget` sets are evaluated, fewer when `stop` says that time is over."""
    if budget < 1:
        raise ValueError("a search without evaluations finds nothing")
    return _Search(roots, passes, budget, stop or (lambda: False)).run()


class _Spent(Exception):
    """The budget or the time is over."""


class _Search:
    def __init__(self, roots: Sequence[Unit], passes: Passes, budget: int, stop: Callable[[], bool]) -> None:
        self.roots, self.passes, self.budget, self.stop = tuple(roots), passes, budget, stop
        self.units: dict[str, Unit] = {}
        self.above: dict[str, str | None] = {}
        for unit, above in _walk(self.roots, None):
            self.units[unit.name], self.above[unit.name] = unit, above
        self.order = {name: place for place, name in enumerate(self.units)}
        self.seen: dict[frozenset[str], Outcome] = {}
        self.rows: dict[str, SensitivityRow] = {}
        self.best: frozenset[str] | None = None

    def run(self) -> Found:
        why, is_minimal = "", False
        try:
            before = self.ask(())
            if before.passed:
                return self.found(frozenset(), "none has to be kept: the precision by itself passes", is_minimal=True)
            kept, followed = self.follow(before)
            if not followed.passed:
                grown = self.grow(kept)
                if grown is None:
                    return self.found(None, "even with every module kept it fails: what fails is not inside a module that can be kept")
                kept = grown
            kept = self.open(kept)
            kept = self.shrink(kept)
            self.best, is_minimal = kept, True
            why = (
                "no smaller set: none kept fails"
                if len(kept) == 1
                else f"each of the {len(kept)} is needed: left out alone, the gate fails"
            )
        except _Spent:
            spent = f"stopped after {len(self.seen)} evaluations"
            why = f"{spent}: a smaller set may do" if self.best is not None else f"{spent}, none of which passed"
        return self.found(self.best, why, is_minimal=is_minimal)

    def found(self, kept: frozenset[str] | None, note: str, *, is_minimal: bool = False) -> Found:
        return Found(
            kept=None if kept is None else self.in_order(kept),
            outcome=None if kept is None else self.seen[kept],
            before=self.seen.get(frozenset()),
            evaluations=len(self.seen),
            is_minimal=is_minimal,
            ranking=tuple(sorted(self.rows.values(), key=lambda row: (-_size(row.error), self.order[row.module]))),
            note=note,
        )

    def ask(self, kept: Iterable[str]) -> Outcome:
        """The verdict on a set; nothing is evaluated twice."""
        key = self.outermost(kept)
        if key not in self.seen:
            if len(self.seen) >= self.budget or self.stop():
                raise _Spent
            self.seen[key] = self.passes(self.in_order(key))
            if self.seen[key].passed and (self.best is None or self.cost(key) < self.cost(self.best)):
                self.best = key
        return self.seen[key]

    # -- overflow -----------------------------------------------------------------------------------------------------------------

    def follow(self, outcome: Outcome) -> tuple[frozenset[str], Outcome]:
        """Keep what overflows first, until nothing does or only the model as a whole is left."""
        kept: frozenset[str] = frozenset()
        while not outcome.passed and outcome.culprit is not None:
            name = self.nearest(outcome.culprit)
            # Inside something kept already: what it hands on is too large for the narrow type, so whatever takes it has to be kept with it.
            while name is not None and any(self.is_inside(name, other) for other in kept):
                name = self.above[name]
            if name is None:
                break
            self.rows.setdefault(name, SensitivityRow(module=name, error=None, parameters=self.units[name].weight))
            kept = self.outermost({*kept, name})
            outcome = self.ask(kept)
        return kept, outcome

    # -- error --------------------------------------------------------------------------------------------------------------------

    def grow(self, start: frozenset[str]) -> frozenset[str] | None:
        """A set that passes: `start` and the most sensitive blocks. None where not even all of them do."""
        units = self.blocks()
        if not self.ask({u.name for u in units}).passed:
            units = self.roots
            if not self.ask({u.name for u in units}).passed:
                return None
        everything = [u.name for u in units]
        names = [name for name in everything if name not in start]
        if len(names) <= (self.budget - len(self.seen)) // 2:
            for name in names:
                alone = self.ask(other for other in everything if other != name)
                self.rows[name] = SensitivityRow(module=name, error=alone.error, parameters=self.units[name].weight)
            names.sort(key=lambda name: (-_size(self.rows[name].error), self.units[name].weight))
        return self.prefix(start, names)

    def prefix(self, fixed: frozenset[str], names: Sequence[str]) -> frozenset[str]:
        """`fixed` and the fewest of `names`, taken in order; all of them are known to pass, none is known or taken to fail."""
        low, high = -1, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            if self.ask({*fixed, *names[:middle]}).passed:
                high = middle
            else:
                low = middle
        return self.outermost({*fixed, *names[:high]})

    def blocks(self) -> tuple[Unit, ...]:
        """The coarsest modules, the heaviest opened until there are MIN_BLOCKS: an encoder alone is no answer. Half the budget at most goes into ranking them."""
        units = list(self.roots)
        while len(units) < MIN_BLOCKS:
            heaviest = max((u for u in units if u.children), key=lambda u: u.weight, default=None)
            if heaviest is None or len(units) - 1 + len(heaviest.children) > max(MIN_BLOCKS, self.budget // 2):
                break
            place = units.index(heaviest)
            units[place : place + 1] = heaviest.children
        return tuple(units)

    # -- smaller ------------------------------------------------------------------------------------------------------------------

    def open(self, kept: frozenset[str]) -> frozenset[str]:
        """Kept modules replaced by those of their parts that are needed, where the parts alone will do."""
        closed: set[str] = set()
        while True:
            name = max(
                (n for n in kept if self.units[n].children and n not in closed),
                key=lambda n: (self.units[n].weight, -self.order[n]),
                default=None,
            )
            if name is None:
                return kept
            rest, parts = kept - {name}, [u.name for u in self.units[name].children]
            if self.ask(rest).passed:
                kept = rest
            elif self.ask({*rest, *parts}).passed:
                without = {part: self.ask({*rest, *(p for p in parts if p != part)}) for part in parts}
                parts.sort(key=lambda part: (without[part].passed, -_size(without[part].error), self.units[part].weight))
                kept = self.prefix(rest, parts)
            else:
                closed.add(name)  # what it computes between its parts has to be kept, too

    def shrink(self, kept: frozenset[str]) -> frozenset[str]:
        """Leave out what can be left out, the least sensitive first, until each that is left is needed."""
        while True:
            for name in sorted(
                kept, key=lambda n: (_size(self.rows[n].error if n in self.rows else 0.0), -self.units[n].weight, self.order[n])
            ):
                if self.ask(kept - {name}).passed:
                    kept = kept - {name}
                    break
            else:
                return kept

    # -- names --------------------------------------------------------------------------------------------------------------------

    def outermost(self, names: Iterable[str]) -> frozenset[str]:
        chosen = set(names)
        return frozenset(n for n in chosen if not any(n != other and self.is_inside(n, other) for other in chosen))

    def is_inside(self, name: str, other: str) -> bool:
        return name == other or name.startswith(f"{other}.")

    def nearest(self, name: str) -> str | None:
        """The module itself, or the one around it that can be kept."""
        while name and name not in self.units:
            name = name.rpartition(".")[0]
        return name or None

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda n: self.order[n]))

    def cost(self, names: Iterable[str]) -> tuple[float, int]:
        names = tuple(names)
        return math.fsum(self.units[n].weight for n in names), len(names)


def _walk(units: Sequence[Unit], above: str | None) -> Iterator[tuple[Unit, str | None]]:
    for unit in units:
        yield unit, above
        yield from _walk(unit.children, unit.name)


def _size(error: float | None) -> float:
    """None, which is NaN or Inf, is worse than any error."""
    return math.inf if error is None else error
