"""Many places with the same defect -> one for layers that are alike, the worst five as findings of their own, and one for the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gpuopt.core.result import Finding

MOST = 5
"""Places named one by one; nobody reads a sixth before the first is mended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something was seen, a call."""

    module: str | None
    """Qualified name; None where it is unknown, and for the sum of the rest."""
    op: str
    count: float
    """How often a call."""
    time_ms: float
    """What it takes now."""
    saved_ms: float
    bytes: float = 0.0
    num_alike: int = 1
    """Modules it sums that differ in a number of their name alone: `layers.0.mlp`, `layers.1.mlp`."""
    num_places: int = 1
    """How many places it sums that are not alike."""

    @property
    def where(self) -> str:
        """`in encoder.layer.0`, `in 7 other places`, or nothing."""
        if self.num_places > 1:
            return f" in {self.num_places} other places"
        if self.module in (None, "?"):
            return ""
        return f" in {self.module or 'the root'}" + (f" and {self.num_alike - 1} like it" if self.num_alike > 1 else "")


def spread(places: Iterable[Place], say: Callable[[Place], Finding], *, most: int = MOST) -> Iterator[Finding]:
    """One finding a place for the `most` that would save most, then one for all the others. Modules alike are one place: their source line is the same."""
    alike: dict[tuple[str | None, str], list[Place]] = {}
    for place in places:
        alike.setdefault((None if place.module is None else re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", place.module), place.op), []).append(place)
    order = sorted(
        (_sum(group, num_alike=len(group)) for group in alike.values()), key=lambda p: (-p.saved_ms, -p.time_ms, -p.count, p.module or "")
    )
    shown, rest = (order, []) if len(order) <= most + 1 else (order[:most], order[most:])
    yield from (say(place) for place in shown)
    if rest:
        yield say(_sum(rest, num_places=len(rest)))


def _sum(places: list[Place], *, num_alike: int = 1, num_places: int = 1) -> Place:
    if len(places) == 1:
        return places[0]
    return Place(
        module=places[0].module if num_places == 1 else None,
        op=places[0].op,
        count=math.fsum(p.count for p in places),
        time_ms=math.fsum(p.time_ms for p in places),
        saved_ms=math.fsum(p.saved_ms for p in places),
        bytes=math.fsum(p.bytes for p in places),
        num_alike=num_alike,
        num_places=num_places,
    )
