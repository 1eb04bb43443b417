"""The trap of compiled BERT: its mask is made inside the graph and attention runs in fp32; and the same model with fused kernels."""

from __future__ import annotations

import torch
from builders import MS, evidence
from playing import GEMM, Played
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count, OpRecord
from gpuopt.core.spec import TensorSpec
from gpuopt.doctor.evidence import Evidence

CODE = "GPU306"
SCORES = "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x128x8_stage3_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas"
SOFTMAX = "triton_per_fused__safe_softmax__to_copy_add_mul_3"
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::half_t> >(pytorch_flash::Flash_fwd_params)"
LAYERS = 24
FLOPS = 4.0 * 64 * 16 * 512 * 512 * 64 * LAYERS


class Encoder(nn.Module):
    """As little of BERT as takes ids and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.dense = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.dense(self.words(input_ids))


def step(*, fused: bool) -> Played:
    tape = Played()
    for _ in range(LAYERS):
        tape.run("CompiledFxGraph", GEMM, int(1.4 * MS))
        if fused:
            tape.run("CompiledFxGraph", FLASH, int(0.19 * MS))
        else:
            tape.run("CompiledFxGraph", SCORES, int(0.9 * MS))
            tape.run("CompiledFxGraph", SOFTMAX, int(0.5 * MS))
            tape.run("CompiledFxGraph", SCORES, int(0.9 * MS))
    tape.wait("cudaDeviceSynchronize")
    return tape


def seen(tape: Played, **more: object) -> Evidence:
    ids = torch.zeros(64, 512, dtype=torch.int64)
    specs = (TensorSpec.parse("input_ids:int64[N,S]<16"),)
    attention = OpRecord(op="aten.scaled_dot_product_attention", module="layer", dtype="float16", count=LAYERS, flops=FLOPS, bytes=1e9)
    inputs = Inputs(kwargs={"input_ids": ids}, specs=specs, dims={"N": 64, "S": 512})
    module = Encoder().half().eval().requires_grad_(False)
    count = Count(records=(attention,), flops=FLOPS, flops_by_dtype={"float16": FLOPS}, bytes=1e9, coverage=1.0)
    return evidence(tape, backend="inductor", precision="fp16", module=module, inputs=inputs, count=count, batch=64, **more)


def bad() -> Evidence:
    return seen(step(fused=False))


def clean() -> Evidence:
    return seen(step(fused=True))


GAIN_MS = step(fused=False).ms - step(fused=True).ms
