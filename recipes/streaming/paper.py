"""A plan that was measured -> what the simulated device takes for it: the streamer itself, over slots and slabs a thousandth of the size, at the rates the plan was calibrated with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from gpuopt.core.streaming import Plan, Unit
from gpuopt.streaming.engines.simulated import SimulatedEngine
from gpuopt.streaming.streamer import Streamer
from gpuopt.streaming.timeline import DISK_BUFFERS

LARGEST = 1 << 16
"""Bytes of the largest unit, as it is copied here: times come from rates, which shrink alike."""
FORWARDS = 12
SETTLED = 6
"""Of them, the last are counted."""


class _Slabs:
    """One buffer for all units: their bytes are not looked at."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._bytes = torch.zeros(max(sizes.values(), default=0), dtype=torch.uint8)

    def bytes_for_copy(self, unit: str) -> torch.Tensor:
        return self._bytes[: self._sizes[unit]]

    def release(self, unit: str) -> None:
        """Nothing to give back."""

    def abort(self) -> None:
        """Nothing to forget."""

    def read(self, unit: str) -> torch.Tensor:
        return self.bytes_for_copy(unit)

    def close(self) -> None:
        """Nothing is held."""


def simulated_ms(plan: Plan) -> float:
    """Milliseconds a forward, in the steady state."""
    known = plan.calibration
    scale = max(1.0, max((unit.num_bytes for unit in plan.anatomy.units), default=1) / LARGEST)

    def small(num_bytes: int) -> int:
        return max(1, round(num_bytes / scale))

    units = tuple(replace(unit, num_bytes=small(unit.num_bytes)) for unit in plan.anatomy.units)
    shrunk = replace(
        plan,
        anatomy=replace(plan.anatomy, units=units),
        slots={ring: tuple(small(size) for size in sizes) for ring, sizes in plan.slots.items()},
    )
    engine = SimulatedEngine(
        known.link_bytes_per_s / scale,
        known.compute_ms,
        pageable_bytes_per_s=known.pageable_bytes_per_s / scale,
        disk_bytes_per_s=known.disk_bytes_per_s / scale if known.disk_bytes_per_s else None,
        disk_buffers=DISK_BUFFERS,
        host_ms=known.host_ms,
        host_waits=known.host_waits,
    )
    slabs = _Slabs({unit.name: unit.num_bytes for unit in units})
    streamer = Streamer(shrunk, engine, dict.fromkeys(plan.binding, slabs))
    ran = _running(units, known.compute_ms)
    for _ in range(FORWARDS):
        streamer.start_forward()
        with engine.segment(""):
            for unit in ran:
                moves = unit.name in plan.binding
                if moves:
                    streamer.before(unit.name)
                with engine.segment(unit.name, streamer.lanes[unit.name].slot.buffer if moves else None):
                    pass
                if moves:
                    streamer.after(unit.name)
    last = engine.forwards[-SETTLED:]
    return sum(forward.ms for forward in last) / len(last)


def _running(units: tuple[Unit, ...], compute_ms: Mapping[str, float]) -> list[Unit]:
    """Without rings that this workload does not run: an encoder runs once a prompt, not once a token."""
    rings = {unit.ring for unit in units if unit.name in compute_ms}
    return [unit for unit in units if unit.ring in rings or not rings]
