"""A plan and an engine -> the protocol of a forward: which copy goes into which slot, and who waits for whom. It knows units, slots and events, no modules.

Each streamed unit has one slot for ever; a slot has several units, which follow each other round. Per unit, nothing of which the host waits for:

1. `before`: the slot holds this unit (its copy was queued a round ago), or it is fetched now (counted: the order was not the planned one). Computing waits for `ready[unit]`.
2. the forward.
3. `after`: computing records `free[slot]`; the slot's next unit is queued for copying: the copies wait for `free[slot]`, copy, record `ready[next]`.

Events are recorded, then waited for, then recorded again: a wait means the last record before it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.streaming import Plan, Unit
from gpuopt.streaming.engines import Engine, Source
from gpuopt.streaming.slabs import checksum_tensor


@dataclass(slots=True, eq=False)
class Slot:
    """Device memory that units take turns in."""

    buffer: torch.Tensor
    free: Any
    """The event after its last reader."""
    lanes: list[Lane] = field(default_factory=list)
    """In the order of a forward."""
    owner: Lane | None = None
    """Whose bytes are there, or are queued to be."""
    reader: Lane | None = None
    """Whose forward is under way."""
    seen: list[Lane] = field(default_factory=list)
    """In this forward, in the order they ran."""

    def link(self, lanes: list[Lane], *, once: bool) -> None:
        """From now on they follow each other like this, round unless `once`."""
        self.lanes = lanes
        for lane, after in zip(lanes, lanes[1:] + ([] if once else lanes[:1])):
            lane.next = after if after is not lane else None
        if once and lanes:
            lanes[-1].next = None


@dataclass(slots=True, eq=False)
class Lane:
    """A streamed unit: its slot, its source, and who comes after it there."""

    unit: Unit
    slot: Slot
    target: torch.Tensor
    """The part of the slot that its bytes fill."""
    source: Source
    home: str
    ready: Any
    """The event after its copy."""
    next: Lane | None = None
    """None: the slot stays as it is (no other unit, or the last of a single forward)."""


class Streamer:
    """Runs the protocol. One forward at a time: `before` of one unit, `after` of it, then the next one's. `sources`: streamed unit -> who has its bytes."""

    def __init__(self, plan: Plan, engine: Engine, sources: Mapping[str, Source], *, poison: bool = False, audit: bool = False) -> None:
        """Allocates the slots. Raises OutOfMemory.

        Parameters
        ----------
        poison: slots get NaN bytes when they are freed, so that a read too early or too late shows.
        audit: keep the sum of each slot's bytes as computing finds them, for `audited`.
        """
        self.engine = engine
        self.demand_fetches = 0
        """Units that were not in their slot when their forward began."""
        self._demand_then = 0
        """When this forward began."""
        self.copies = 0
        self.bytes = 0
        """Copied to the device."""
        self.forwards = 0
        self.generation = 0
        """Grows with each forward that was broken off."""
        self._once = plan.spec.once
        self._poison = poison
        self._audit = audit
        self._sums: list[tuple[str, torch.Tensor]] = []
        self._lock = threading.Lock()
        self.lanes: dict[str, Lane] = {}
        units = {unit.name: unit for unit in plan.anatomy.units}
        self.slots: dict[str, tuple[Slot, ...]] = {
            ring: tuple(self._new_slot(num_bytes) for num_bytes in sizes) for ring, sizes in plan.slots.items()
        }
        # In the order of a forward, which is that of the anatomy.
        for name in (unit.name for unit in plan.anatomy.units if unit.name in plan.binding):
            unit = units[name]
            slot = self.slots[unit.ring][plan.binding[name]]
            lane = Lane(unit, slot, slot.buffer[: unit.num_bytes], sources[name], plan.homes.get(name, "pinned"), engine.event())
            assert lane.target.numel() == unit.num_bytes, "the planner gives units slots that hold them"
            slot.lanes.append(lane)
            self.lanes[name] = lane
        for slots in self.slots.values():
            for slot in slots:
                slot.link(slot.lanes, once=self._once)

    def _new_slot(self, num_bytes: int) -> Slot:
        slot = Slot(self.engine.slot(num_bytes), self.engine.event())
        # The memory may be an earlier tensor's whose kernels still run: the first copy waits for them too.
        self.engine.record_compute(slot.free)
        return slot

    def start_forward(self) -> None:
        """Queue the first unit of each slot that holds none, at the very first and after an abort; where nothing wraps round, of each slot."""
        self.forwards += 1
        surprised, self._demand_then = self.demand_fetches != self._demand_then, self.demand_fetches
        for slots in self.slots.values():
            for slot in slots:
                learnt = surprised and self._learn(slot)
                slot.seen.clear()
                if slot.lanes and (slot.owner is None or ((learnt or self._once) and slot.owner is not slot.lanes[0])):
                    self._fetch(slot.lanes[0])

    def _learn(self, slot: Slot) -> bool:
        """Blocks that ran in another order than they were registered in will do so again. What did not run, or twice, teaches nothing."""
        if slot.seen == slot.lanes or len(slot.seen) != len(slot.lanes) or len(set(map(id, slot.seen))) != len(slot.lanes):
            return False
        slot.link(list(slot.seen), once=self._once)
        return True

    def before(self, unit: str) -> None:
        """Computing of this unit may be queued when this returns. Raises UsageError where its slot is being read: a second forward at the same time."""
        lane = self.lanes[unit]
        slot = lane.slot
        with self._lock:
            if slot.reader is not None:
                raise UsageError(
                    f"{unit} was called while {slot.reader.unit.name} was running, whose weights lie in the same memory",
                    fix="run one forward at a time: a lock around the model, or one streamed copy a thread",
                )
            slot.reader = lane
        if len(slot.seen) <= len(slot.lanes):
            slot.seen.append(lane)
        try:
            if slot.owner is not lane:
                self.demand_fetches += 1
                self._fetch(lane)
            self.engine.wait_compute(lane.ready)
            if self._audit:
                self._sums.append((unit, checksum_tensor(lane.target)))
        except BaseException:
            slot.reader = None
            raise

    def after(self, unit: str) -> None:
        """All computing of this unit is queued."""
        lane = self.lanes[unit]
        slot = lane.slot
        follower = lane.next
        if follower is None:
            self.engine.record_compute(slot.free)
            slot.reader = None
            return
        if self._poison:
            self.engine.poison(slot.buffer)
        self.engine.record_compute(slot.free)
        slot.reader = None
        self._fetch(follower)

    def _fetch(self, lane: Lane) -> None:
        """Queue the copy of a unit behind the last reader of its slot. It never waits for the device; a disk's bytes, the host waits for."""
        slot = lane.slot
        # Whatever fails from here on, nobody may take the slot for what it was.
        slot.owner = None
        source = lane.source.bytes_for_copy(lane.unit.name)
        self.engine.wait_copy(slot.free)
        self.engine.copy(lane.target, source, home=lane.home)
        self.engine.record_copy(lane.ready)
        lane.source.release(lane.unit.name)
        slot.owner = lane
        self.copies += 1
        self.bytes += lane.unit.num_bytes

    def abort(self) -> None:
        """A forward broke off: wait until nothing runs, and forget what the slots hold. The next forward begins as the first did.

        Raises what the device raises where it is broken.
        """
        self.generation += 1
        for slots in self.slots.values():
            for slot in slots:
                slot.owner = slot.reader = None
                slot.seen.clear()
        self._sums.clear()
        self.engine.drain()
        for source in {id(lane.source): lane.source for lane in self.lanes.values()}.values():
            source.abort()

    def forget(self) -> None:
        """Nothing is queued any more, and slots and units point at each other no longer: a ring of references would keep the slots' memory until the garbage collector comes by."""
        for lane in self.lanes.values():
            lane.next = None
            lane.slot.lanes, lane.slot.seen, lane.slot.owner, lane.slot.reader = [], [], None, None
        self.lanes.clear()
        self.slots.clear()

    def __del__(self) -> None:
        # A model that is dropped while streamed has copies under way to memory that is about to be another tensor's.
        if not sys.is_finalizing():
            self.engine.drain()

    def audited(self) -> dict[str, list[int]]:
        """Unit -> the sums of its bytes as each of its forwards since the last call found them. Waits for the device."""
        found: dict[str, list[int]] = {}
        for unit, total in self._sums:
            found.setdefault(unit, []).append(int(total.item()))
        self._sums.clear()
        return found
