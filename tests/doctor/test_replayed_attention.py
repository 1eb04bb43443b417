"""Attention on its math path inside a CUDA graph: a replay has no ops and no modules, its kernels alone tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from builders import US, Tape, evidence
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count, Finding, OpRecord
from gpuopt.core.spec import TensorSpec
from gpuopt.doctor.diagnose import diagnose

LAYERS = 24
AT = "void at::native::"
COPY = f"{AT}elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda()#3}}::operator()() const>"
CAST = f"{AT}vectorized_elementwise_kernel<8, at::native::float16_copy_kernel_cuda(at::TensorIteratorBase&)::{{lambda(float)#1}}, std::array<char*, 2ul> >(int)"
SCORES = "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8_stage3_warpsize1x2x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas"
SOFTMAX = "void (anonymous namespace)::softmax_warp_forward<float, float, float, 9, false, false>(float*, float const*, int, int, int, bool const*, int, bool)"
PRODUCT = "nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT"
NORM = f"{AT}(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float, false>(int, float, c10::Half const*)"
FUSED = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0"
# What eager launched for one layer's attention on an H200, in its order (torch 2.11, fp16, a mask made inside the graph).
MATH = (
    (COPY, 200), (COPY, 200), (SCORES, 1300), (SOFTMAX, 900), (f"{AT}vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::isneginf_kernel_impl>", 400),
    (f"{AT}reduce_kernel<512, 1, at::native::ReduceOp<bool, at::native::func_wrapper_t<bool, at::native::and_kernel_cuda> > >", 300),
    (f"{AT}elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::(anonymous namespace)::where_kernel_impl(at::TensorIterator&)> >", 900),
    (CAST, 500), (COPY, 600), (SCORES, 1300), (CAST, 100),
)  # fmt: skip


class Encoder(nn.Module):
    """As little of BERT as takes ids and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.dense = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.dense(self.words(input_ids))


def replayed(attention: tuple[tuple[str, int], ...], *, product: str = PRODUCT, **more: Any) -> tuple[Finding, ...]:
    """Findings about 24 layers of a BERT-large that a CUDA graph replays: one launch, kernels without ops."""
    tape = Tape()
    tape.call("cudaGraphLaunch", "graph", 900 * US)
    for _ in range(LAYERS):
        for name, dur_us in ((product, 200), *attention, (product, 400), (NORM, 30)):
            tape.kernel(name, dur_us * US, op=None)
    flops = 4.0 * 64 * 16 * 512 * 512 * 64 * LAYERS
    record = OpRecord(op="aten.scaled_dot_product_attention", module="layer", dtype="float16", count=LAYERS, flops=flops, bytes=1e9)
    base = evidence(
        tape, backend="cudagraphs", precision="fp16", module=Encoder().half().eval().requires_grad_(False), batch=64,
        count=Count(records=(record,), flops=flops, flops_by_dtype={"float16": flops}, bytes=1e9, coverage=1.0),
        inputs=Inputs(
            kwargs={"input_ids": torch.zeros(64, 512, dtype=torch.int64)}, specs=(TensorSpec.parse("input_ids:int64[N,S]<16"),),
            dims={"N": 64, "S": 512},
        ),
    )  # fmt: skip
    return tuple(f for f in diagnose(replace(base, **more)) if f.code == "GPU306")


def test_math_attention_in_a_replayed_graph_is_found_with_the_mask_as_its_change() -> None:
    (only,) = replayed(MATH)
    assert only.change is not None and only.change.inputs == ("attention_mask:int64[N,S]=1",) and only.safe
    assert "2 products" not in only.message and "48 products" in only.message and "24 softmax passes" in only.message


def test_all_passes_over_the_scores_between_the_two_products_are_its_time() -> None:
    (only,) = replayed(MATH)
    between = sum(us for name, us in MATH[2:10]) * LAYERS / 1e3
    assert only.time_ms is not None and abs(only.time_ms - between) < 0.01 * between
    assert only.gain_high_ms is not None and only.gain_high_ms <= only.time_ms * 1.1


def test_a_fused_kernel_in_the_graph_is_no_finding() -> None:
    assert replayed(((FUSED, 200),)) == ()


def test_a_program_that_asked_for_fp32_is_no_finding() -> None:
    assert replayed(MATH, precision="fp32") == ()


def test_a_model_without_a_mask_argument_is_told_what_else_to_do() -> None:
    (only,) = replayed(MATH, module=nn.Sequential(nn.Linear(8, 8)).half())
    assert only.change is None and "eager" in only.fix
