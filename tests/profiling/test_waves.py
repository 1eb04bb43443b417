"""Losses of products to their shapes, by hand."""

from __future__ import annotations

import pytest

from gpuopt.core.result import OpRecord
from gpuopt.core.trace import Kernel
from gpuopt.profiling import roofline
from gpuopt.profiling.waves import annotate, losses, product_shape, resident_blocks, tile_of, total_ms

NVJET = "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"
HOPPER = {"block": [384, 1, 1], "registers per thread": 168, "shared memory": 231424}


@pytest.mark.parametrize(
    "name, tile",
    [
        (NVJET, (128, 256)),
        ("nvjet_sm90_hss_64x8_64x16_1x1_h_bz_splitK_NNT", (64, 8)),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_32x5_tn", (128, 64)),
        (
            "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x192x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
            (128, 192),
        ),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_256x128_16x3_nn_align4>(Params)", (256, 128)),
        ("gemv2T_kernel_val", None),
        ("sm80_xmma_gemm_warpsize2x2x1_tensor16x8x8", None),
    ],
)
def test_a_tile_is_read_off_the_name(name, tile):
    assert tile_of(name) == tile


@pytest.mark.parametrize(
    "op, shapes, expected",
    [
        ("aten.mm", "8x4, 4x2", (8, 2, 4, 1)),
        ("aten.addmm", "2, 8x4, 4x2", (8, 2, 4, 1)),
        ("aten.bmm", "3x8x4, 3x4x2", (8, 2, 4, 3)),
        ("aten.convolution", "8x4x2x2, 4x4x1x1", None),
        ("aten.mv", "8x4, 4", None),
    ],
)
def test_a_product_is_read_off_its_shapes(op, shapes, expected):
    assert product_shape(OpRecord(op=op, module="", shapes=shapes)) == expected


def one(timeline, m, n, *, k=1024, grid, name=NVJET, launch=None, sms=132, batch=1):
    timeline.step(0, 1000)
    timeline.kernel(name, launch=1, start=10, dur=100, grid=grid, **(launch or HOPPER))
    op, shapes = ("aten.mm", f"{m}x{k}, {k}x{n}") if batch == 1 else ("aten.bmm", f"{batch}x{m}x{k}, {batch}x{k}x{n}")
    record = OpRecord(op=op, module="fc", dtype="float16", flops=1.0, bytes=1.0, time_ns=1e5, kernels=(name,), shapes=shapes)
    found = losses(timeline.trace(), [record], num_sms=sms, capability="9.0")
    return record, found


def test_a_product_that_fills_its_tiles_and_its_waves_loses_nothing(timeline):
    _, (loss,) = one(timeline, 132 * 256, 128, grid=[132, 1, 1])
    assert (loss.tile, loss.tile_share, loss.waves, loss.wave_share, loss.loss_ns, loss.note) == ((256, 128), 0.0, 1.0, 0.0, 0.0, "")


def test_a_last_wave_of_one_tile_costs_almost_half(timeline):
    _, (loss,) = one(timeline, 133 * 256, 128, grid=[133, 1, 1])
    assert loss.waves == pytest.approx(133 / 132)
    assert loss.wave_share == pytest.approx(1 - 133 / 264)
    assert "wave quantisation: its tiles of 256x128 fill 1.01 waves, 50% of the time SMs idle" in loss.note


def test_a_persistent_kernel_is_judged_by_its_tiles_not_by_its_grid(timeline):
    _, (loss,) = one(timeline, 200 * 256, 128, grid=[132, 1, 1])
    assert loss.waves == pytest.approx(200 / 132)


def test_fewer_tiles_than_sms_leave_sms_idle(timeline):
    _, (loss,) = one(timeline, 256 * 33, 128, grid=[33, 1, 1])
    assert loss.wave_share == pytest.approx(0.75)


def test_an_edge_that_hangs_over_is_lost(timeline):
    _, (loss,) = one(timeline, 132 * 256, 65, grid=[132, 1, 1])
    assert loss.tile_share == pytest.approx(1 - 65 / 128)
    assert "tile alignment: 33792x65 in tiles of 256x128 wastes 49%" in loss.note
    assert "n = 65 is no multiple of 16 bytes" in loss.note


def test_the_grid_says_which_way_a_tile_lies(timeline):
    _, (loss,) = one(timeline, 128 * 9, 256 * 3, grid=[27, 1, 1])  # the other way it would be 30
    assert loss.tile == (128, 256)


def test_without_a_described_launch_the_waves_are_unknown_and_the_tiles_are_not(timeline):
    record = OpRecord(op="aten.mm", module="fc", dtype="float16", time_ns=1e5, kernels=(NVJET,), shapes="100x64, 64x128")
    timeline.step(0, 100)
    timeline.kernel(NVJET, launch=1, start=10, dur=10)
    (loss,) = losses(timeline.trace(), [record], num_sms=132, capability="9.0")
    assert (loss.waves, loss.wave_share) == (None, 0.0)
    assert loss.tile_share == pytest.approx(1 - 100 / 256)
    assert losses(timeline.trace(), [record], num_sms=None, capability=None) == (loss,)


@pytest.mark.parametrize(
    "block, registers, shared, expected",
    [
        ((384, 1, 1), 168, 231424, 1),  # shared memory
        ((256, 1, 1), 255, 0, 1),  # registers: 256 * 256 of 65536
        ((256, 1, 1), 32, 0, 8),  # threads
        ((32, 1, 1), 16, 0, 32),  # blocks
        ((128, 1, 1), 128, 48 << 10, 4),
    ],
)
def test_what_fits_on_an_sm_at_once(block, registers, shared, expected):
    kernel = Kernel(
        name="k", start_ns=0, dur_ns=1, stream=7, correlation=1, op=None, step=0, block=block, registers=registers, shared_bytes=shared
    )
    assert resident_blocks(kernel, "9.0") == expected
    assert resident_blocks(kernel, "99.0") is None


def test_losses_are_summed_by_name_and_noted_on_their_points(timeline, h200):
    record, found = one(timeline, 133 * 256, 96, grid=[133, 1, 1])
    sums = total_ms(found)
    assert sum(sums.values()) == pytest.approx(found[0].loss_ns / 1e6)
    assert sums["tile alignment"] == pytest.approx(0.1 * 0.25)
    other = OpRecord(op="aten.add", module="fc", dtype="float16", flops=0.0, bytes=1.0, time_ns=1e3)
    points = annotate(roofline.points([record, other], h200, cache_bytes=None), [record, other], found)
    assert "wave quantisation" in points[0].note and points[1].note == ""
