"""Units and the bytes they may take on the device -> placements worth simulating: who stays, who shares which slot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product

from gpuopt.core.streaming import ALIGNMENT, Unit

_MOST_CUTS = 4
"""Sizes at which a family of placements begins or ends, of a model with many."""

_MOST_BITS = 1 << 18
"""Of the knapsack's table: a capacity of 70 GB is cut into steps of 256 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where each unit is, before anything is known of time."""

    num_slots: int
    resident: frozenset[str]
    binding: Mapping[str, int]
    """Streamed unit -> the index of its slot in its ring's."""
    slots: Mapping[str, tuple[int, ...]]
    """Ring -> bytes of each slot: of the largest unit bound to it."""
    resident_bytes: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return self.resident_bytes + self.slot_bytes


class Units:
    """A model's units by ring, in the order of a forward."""

    def __init__(self, units: Sequence[Unit], *, wrap: bool) -> None:
        self.units = tuple(units)
        self.wrap = wrap
        self.rings: dict[str, list[Unit]] = {}
        for unit in units:
            self.rings.setdefault(unit.ring, []).append(unit)
        self.size = {unit.name: unit.num_bytes for unit in units}
        self.num_bytes = sum(self.size.values())

    def placed(self, streamed: Collection[str], num_slots: int) -> Placement:
        """Units of a ring take its slots in turn, so neighbours never share one. As many streamed units as slots would each own one: they stay instead.

        With three slots the last unit of a ring avoids the first one's slot too, since it is its neighbour when a forward follows the other.
        """
        binding: dict[str, int] = {}
        slots: dict[str, tuple[int, ...]] = {}
        streamed_bytes = slot_bytes = 0
        for ring, members in self.rings.items():
            moving = [unit for unit in members if unit.name in streamed]
            if len(moving) <= num_slots:
                continue
            sizes = [0] * num_slots
            last = len(moving) - 1
            for index, unit in enumerate(moving):
                slot = 1 if self.wrap and index == last and num_slots > 2 and index % num_slots == 0 else index % num_slots
                binding[unit.name] = slot
                sizes[slot] = max(sizes[slot], unit.num_bytes)
                streamed_bytes += unit.num_bytes
            slots[ring] = tuple(sizes)
            slot_bytes += sum(sizes)
        return Placement(
            num_slots=num_slots,
            resident=frozenset(unit.name for unit in self.units if unit.name not in binding),
            binding=binding,
            slots=slots,
            resident_bytes=self.num_bytes - streamed_bytes,
            slot_bytes=slot_bytes,
        )

    def smallest(self, num_slots: int) -> Placement:
        """The least that these units take on the device: a ring is streamed as a whole, unless it is no larger than its slots."""
        streamed: set[str] = set()
        for ring, members in self.rings.items():
            alone = self.placed([unit.name for unit in members], num_slots)
            if sum(alone.slots.get(ring, ())) < sum(unit.num_bytes for unit in members):
                streamed.update(unit.name for unit in members)
        return self.placed(streamed, num_slots)


def spread(units: Sequence[Unit], share: int, of: int) -> list[str]:
    """The units whose turn it is, so that `share / of` of all bytes move, as evenly as whole units allow.

    Of equal units, i moves iff floor((i+1) s / L) > floor(i s / L). Exact: integers only.
    """
    passed = taken = 0
    chosen = []
    for unit in units:
        passed += unit.num_bytes
        if (taken + unit.num_bytes) * of <= share * passed:
            taken += unit.num_bytes
            chosen.append(unit.name)
    return chosen


