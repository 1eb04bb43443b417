"""An anatomy, a budget and what the machine was measured to do -> the plan: who stays, who moves through which slot, and what that should cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.core.streaming import EMBEDDING, Anatomy, Calibration, Ledger, Plan, StreamSpec, Unit
from gpuopt.core.units import format_bytes, format_fraction
from gpuopt.streaming.advice import advise
from gpuopt.streaming.placement import Placement, Units, placements, spread
from gpuopt.streaming.timeline import DISK_BUFFERS, Timeline, simulate

RESERVE_PCT = 5
"""Of everything else in the ledger: what allocators round up, and what the measured peak may miss."""

PIN_SHARE = 0.8
"""Of the host memory that is available: a machine whose pages are all locked can do nothing else."""

DISK_BYTES_PER_S = 2.5e9
"""Assumed of a disk that was not measured; the plan says so."""

STAGED = 2
"""Locked buffers that pageable memory is copied through."""

_MOST_SIMULATIONS = 400
_STARTS = 3
"""Of the best placements, how many are improved further."""

_CLOSE = 1.0005
"""A prediction this near to the best that any other placement could reach ends the search."""


def plan(anatomy: Anatomy, spec: StreamSpec, calibration: Calibration, *, available_host_bytes: int | None) -> Plan:
    """The placement with the least predicted time of a forward within the budget. Pure: the same arguments give the same plan.

    `spec.budget_bytes` is held against everything on the device, with 5% in reserve; `spec.budget_share` is of the weights' bytes, always
    resident ones included, and the plan's `budget_bytes` adds activations, cache, context and reserve to it.
    `available_host_bytes`: host memory that may be taken; None: unknown, and nothing is refused for it.
    Raises UsageError on a budget that is none, ResourceError with the numbers where the device's or the host's memory does not do.
    """
    _check(spec, calibration)
    units = Units(anatomy.units, wrap=not spec.once)
    budget = _Budget.of(anatomy, spec, calibration)
    slot_counts = (spec.num_slots,) if spec.num_slots else (2, 3)
    host = _Host.of(anatomy, spec, available_host_bytes)
    if budget.for_units >= units.num_bytes:
        chosen = scored(units.placed((), slot_counts[0]), {}, anatomy, spec, calibration)
    else:
        if budget.for_units < min(units.smallest(count).num_bytes for count in slot_counts):
            raise _too_small(anatomy, spec, calibration, units, budget, slot_counts)
        chosen = _Search(anatomy, spec, calibration, host, units, budget.for_units).best(slot_counts)
    placement, timeline = chosen.placement, chosen.timeline
    rest = budget.elsewhere + placement.num_bytes
    link_ms = max(timeline.link_ms, timeline.disk_ms)
    bound_ms = max(timeline.compute_ms, link_ms)
    predicted_ms = max(timeline.total_ms, bound_ms)
    made = Plan(
        spec=spec,
        anatomy=anatomy,
        calibration=calibration,
        resident=tuple(unit.name for unit in anatomy.units if unit.name in placement.resident),
        slots=dict(placement.slots),
        binding=dict(placement.binding),
        homes=chosen.homes,
        ledger=Ledger(
            fixed=sum(anatomy.fixed.values()),
            residents=placement.resident_bytes,
            slots=placement.slot_bytes,
            activations=calibration.activation_bytes,
            cache=calibration.cache_bytes,
            context=calibration.context_bytes,
            reserve=_reserve(rest),
        ),
        budget_bytes=budget.device,
        streamed_bytes=timeline.copied_bytes,
        compute_ms=timeline.compute_ms,
        link_ms=link_ms,
        bound_ms=bound_ms,
        predicted_ms=predicted_ms,
        stall_ms=timeline.stall_ms,
    )
    return replace(made, advice=advise(made))


def shown(made: Plan) -> Timeline:
    """The forward that a plan predicts, with the spans of each queue: what to draw. Its figures are the plan's again."""
    return _simulated(made.resident, made.binding, made.slots, made.homes, made.anatomy, made.spec, made.calibration, spans=True)


