"""Which larger batches and other sizes are tried, and which are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpuopt.core.result import Device
from gpuopt.pipeline import probing
from gpuopt.timing.clocks import for_device

GPU = Device(id="cuda:0", name="GPU", kind="cuda", memory_bytes=1000)


def curve(tried: list[int], fails_at: int | None = None, **more: Any) -> dict[int, float]:
    def call(batch: int) -> Callable[[], None]:
        tried.append(batch)
        if batch == fails_at:
            raise RuntimeError("shape '[4, 8]' is invalid for input of size 64")
        return lambda: None

    given: dict[str, Any] = {"batch": 4, "wall_ms": 1.0, "peak_bytes": 10, "device": GPU, **more}
    return probing.curve(call, for_device("cpu"), **given)


@pytest.mark.parametrize(
    ("more", "batches"),
    [
        ({}, [8, 16]),
        ({"peak_bytes": 200}, [8]),
        ({"peak_bytes": 900}, []),
        ({"largest": 8}, [8]),
        ({"wall_ms": 170.0}, [8]),
        ({"wall_ms": 500.0}, []),
        ({"device": Device(id="cuda:0", name="GPU", kind="cuda", other_processes=1)}, []),
        ({"wall_ms": 0.0}, []),
    ],
)
def test_a_larger_batch_is_tried_where_time_memory_and_neighbours_allow(more: dict[str, Any], batches: list[int]) -> None:
    tried: list[int] = []
    found = curve(tried, **more)
    assert tried == batches
    assert list(found) == ([4, *batches] if batches else [])


def test_a_batch_that_fails_ends_the_curve_and_not_the_doctor() -> None:
    assert list(curve([], fails_at=16)) == [4, 8]
    assert curve([], fails_at=8) == {}


def test_sizes_stay_in_their_ranges_leave_out_one_and_move_one_dimension_at_a_time() -> None:
    found = list(probing.sizes({"N": 1, "S": 32, "H": 2}, {}))
    assert found == [
        [{"N": n, "S": 32, "H": 2} for n in (1, 2, 3, 4)],
        [{"N": 1, "S": s, "H": 2} for s in (32, 31, 30, 29)],
    ], "H has no three sizes from 2 on"
    (ranged,) = probing.sizes({"N": 4}, {"N": (1, 6)})
    assert [d["N"] for d in ranged] == [4, 5, 6, 3]
    assert list(probing.sizes({"N": 4}, {"N": (4, 4)})) == []
