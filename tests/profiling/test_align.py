"""A step's kernels meet the launches of an artifact: by name, by op, by kind, in order, and never by guessing."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.launches import Launch, common, module_of
from gpuopt.profiling import align
from gpuopt.profiling.launched import canonical

GEMM, FLASH = "nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"
SPLIT_K, MEMSET = "void splitKreduce_kernel<32, 16, int, float>", "Memset (Device)"


def triton(name: str, module: str) -> Launch:
    return Launch(name=f"triton_poi_fused_{name}", kind="triton", modules=(module,))


def extern(op: str, module: str) -> Launch:
    return Launch(name=f"extern_kernels.{op}", kind="extern", modules=(module,))


def ran(*names: str) -> list[align.Ran]:
    return [align.Ran(name=name) for name in names]


def match(kernels: list[align.Ran], launches: list[Launch]) -> list[int | None]:
    return align.match(kernels, launches, canonical)


STEPS = st.lists(st.sampled_from(["add_0", "relu_1", "mm", "sdpa"]), max_size=12)
NOISE = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["triton_poi_fused_add_0", "foreign", GEMM, MEMSET, "nobody"])), max_size=6)
LOST = st.sets(st.integers(0, 20), max_size=5)


def launch_of(kind: str, at: int) -> Launch:
    return triton(kind, f"m{at}") if "_" in kind else extern("mm" if kind == "mm" else "scaled_dot_product_attention", f"m{at}")


def kernel_of(kind: str) -> str:
    return f"triton_poi_fused_{kind}" if "_" in kind else {"mm": GEMM, "sdpa": FLASH}[kind]


@given(STEPS, LOST, NOISE)
def test_no_kernel_goes_to_a_launch_of_another_name_and_the_order_is_kept(
    kinds: list[str], lost: set[int], noise: list[tuple[int, str]]
) -> None:
    launches = [launch_of(kind, at) for at, kind in enumerate(kinds)]
    kernels = [align.Ran(name=kernel_of(kind)) for at, kind in enumerate(kinds) if at not in lost]
    for at, name in noise:
        kernels.insert(at % (len(kernels) + 1), align.Ran(name=name, is_foreign=name == "foreign"))
    found = match(kernels, launches)
    placed = [launch for launch in found if launch is not None]
    assert placed == sorted(placed)
    for kernel, launch in zip(kernels, found, strict=True):
        if launch is None:
            continue
        assert not kernel.is_foreign
        if launches[launch].kind == "triton":
            assert kernel.name == launches[launch].name
        else:
            assert not kernel.name.startswith("triton_")
    for at, launch in enumerate(launches):
        if launch.kind == "triton":
            assert placed.count(at) <= 1


@given(STEPS)
def test_a_step_that_ran_as_written_is_matched_whole(kinds: list[str]) -> None:
    launches = [launch_of(kind, at) for at, kind in enumerate(kinds)]
    assert match(ran(*(kernel_of(kind) for kind in kinds)), launches) == list(range(len(kinds)))


@given(STEPS, st.integers(0, 12))
def test_a_kernel_that_was_lost_misplaces_no_other(kinds: list[str], lost: int) -> None:
    """Where two places are possible for what is left, neither is taken."""
    launches = [launch_of(kind, at) for at, kind in enumerate(kinds)]
    true = [at for at in range(len(kinds)) if at != lost]
    found = match(ran(*(kernel_of(kinds[at]) for at in true)), launches)
    assert all(launch in (None, at) for at, launch in zip(true, found, strict=True))


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_the_common_part_is_as_long_as_it_can_be(left: list[str], right: list[str]) -> None:
    best = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], best[i][j] + (a == b))
    table = np.array([[a == b for b in "abc"] for a in "abc"])
    late = align._latest(table, np.array(["abc".index(a) for a in left], dtype=int), np.array(["abc".index(b) for b in right], dtype=int))
    pairs = [(i, j) for i, j in enumerate(late) if j is not None]
    assert len(pairs) == best[-1][-1]
    assert all(left[i] == right[j] for i, j in pairs)
    assert [j for _, j in pairs] == sorted({j for _, j in pairs})
    # Of what could be matched otherwise too, nothing stands that makes a difference.
    sure = align.common(left, right, lambda a, b: a == b, settled=lambda a, b: False)
    assert all(j is None or j == late[i] for i, j in enumerate(sure))


def test_what_prepares_and_finishes_an_op_goes_with_it() -> None:
    launches = [triton("add_0", "norm"), extern("mm", "a"), extern("mm", "b"), triton("relu_1", "act")]
    kernels = ran("triton_poi_fused_add_0", MEMSET, GEMM, SPLIT_K, MEMSET, GEMM, SPLIT_K, "triton_poi_fused_relu_1")
    assert match(kernels, launches) == [0, 1, 1, 1, 2, 2, 2, 3]


def test_two_products_where_one_ran_are_left_open() -> None:
    launches = [triton("add_0", "norm"), extern("mm", "a"), extern("mm", "b"), triton("relu_1", "act")]
    assert match(ran("triton_poi_fused_add_0", GEMM, "triton_poi_fused_relu_1"), launches) == [0, None, 3]
    same = [launches[0], extern("mm", "a"), extern("mm", "a"), launches[3]]
    assert match(ran("triton_poi_fused_add_0", GEMM, "triton_poi_fused_relu_1"), same)[1] in (1, 2)


def test_an_op_of_many_kernels_is_one_launch_where_the_trace_tells_its_calls() -> None:
    launches = [extern("mm", "a"), extern("mm", "b")]
    kernels = [align.Ran(name=name, op="aten.mm", instance=call) for call, name in ((7, GEMM), (7, SPLIT_K), (9, MEMSET), (9, GEMM))]
    assert match(kernels, launches) == [0, 0, 1, 1]


def test_an_op_whose_kernels_have_any_name_takes_what_lies_between_its_neighbours() -> None:
    launches = [triton("add_0", "norm"), Launch(name="aten.sort", kind="extern", modules=("topk",)), triton("relu_1", "act")]
    kernels = ran("triton_poi_fused_add_0", "DeviceRadixSortHistogramKernel", "DeviceRadixSortOnesweepKernel", "triton_poi_fused_relu_1")
    assert match(kernels, launches) == [0, 1, 1, 2]


def test_a_kernel_of_another_op_belongs_to_nobody() -> None:
    kernels = [align.Ran(name="multi_tensor_apply_kernel", is_foreign=True), align.Ran(name=GEMM)]
    assert match(kernels, [extern("convolution", "stem")]) == [None, 0]


def test_launches_that_name_their_kernels_are_matched_by_them() -> None:
    launches = [
        Launch(name="/a/MatMul", kind="node", modules=("a",), kernels=(GEMM,)),
        Launch(name="/a/Gelu", kind="node", modules=("a",), kernels=("k1", "k2")),
    ]
    assert match(ran(GEMM, "k2"), launches) == [0, 1]


def test_a_step_too_long_to_compare_is_left_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(align, "MAX_CELLS", 3)
    assert match(ran(GEMM, GEMM), [extern("mm", "a"), extern("mm", "b")]) == [None, None]


def test_a_launch_goes_to_the_lowest_module_around_all_of_its_own() -> None:
    assert common(("a.b.c", "a.b", "a.b.d")) == "a.b"
    assert common(("a.b", "a.bc")) == "a"
    assert common(("a", "b")) == common(("",)) == ""
    assert module_of(Launch(name="k", kind="triton")) is None
    assert module_of(Launch(name="k", kind="triton", modules=("a.b", "a.c"))) == "a"
    assert module_of(Launch(name="k", kind="triton", modules=("a.b", "a.c"), home="a.c")) == "a.c"


def test_a_partner_between_the_first_and_the_last_one_is_possible_too() -> None:
    """The kernel may be any of the three: that the first and the last are of one module says nothing of the second."""
    launches = [triton("add_0", "a"), triton("add_0", "b"), triton("add_0", "a")]
    assert match(ran("triton_poi_fused_add_0"), launches) == [None]
    launches[1] = triton("relu_1", "b")
    assert match(ran("triton_poi_fused_add_0"), launches) != [None]