def tail(units: Sequence[Unit], share: int, of: int) -> list[str]:
    """The last units, `share / of` of all by number: a single forward computes the first ones while these arrive."""
    return [unit.name for unit in units[len(units) - len(units) * share // of :]]


def placements(units: Units, capacity: int, num_slots: int) -> Iterator[Placement]:
    """Every placement of the families below that takes at most `capacity` bytes.

    For each way to treat rings (stay, move as a whole, or in part): shares spread evenly from none to all, of all units or of the larger
    ones; and, where units differ in size, the knapsack that leaves the fewest bytes to move.
    """
    tried: set[frozenset[str]] = set()
    for ways in _ways(len(units.rings)):
        moving: list[str] = []
        partly: list[Unit] = []
        for way, members in zip(ways, units.rings.values()):
            if way == "whole":
                moving += [unit.name for unit in members]
            elif way == "part":
                partly += members
        sets: Iterable[list[str]] = [[]]
        if partly:
            # Of many rings, one that is treated unlike the others is variety enough.
            cuts = _MOST_CUTS if len(units.rings) <= 2 or len(partly) == len(units.units) else 1
            sets = chain(_shares(partly, units.wrap, cuts), _fullest(units, partly, moving, capacity, num_slots))
        for chosen in sets:
            streamed = frozenset((*moving, *chosen))
            if streamed not in tried:
                tried.add(streamed)
                if units.num_bytes - sum(map(units.size.__getitem__, streamed)) > capacity:
                    continue  # the residents alone are too much
                placement = units.placed(streamed, num_slots)
                if placement.num_bytes <= capacity:
                    yield placement


def _shares(partly: Sequence[Unit], wrap: bool, cuts: int) -> Iterator[list[str]]:
    """Every share of all, and, where units differ, of the larger ones alone."""
    choose = spread if wrap else tail
    sizes = sorted({unit.num_bytes for unit in partly})
    for least in sizes[:: max(1, -(-len(sizes) // cuts))]:
        free = [unit for unit in partly if unit.num_bytes >= least]
        steps = len(free) if len(sizes) == 1 else max(2 * len(free), 32)
        for share in range(steps + 1):
            yield choose(free, share, steps)


def _ways(num_rings: int) -> list[tuple[str, ...]]:
    """How rings are treated, together. Of many rings not every combination: at most one is treated unlike the others."""
    if num_rings <= 2:
        return list(product(("part", "stay", "whole"), repeat=num_rings))
    same = [("part",) * num_rings, ("whole",) * num_rings]
    return same + [tuple(way if i == odd else "part" for i in range(num_rings)) for odd in range(num_rings) for way in ("stay", "whole")]


def _fullest(units: Units, partly: Sequence[Unit], moving: Sequence[str], capacity: int, num_slots: int) -> Iterator[list[str]]:
    """For each size that slots could have: larger units stay, and of the others as many bytes as fit; those of one size spread evenly."""
    sizes = sorted({unit.num_bytes for unit in partly}, reverse=True)
    whole = units.placed(moving, num_slots)
    elsewhere = sum(sum(sizes) for sizes in whole.slots.values()) + sum(
        unit.num_bytes for unit in units.units if unit.name in whole.resident and unit not in partly
    )
    if len(sizes) == 1:
        return  # any share of equal units is among the shares
    for largest in sizes[:: max(1, -(-len(sizes) // _MOST_CUTS))]:
        forced = sum(unit.num_bytes for unit in partly if unit.num_bytes > largest)
        rings = {unit.ring for unit in partly}
        slots = sum(
            num_slots * max((u.num_bytes for u in partly if u.ring == ring and u.num_bytes <= largest), default=0) for ring in rings
        )
        room = capacity - elsewhere - forced - slots
        if room < 0:
            continue
        free = [unit for unit in partly if unit.num_bytes <= largest]
        staying = _knapsack([unit.num_bytes for unit in free], room)
        chosen: list[str] = []
        for size in sorted({unit.num_bytes for unit in free}):
            kind = [unit for unit in free if unit.num_bytes == size]
            stay = sum(1 for index in staying if free[index].num_bytes == size)
            chosen += spread(kind, len(kind) - stay, len(kind))
        yield chosen


def _knapsack(sizes: Sequence[int], room: int) -> list[int]:
    """Indices of the items that fill the room best; a bit a step of bytes, sizes rounded up, so the sum never exceeds the room."""
    step = max(ALIGNMENT, -(-room // _MOST_BITS))
    most = room // step
    mask = (1 << (most + 1)) - 1
    steps = [-(-size // step) for size in sizes]
    tables = [1]
    for item in steps:
        tables.append(tables[-1] | (tables[-1] << item & mask))
    left = tables[-1].bit_length() - 1
    chosen = []
    for index in range(len(sizes) - 1, -1, -1):
        if not tables[index] >> left & 1:
            chosen.append(index)
            left -= steps[index]
    return chosen
