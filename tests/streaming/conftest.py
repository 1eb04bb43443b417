"""Plans made by hand, and tiny models, for tests of streaming."""

from collections.abc import Callable, Collection, Mapping

import pytest
import torch
from torch import nn

from gpuopt.core.streaming import Calibration, Ledger, Plan, StreamSpec
from gpuopt.streaming.anatomy import dissect


def plan_for(
    module: nn.Module,
    *,
    num_slots: int = 2,
    resident: Collection[str] = (),
    homes: Mapping[str, str] | None = None,
    granularity: str = "block",
    embed: str = "device",
    compute_ms: Mapping[str, float] | None = None,
    link_bytes_per_s: float = 1e9,
    **spec: bool,
) -> Plan:
    """Units in turns over the slots of their ring; nothing is small enough to stay."""
    anatomy = dissect(module, granularity, embed, small_bytes=1)
    binding: dict[str, int] = {}
    sizes: dict[str, list[int]] = {}
    for unit in anatomy.units:
        if unit.name in resident:
            continue
        ring = sizes.setdefault(unit.ring, [])
        slot = sum(1 for name in binding if next(u for u in anatomy.units if u.name == name).ring == unit.ring) % num_slots
        if slot == len(ring):
            ring.append(0)
        ring[slot] = max(ring[slot], unit.num_bytes)
        binding[unit.name] = slot
    streamed = sum(u.num_bytes for u in anatomy.units if u.name in binding)
    return Plan(
        spec=StreamSpec(budget_share=0.5, **spec),
        anatomy=anatomy,
        calibration=Calibration(
            device="simulated",
            link_bytes_per_s=link_bytes_per_s,
            pageable_bytes_per_s=link_bytes_per_s / 6,
            compute_ms=dict(compute_ms or {}),
        ),
        resident=tuple(u.name for u in anatomy.units if u.name in resident),
        slots={ring: tuple(s) for ring, s in sizes.items()},
        binding=binding,
        homes={name: (homes or {}).get(name, "pinned") for name in binding},
        ledger=Ledger(),
        budget_bytes=1 << 30,
        streamed_bytes=streamed,
        compute_ms=0.0,
        link_ms=0.0,
        bound_ms=0.0,
        predicted_ms=0.0,
        stall_ms=0.0,
    )


@pytest.fixture
def planned() -> Callable[..., Plan]:
    """`planned(module, num_slots=2, resident=(), …) -> Plan`."""
    return plan_for


class Stack(nn.Module):
    """Equal blocks one after the other; `order` says which run, and when."""

    def __init__(self, num_blocks: int = 6, width: int = 16) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(num_blocks))
        self.outlet = nn.Linear(width, 4)
        self.order = list(range(num_blocks))
        self.fail_after: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x)
        for step, index in enumerate(self.order):
            if step == self.fail_after:
                raise RuntimeError("between two blocks")
            x = self.blocks[index](x)
        return self.outlet(x)


@pytest.fixture
def stack() -> Callable[..., Stack]:
    """`stack(num_blocks=6, width=16) -> Stack`, in eval mode, always with the same weights."""

    def make(**options: int) -> Stack:
        torch.manual_seed(0)
        with torch.inference_mode(False):
            return Stack(**options).eval()

    return make