def _check(spec: StreamSpec, calibration: Calibration) -> None:
    """What the search takes for granted. Raises UsageError."""
    size, share = spec.budget_bytes, spec.budget_share
    if (size is None) == (share is None):
        raise UsageError("a plan needs one budget, in bytes or as a share of the weights", fix="--budget 8GiB or --budget 50%")
    if (size is not None and size <= 0) or (share is not None and not (math.isfinite(share) and share > 0)):
        raise UsageError(f"a budget of {size if share is None else share} leaves nothing", fix="--budget 8GiB or --budget 50%")
    if spec.num_slots is not None and not 1 <= spec.num_slots <= 3:
        raise UsageError(f"{spec.num_slots} slots: only residents lower what is moved, more slots do not", fix="--slots 2 or --slots 3")
    if not calibration.link_bytes_per_s > 0:
        raise UsageError("the calibration knows no rate of the link", fix="calibrate on the device, or name a rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    device: int
    """Of the whole process on the device."""
    fixed: int
    """Always resident weights."""
    elsewhere: int
    """What is on the device besides units: `fixed`, activations, cache, context; without the reserve."""
    for_units: int
    """Residents and slots; below 0 where not even the rest fits."""
    of_weights: int
    """What a share is of: weights, with the alignment of their slabs."""

    @classmethod
    def of(cls, anatomy: Anatomy, spec: StreamSpec, calibration: Calibration) -> _Budget:
        fixed = sum(anatomy.fixed.values())
        others = calibration.activation_bytes + calibration.cache_bytes + calibration.context_bytes
        weights = fixed + sum(anatomy.host.values()) + sum(unit.num_bytes for unit in anatomy.units)
        if spec.budget_bytes is not None:
            device = spec.budget_bytes
            held = device * 100 // (100 + RESERVE_PCT) - others
        else:
            assert spec.budget_share is not None
            held = weights if spec.budget_share >= 1 else int(spec.budget_share * weights)
            device = held + others + _reserve(held + others)
        return cls(device=device, fixed=fixed, elsewhere=fixed + others, for_units=held - fixed, of_weights=weights)

    def text(self, spec: StreamSpec, unit_bytes: int) -> str:
        """The budget in which these bytes of units fit, as it is typed; rounded up."""
        if spec.budget_share is None:
            rest = self.elsewhere + unit_bytes
            return f"{-(-(rest + _reserve(rest) + 1) // 2**20)}MiB"
        return f"{min(100, math.ceil(1000 * (self.fixed + unit_bytes + 1) / self.of_weights) / 10):g}%"


def _reserve(rest: int) -> int:
    return rest * RESERVE_PCT // 100


def _too_small(
    anatomy: Anatomy, spec: StreamSpec, calibration: Calibration, units: Units, budget: _Budget, slot_counts: Sequence[int]
) -> ResourceError:
    """The ledger of the least that is possible, and what each flag would make of it."""
    count, smallest = min(((count, units.smallest(count)) for count in slot_counts), key=lambda pair: pair[1].num_bytes)
    least = smallest.num_bytes
    asked = f"{format_fraction(spec.budget_share or 0)} of the weights" if spec.budget_bytes is None else format_bytes(spec.budget_bytes)
    parts = {
        "always resident": budget.fixed,
        "of blocks, too few to take turns": smallest.resident_bytes,
        f"in {count} slot{'s' if count > 1 else ''} a ring": smallest.slot_bytes,
    }
    if spec.budget_bytes is not None:  # a share is of weights alone
        parts |= {"activations": calibration.activation_bytes, "cache": calibration.cache_bytes, "context": calibration.context_bytes}
        parts["reserve"] = _reserve(budget.elsewhere + least)
    listed = " + ".join(f"{format_bytes(size)} {what}" for what, size in parts.items() if size)
    if not anatomy.units:
        what = f"a budget of {asked} is too small, and no block of this model can be moved: {listed}"
        return ResourceError(what, fix=f"--budget {budget.text(spec, least)}, which holds everything")
    largest = max(anatomy.units, key=lambda unit: unit.num_bytes)
    size = format_bytes(largest.num_bytes)
    what = f"a budget of {asked} is too small: {listed} = {format_bytes(sum(parts.values()))}; the largest unit, {largest.name}, has {size}"
    flags = [f"--budget {budget.text(spec, least)} is the least"]
    one = units.smallest(1).num_bytes
    if one < least:
        flags.append(f"--slots 1 lowers it to {budget.text(spec, one)}, without overlap")
    apart = Units([part for unit in anatomy.units for part in _parts(unit)], wrap=units.wrap).smallest(count).num_bytes
    if spec.granularity == "block" and apart < least:
        flags.append(f"--granularity sub lowers it to about {budget.text(spec, apart)}")
    tables = sum(taken for name, taken in anatomy.fixed.items() if anatomy.reasons.get(name) == EMBEDDING)
    if spec.embed != "cpu" and tables:
        flags.append(f"--embed cpu takes {format_bytes(tables)} off it")
    if spec.budget_bytes is not None and 2 * (calibration.activation_bytes + calibration.cache_bytes) > spec.budget_bytes:
        flags.append("fewer tokens or a smaller batch shrink activations and cache, which take most")
    return ResourceError(what, fix="; ".join(flags))


def _parts(unit: Unit) -> list[Unit]:
    """What `sub` would make of a unit, as far as its tensors' names tell."""
    paths = [place.name.removeprefix(f"{unit.name}.").split(".")[:-1] for place in unit.places]
    depth = next((depth for depth in (1, 2) if len({tuple(path[:depth]) for path in paths}) > 1), 1)
    parts: dict[str, int] = {}
    for path, place in zip(paths, unit.places):
        key = ".".join((unit.name, *path[:depth]))
        parts[key] = parts.get(key, 0) + place.num_bytes
    return [replace(unit, name=name, num_bytes=num_bytes, places=()) for name, num_bytes in parts.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    placement: Placement
    homes: Mapping[str, str]
    timeline: Timeline

    @property
    def order(self) -> tuple[object, ...]:
        """The lesser the better. Of equal times the fewest bytes over the link, then on the device; names last, so that there is one answer."""
        placement = self.placement
        bytes_ = self.timeline.copied_bytes, placement.num_bytes, placement.num_slots
        return float(f"{self.timeline.total_ms:.7g}"), *bytes_, tuple(sorted(placement.resident))


class _Search:
    """Placements simulated in the order of what they could reach at best, then improved by exchanging neighbours."""

    def __init__(self, anatomy: Anatomy, spec: StreamSpec, calibration: Calibration, host: _Host, units: Units, capacity: int) -> None:
        self.anatomy, self.spec, self.calibration, self.host = anatomy, spec, calibration, host
        self.units, self.capacity = units, capacity
        self.simulations = 0
        self.compute_ms = simulate(
            anatomy.units,
            [u.name for u in anatomy.units],
            {},
            {},
            calibration.compute_ms,
            1.0,
            forwards=1,
            host_ms=calibration.host_ms,
            host_waits=calibration.host_waits,
        ).compute_ms

    def best(self, slot_counts: Sequence[int]) -> Scored:
        """The least predicted time."""
        found = [placement for count in slot_counts for placement in placements(self.units, self.capacity, count)]
        found += [least for count in slot_counts if (least := self.units.smallest(count)).num_bytes <= self.capacity]
        held = [placement for placement in found if self.host.holds(self._streamed(placement))]
        if not held:
            raise self.host.too_small(min((self._streamed(placement) for placement in found), key=lambda us: sum(u.num_bytes for u in us)))
        queue = sorted(((*self._reach(p), p.num_slots, p.num_bytes, sorted(p.resident), p) for p in held), key=lambda row: row[:-1])
        front: list[Scored] = []
        for at_best, *_, placement in queue:
            if front and (front[0].timeline.total_ms <= at_best * _CLOSE or self.simulations >= _MOST_SIMULATIONS // 2):
                break
            front = sorted([*front, self._score(placement)], key=lambda one: one.order)[:_STARTS]
        return min((self._exchanged(one, queue[0][0]) for one in front), key=lambda one: one.order)

    def _streamed(self, placement: Placement) -> list[Unit]:
        return [unit for unit in self.anatomy.units if unit.name in placement.binding]

    def _score(self, placement: Placement) -> Scored:
        self.simulations += 1
        return scored(placement, self.host.homes(self._streamed(placement)), self.anatomy, self.spec, self.calibration)

    def _reach(self, placement: Placement) -> tuple[float, int]:
        """No schedule of this placement is faster, milliseconds; and the bytes it moves a forward."""
        known = self.calibration.compute_ms
        rings = {unit.ring for unit in self.anatomy.units if unit.name in known} or set(self.units.rings)
        shares: dict[tuple[str, int], list[int]] = {}
        for unit in self._streamed(placement):
            if unit.ring in rings:
                shares.setdefault((unit.ring, placement.binding[unit.name]), []).append(unit.num_bytes)
        # A unit alone in its slot is copied once and stays, unless there is but one forward.
        moved = sum(sum(sizes) for sizes in shares.values() if len(sizes) > 1 or self.spec.once)
        return max(self.compute_ms, self.host.least_ms(moved, self.calibration)), moved

    def _exchanged(self, best: Scored, least: float) -> Scored:
        """Streamed units exchanged with residents at most three places away, while that is faster."""
        place = {unit.name: (unit.ring, unit.order) for unit in self.anatomy.units}
        improved = True
        while improved and best.timeline.total_ms > least * _CLOSE:
            improved = False
            for moving in list(best.placement.binding):
                ring, order = place[moving]
                near = [
                    n
                    for n in sorted(best.placement.resident, key=place.__getitem__)
                    if place[n][0] == ring and abs(place[n][1] - order) <= 3
                ]
                for staying in [None, *near]:
                    streamed = {*best.placement.binding, *([staying] if staying else [])} - {moving}
                    placement = self.units.placed(streamed, best.placement.num_slots)
                    if placement.num_bytes > self.capacity or not self.host.holds(self._streamed(placement)):
                        continue
                    if self.simulations >= _MOST_SIMULATIONS:
                        return best
                    tried = self._score(placement)
                    if tried.order < best.order and tried.timeline.total_ms < best.timeline.total_ms * 0.9999:
                        best, improved = tried, True
                        break
        return best


def scored(placement: Placement, homes: Mapping[str, str], anatomy: Anatomy, spec: StreamSpec, calibration: Calibration) -> Scored:
    """A placement with its timeline."""
    timeline = _simulated(placement.resident, placement.binding, placement.slots, homes, anatomy, spec, calibration, spans=False)
    return Scored(placement=placement, homes=homes, timeline=timeline)


def _simulated(
    resident: Collection[str],
    binding: Mapping[str, int],
    slots: Mapping[str, tuple[int, ...]],
    homes: Mapping[str, str],
    anatomy: Anatomy,
    spec: StreamSpec,
    calibration: Calibration,
    *,
    spans: bool,
) -> Timeline:
    return simulate(
        anatomy.units,
        resident,
        binding,
        slots,
        calibration.compute_ms,
        calibration.link_bytes_per_s,
        wrap=not spec.once,
        forwards=1 if spec.once else None,
        homes=homes,
        pageable_bytes_per_s=calibration.pageable_bytes_per_s,
        disk_bytes_per_s=calibration.disk_bytes_per_s or DISK_BYTES_PER_S,
        host_ms=calibration.host_ms,
        host_waits=calibration.host_waits,
        spans=spans,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Host:
    """What the host's memory holds of streamed units."""

    available: int | None
    pin_limit: int | None
    """None: no limit."""
    has_disk: bool

    @classmethod
    def of(cls, anatomy: Anatomy, spec: StreamSpec, available: int | None) -> _Host:
        room = None if available is None else max(0, available - sum(anatomy.host.values()))
        limit = spec.pin_limit_bytes if spec.pin_limit_bytes is not None or room is None else int(PIN_SHARE * room)
        return cls(available=room, pin_limit=limit, has_disk=spec.disk is not None)

    def holds(self, streamed: Sequence[Unit]) -> bool:
        """Locked as far as allowed, the rest pageable or on the disk. What the user allows to lock is taken at its word: memory of some machines grows."""
        size = sum(unit.num_bytes for unit in streamed)
        return self.has_disk or self.available is None or size <= max(self.available, self.pin_limit or 0)

    def homes(self, streamed: Sequence[Unit]) -> dict[str, str]:
        """Unit -> `pinned`, or spread evenly among these `pageable`, or `disk` where there is one."""
        size = sum(unit.num_bytes for unit in streamed)
        if self.pin_limit is None or size <= self.pin_limit:
            return {unit.name: "pinned" for unit in streamed}
        # What a disk is read into, and what pageable memory is copied through, is locked memory too.
        room = max(0, self.pin_limit - (DISK_BUFFERS if self.has_disk else STAGED) * max(unit.num_bytes for unit in streamed))
        steps = 2 * len(streamed)
        for share in range(-(-(size - room) * steps // size), steps + 1):
            beyond = set(spread(streamed, share, steps))
            if size - sum(unit.num_bytes for unit in streamed if unit.name in beyond) <= room:
                break
        return {unit.name: ("disk" if self.has_disk else "pageable") if unit.name in beyond else "pinned" for unit in streamed}

    def least_ms(self, moved: int, calibration: Calibration) -> float:
        """What moving these bytes takes, when as many as possible are locked."""
        link = calibration.link_bytes_per_s
        beyond = 0 if self.pin_limit is None else max(0, moved - self.pin_limit)
        if self.has_disk:
            return 1e3 * max(moved / link, beyond / (calibration.disk_bytes_per_s or DISK_BYTES_PER_S))
        return 1e3 * ((moved - beyond) / link + beyond / (calibration.pageable_bytes_per_s or link))

    def too_small(self, streamed: Sequence[Unit]) -> ResourceError:
        size = sum(unit.num_bytes for unit in streamed)
        return ResourceError(
            f"{format_bytes(size)} of weights would wait in host memory, which has {format_bytes(self.available or 0)} to spare",
            fix=f"`gpuopt stream pack` and --disk DIR, a larger --budget, or --pin-limit {-(-size // 2**20)}MiB if this machine's memory grows as it is used",
        )
