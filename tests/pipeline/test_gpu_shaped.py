"""The whole profile and diagnosis on a trace in the shape of a GPU's, made from a CPU's: each op that computes becomes a kernel it launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuopt.core.result import Ceiling, Ceilings, Device
from gpuopt.core.trace import Copy, Kernel, RuntimeCall, Step, Trace
from gpuopt.pipeline.session import Session
from gpuopt.profiling import trace as profiler

NAMES = {
    "aten::addmm": "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT",
    "aten::mm": "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64",
    "aten::conv2d": "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64",
    "aten::relu": "void at::native::vectorized_elementwise_kernel<4, at::native::relu>",
    "aten::native_layer_norm": "void at::native::vectorized_layer_norm_kernel<c10::Half, float>",
    "aten::copy_": "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>",
    "aten::scaled_dot_product_attention": "void pytorch_flash::flash_fwd_kernel",
    "aten::gelu": "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>",
}
GPU = Device(
    id="cpu",  # what runs here is the CPU; all that is judged is the GPU
    name="NVIDIA H200", kind="cuda", capability="9.0", num_sms=132, memory_bytes=140 * 2**30, cache_bytes=50 * 2**20, power_limit_w=700.0,
    ceilings=Ceilings(
        rows=tuple(
            Ceiling(quantity=q, value=v, unit=unit, kind=kind, source="made up")
            for kind in ("measured", "spec")
            for q, v, unit in (
                ("fp16", 9e14, "FLOP/s"), ("tf32", 4e14, "FLOP/s"), ("fp32", 9e14, "FLOP/s"), ("memory", 4e12, "byte/s"), ("h2d", 5e10, "byte/s"), ("d2h", 5e10, "byte/s"),
            )
        )
    ),
)  # fmt: skip


def on_gpu(trace: Trace) -> Trace:
    """Kernels of 20 us for the ops that compute, launched by them, and one pageable copy a call before the first."""
    kernels, copies, runtime = [], [], []
    correlation, now = 0, 0
    for step, span in enumerate(trace.steps):
        correlation += 1
        now = max(now, span.start_ns)
        runtime.append(
            RuntimeCall(
                name="cudaMemcpyAsync",
                kind="copy",
                start_ns=span.start_ns,
                dur_ns=30_000,
                thread="1/1",
                correlation=correlation,
                op=None,
                step=step,
            )
        )
        copies.append(
            Copy(
                kind="h2d",
                memory="pageable",
                bytes=100_000,
                start_ns=now,
                dur_ns=20_000,
                stream=7,
                correlation=correlation,
                op=None,
                step=step,
            )
        )
        now += 20_000
        for op in trace.ops:
            if op.step != step or op.name not in NAMES:
                continue
            correlation += 1
            runtime.append(
                RuntimeCall(
                    name="cudaLaunchKernel",
                    kind="launch",
                    start_ns=op.start_ns,
                    dur_ns=4_000,
                    thread=op.thread,
                    correlation=correlation,
                    op=op.index,
                    step=step,
                )
            )
            now = max(now + 2_000, op.start_ns)
            kernels.append(
                Kernel(
                    name=NAMES[op.name],
                    start_ns=now,
                    dur_ns=20_000,
                    stream=7,
                    correlation=correlation,
                    op=op.index,
                    step=step,
                    grid=(64, 2, 1),
                    block=(384, 1, 1),
                    registers=168,
                    shared_bytes=200_000,
                    blocks_per_sm=0.97,
                )
            )
            now += 20_000
    steps = tuple(Step(start_ns=s.start_ns, dur_ns=max(s.dur_ns, now - s.start_ns)) for s in trace.steps[-1:])
    kept = len(trace.steps) - 1
    return Trace(
        device="cuda:0",
        steps=steps,
        kernels=tuple(replace(k, step=0) for k in kernels if k.step == kept),
        copies=tuple(replace(c, step=0) for c in copies if c.step == kept),
        runtime=tuple(replace(r, step=0) for r in runtime if r.step == kept),
        ops=tuple(replace(o, step=0 if o.step == kept else None) for o in trace.ops),
        modules=trace.modules,
    )


@pytest.mark.parametrize(
    "model", ["gpuopt.models:bert_large_tiny", "gpuopt.models:resnet101_tiny", "gpuopt.models:llama_8b_tiny", "gpuopt.models:t5_large_tiny"]
)
def test_a_gpu_shaped_trace_goes_through_every_part_of_a_profile(model: str, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = profiler.record
    monkeypatch.setattr(profiler, "record", lambda call, device, **more: on_gpu(record(call, device, **more)))
    session = Session()
    try:
        session.load(replace(tools.candidate(model), dims={"N": 2}))
        session.build()
        found = session.profile(GPU, wall_ms=50.0, depth=3)
        fall = found.waterfall
        assert sum(part.ms for part in fall.parts) == pytest.approx(50.0) and all(part.ms >= 0 for part in fall.parts)
        assert fall.ms("host-to-device (pageable)") > 0
        # Tiny products are bound by memory, whatever unit they run on.
        assert fall.ms("tensor-core compute", "other compute", "memory-bound") > 0.1
        assert found.bounds is not None and found.roofline and found.modules
        assert found.attributed is not None and found.attributed > 0.9
        findings = session.diagnose(GPU, ignore=[]).findings
        assert not [f.message for f in findings if "rule failed" in f.message]
        assert {"GPU101"} <= {f.code for f in findings}
    finally:
        session.close()
