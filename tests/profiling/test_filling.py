"""How much of the multiprocessors' time no block has."""

from __future__ import annotations

from typing import Any

import pytest

from gpuopt.core.trace import Kernel
from gpuopt.profiling.filling import unfilled


class Traced:
    def __init__(self, *kernels: Kernel) -> None:
        self.kernels = kernels


def kernel(blocks: int | None, dur_ns: int = 100, *, step: int | None = 0, is_memset: bool = False) -> Kernel:
    grid = None if blocks is None else (blocks, 1, 1)
    return Kernel(name="k", start_ns=0, dur_ns=dur_ns, stream=7, correlation=None, op=None, step=step, grid=grid, is_memset=is_memset)


@pytest.mark.parametrize(
    ("kernels", "share"),
    [
        ([kernel(132)], 0.0),
        ([kernel(66)], 0.5),
        ([kernel(1)], 131 / 132),
        ([kernel(133)], 1 - 133 / 264),
        ([kernel(66, 300), kernel(264, 100)], 0.375),
        ([kernel(66), kernel(1, step=None), kernel(1, is_memset=True), kernel(None)], 0.5),
    ],
)
def test_the_last_wave_and_what_never_fills_one(kernels: list[Kernel], share: float) -> None:
    traced: Any = Traced(*kernels)
    assert unfilled(traced, 132) == pytest.approx(share)


def test_without_grids_or_a_number_of_multiprocessors_nothing_is_said() -> None:
    none: Any = Traced(kernel(None))
    some: Any = Traced(kernel(1))
    assert unfilled(none, 132) is None and unfilled(some, None) is None
