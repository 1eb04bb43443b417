"""Tests of what records would take in another number format, and how much of it shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders import evidence
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.result import OpRecord
from gpuopt.doctor import recast

MM = OpRecord(op="aten.mm", module="fc", dtype="float32", time_ns=40e6, flops=50e12 * 0.03, bytes=1e6)


def made(*rows: OpRecord, **more: Any) -> Any:
    total = sum(r.time_ns or 0.0 for r in rows) / 1e6
    return evidence(records=rows, **{"wall_ms": total, **more})


def test_a_product_keeps_its_share_of_the_ceiling() -> None:
    """30 ms of floor in 40 ms: 75% of it. In TF32, 8 times as fast here: 3.75 ms of floor, 5 ms."""
    assert recast.saved_ms(made(MM), [MM], "tf32") == pytest.approx(35.0)


def test_a_product_at_its_ceiling_is_not_expected_to_stay_there() -> None:
    perfect = replace(MM, time_ns=30e6)
    assert recast.saved_ms(made(perfect), [perfect], "tf32") == pytest.approx(30 - 3.75 / recast.REACHED["matrix"])


def test_convolutions_in_nchw_gain_less_than_in_nhwc() -> None:
    conv = replace(MM, op="aten.cudnn_convolution", time_ns=30e6)
    plain = recast.saved_ms(made(conv), [conv], "float16")
    assert 0 < plain < recast.saved_ms(made(conv, transforms=("channels_last",)), [conv], "float16")


def test_a_memory_bound_op_takes_half_the_time_in_half_the_bytes() -> None:
    add = OpRecord(op="aten.add", module="", dtype="float32", time_ns=10e6, flops=0.0, bytes=20e9)
    assert recast.saved_ms(made(add), [add], "bfloat16") == pytest.approx(5.0)


def test_short_kernels_do_not_get_shorter() -> None:
    tiny = OpRecord(op="aten.add", module="", dtype="float32", count=100, time_ns=200e3, flops=0.0, bytes=1e3)
    assert recast.saved_ms(made(tiny), [tiny], "float16") == 0.0


def test_nothing_shows_where_the_device_waits_for_the_host() -> None:
    assert recast.saved_ms(made(MM, wall_ms=80.0), [MM], "tf32") == 0.0
    assert recast.saved_ms(made(MM, wall_ms=80.0, backend="cudagraphs"), [MM], "tf32") > 0


def test_the_host_keeps_its_own_time() -> None:
    many = replace(MM, count=2000)
    assert recast.saved_ms(made(many), [many], "tf32") == pytest.approx(40 - 2000 * recast.HOST_NS / 1e6)


@pytest.mark.parametrize("odd", [{"time_ns": None}, {"flops": None, "bytes": None}, {"dtype": None}, {"dtype": "int64"}, {"time_ns": 0.0}])
def test_what_is_not_known_saves_nothing(odd: dict[str, Any]) -> None:
    row = replace(MM, **odd)
    assert recast.saved_ms(made(row), [row], "tf32") >= 0.0
    assert recast.saved_ms(replace(made(row), device=None), [row], "tf32") == 0.0


@given(
    st.floats(1e3, 1e9), st.one_of(st.none(), st.floats(0, 1e15)), st.one_of(st.none(), st.floats(0, 1e12)), st.sampled_from(["tf32", "float16", "bfloat16", "float32"]),
    st.floats(0.0, 1e4),
)  # fmt: skip
def test_never_more_is_saved_than_it_takes(
    time_ns: float, flops: float | None, num_bytes: float | None, dtype: str, wall_ms: float
) -> None:
    row = replace(MM, time_ns=time_ns, flops=flops, bytes=num_bytes)
    assert 0.0 <= recast.saved_ms(made(row, wall_ms=wall_ms), [row], dtype) <= time_ns / 1e6
