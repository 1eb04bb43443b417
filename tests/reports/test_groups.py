"""Groupings of a run's records: whatever they are grouped by, they add up to the call."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.result import KernelTime, ModuleRow, RooflinePoint, Run, Waterfall
from gpuopt.reports import groups
from gpuopt.reports.content import grouped

BY = ("op", "kernel", "line", "place")


def point(name: str = "aten.mm", module: str = "a", time_ns: float = 1e6, **more: object) -> RooflinePoint:
    given: dict[str, object] = {
        "name": name,
        "module": module,
        "dtype": "float16",
        "count": 1,
        "time_ns": time_ns,
        "flops": 2e9,
        "bytes": 1e6,
        "intensity": 2e3,
        "bound": "compute",
        "pct_of_ceiling": 50.0,
        "ceiling": "fp16 measured",
        "floor_ns": time_ns / 2,
        **more,
    }
    return RooflinePoint(**given)  # type: ignore[arg-type]


def run(*points: RooflinePoint, wall_ms: float = 10.0) -> Run:
    return Run(model="m", backend="eager", roofline=points, waterfall=Waterfall(wall_ms=wall_ms, parts=(), unaccounted_ms=0.0))


names = st.sampled_from(["aten.mm", "aten.add", "void at::native::x_kernel<int>(float*)", "triton_poi_0", "memcpy h2d (pinned)"])
modules = st.sampled_from(["", "?", "a", "a.b", "a.b.0", "a.b.1", "c.0.d"])
kernels = st.lists(st.tuples(st.sampled_from(["gemm_k", "reduce_k", "copy_k"]), st.floats(0, 1e6)), max_size=3, unique_by=lambda k: k[0])


@st.composite
def runs(draw: st.DrawFn) -> Run:
    points = []
    for _ in range(draw(st.integers(0, 12))):
        ran = draw(kernels)
        time = math.fsum(ns for _, ns in ran) if ran else draw(st.floats(0, 1e6))
        points.append(
            point(
                draw(names),
                draw(modules),
                time,
                flops=draw(st.one_of(st.none(), st.floats(0, 1e12))),
                bytes=draw(st.one_of(st.none(), st.floats(0, 1e9))),
                floor_ns=draw(st.one_of(st.none(), st.floats(0, 1e6))),
                line=draw(st.sampled_from([None, "m.py:1", "m.py:2"])),
                kernels=tuple(KernelTime(name=name, time_ns=ns) for name, ns in ran),
            )
        )
    return run(*points, wall_ms=draw(st.floats(0.001, 100)))


@given(runs(), st.sampled_from(BY), st.sampled_from(["time", "flops", "bytes", "gap"]))
def test_rows_and_unknown_and_what_lies_outside_add_up_to_the_call(given: Run, by: str, sort: str) -> None:
    found = groups.grouped(given, by, sort)
    parts = [row.time_ns for row in found.rows] + ([found.unknown.time_ns] if found.unknown else []) + [found.outside_ns]
    assert all(part >= 0 for part in parts)
    assert math.fsum(parts) == pytest.approx(found.whole_ns, rel=1e-6, abs=1e-3)
    assert found.attributed is None or 0 <= found.attributed <= 1


@given(runs(), st.sampled_from(["op", "line", "place"]))
def test_flops_and_bytes_are_neither_lost_nor_made(given: Run, by: str) -> None:
    found = groups.grouped(given, by)
    rows = [*found.rows, *([found.unknown] if found.unknown else [])]
    for name in ("flops", "bytes"):
        told = math.fsum(getattr(row, name) or 0.0 for row in rows)
        assert told == pytest.approx(math.fsum(getattr(p, name) or 0.0 for p in given.roofline), rel=1e-9)


@given(runs())
def test_the_tree_adds_up_at_every_level(given: Run) -> None:
    found = groups.tree(given)
    if not found.has_times:
        return
    outer = [node.time_ns or 0.0 for node in found.nodes if node.depth == 1]
    outer += [node.time_ns or 0.0 for node in (found.own, found.unknown) if node is not None] + [found.outside_ns]
    assert math.fsum(outer) == pytest.approx(found.whole_ns, rel=1e-6, abs=1e-3)
    by_name = {node.name: node for node in found.nodes}
    for node in found.nodes[1:]:
        below = math.fsum(n.time_ns or 0.0 for n in by_name.values() if n.name.rpartition(".")[0] == node.name and n.name != node.name)
        assert below <= (node.time_ns or 0.0) * (1 + 1e-9) + 1e-6


def test_layers_of_a_stack_are_one_place_and_other_places_are_not() -> None:
    found = groups.grouped(run(*(point(module=f"layers.{i}.up") for i in range(4)), point(module="layers.0.down")), "place")
    assert [(row.where, row.calls, row.num_records) for row in found.rows] == [(("layers.*.up",), 4, 4), (("layers.*.down",), 1, 1)]


def test_a_kernel_nobody_called_by_an_op_is_not_attributed_to_one() -> None:
    found = groups.grouped(run(point("triton_poi_fused_0", "?"), point("aten.mm", "?", 3e6)), "op")
    assert [row.name for row in found.rows] == ["aten.mm"]
    assert found.unknown is not None and found.unknown.time_ns == 1e6 and found.attributed == 0.75


def test_a_kernel_has_its_own_time_and_the_flops_only_where_it_is_alone() -> None:
    both = point(
        time_ns=4e6, kernels=(KernelTime(name="gemm_k", time_ns=3e6, count=2), KernelTime(name="splitKreduce_kernel", time_ns=1e6))
    )
    alone = point(kernels=(KernelTime(name="gemm_k", time_ns=1e6),))
    rows = {row.name: row for row in groups.grouped(run(both, alone), "kernel").rows}
    assert (rows["gemm_k"].time_ns, rows["gemm_k"].calls, rows["gemm_k"].flops) == (4e6, 3, 2e9)
    assert (rows["splitKreduce_kernel"].time_ns, rows["splitKreduce_kernel"].flops) == (1e6, None)


def test_times_of_a_trace_that_took_longer_than_the_call_are_scaled_to_it() -> None:
    found = groups.grouped(run(point(time_ns=8e6), point("aten.add", time_ns=8e6), wall_ms=8.0), "op")
    assert found.scale == 0.5 and [row.time_ns for row in found.rows] == [4e6, 4e6] and found.outside_ns == 0


def test_a_group_half_of_whose_time_has_no_floor_has_no_percent() -> None:
    few = replace(point(), floor_ns=None, time_ns=3e6)
    assert groups.grouped(run(point(), few), "op").rows[0].pct_of_ceiling is None
    assert groups.grouped(run(point(time_ns=3e6), replace(few, time_ns=1e6)), "op").rows[0].pct_of_ceiling == 50.0


def test_a_depth_that_the_report_was_not_made_with_is_told_from_its_records() -> None:
    nodes = {node.name: node for node in groups.tree(run(point(module="a.b.c"), point(module="a.d"))).nodes}
    assert set(nodes) == {"", "a", "a.b", "a.b.c", "a.d"}
    assert nodes["a.b"].time_ns == 1e6 and nodes["a"].flops == 4e9


def test_modules_whose_parents_a_report_does_not_name_are_shown_all_the_same() -> None:
    given = replace(
        run(point(module="a.b")), modules=(ModuleRow(name="x.y.z", module_class="Z", depth=3, time_ns=1.0, flops=None, bytes=None),)
    )
    assert {node.name for node in groups.tree(given).nodes} == {"", "a", "a.b", "x.y.z"}


def test_what_has_no_floor_may_win_nothing() -> None:
    two = (KernelTime(name="gemm_k", time_ns=9e6), KernelTime(name="memset_k", time_ns=1e6))
    given = run(
        point(time_ns=10e6, kernels=two), point("aten.gelu", time_ns=4e6, kernels=(KernelTime(name="gelu_k", time_ns=4e6),)), wall_ms=20.0
    )
    found = groups.grouped(given, "kernel")
    rest = groups.added(found.rows, "more")
    assert rest.time_ns == pytest.approx(14e6)
    assert rest.gap_ns == pytest.approx(2e6)
    assert [row.gap_ns for row in groups.grouped(run(point(), replace(point(), floor_ns=None, time_ns=7e6)), "op").rows] == [
        pytest.approx(0.5e6)
    ]


def test_what_a_row_reaches_and_what_it_has_to_win_are_of_the_same_time() -> None:
    found = groups.grouped(run(point(time_ns=40e6, floor_ns=4e6), wall_ms=10.0), "op").rows[0]
    assert (found.time_ns, found.gap_ns) == (pytest.approx(10e6), pytest.approx(6e6))
    assert found.pct_of_ceiling == pytest.approx(40.0)


def test_no_flops_are_claimed_of_what_nobody_counted() -> None:
    given = run(point(flops=None, bytes=None), point("aten.copy_", flops=0.0, bytes=0.0))
    rows = groups.grouped(given, "op").rows
    whole = groups.added(rows, "one call")
    assert (whole.flops, whole.bytes) == (None, None)
    assert groups.added([row for row in rows if row.name == "aten.copy_"], "x").flops == 0.0


def test_a_trace_many_times_as_long_as_the_call_is_not_put_down_to_tracing_alone() -> None:
    calm, busy = run(point(time_ns=20e6), wall_ms=10.0), run(point(time_ns=1130e6), wall_ms=10.0)
    assert "tracing slows each op down" in grouped.scaled(calm, groups.grouped(calm, "op").scale)[0]
    said = grouped.scaled(busy, groups.grouped(busy, "op").scale)[0]
    assert "113 times as long" in said or "110 times as long" in said
    assert "profile again" in said
