"""GPU604: a call nearly fills the GPU's memory."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

FULL = 0.9
"""Of the memory there is: CUDA's context, cuBLAS workspaces and fragments take a few percent more than a peak counts."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding with the peak and what is left."""
    assert evidence.device is not None and evidence.peak_bytes is not None
    total = evidence.device.memory_bytes
    if not evidence.on_gpu or not total or evidence.peak_bytes <= FULL * total:
        return
    half = (
        evidence.precision in (None, "fp32", "tf32", "fp64") and evidence.count is not None and evidence.count.flops_by_dtype.get("float32")
    )
    smaller = f"--dim N={max(1, evidence.batch // 2)}" if evidence.batch > 1 else "shorter inputs"
    yield Finding(
        code="",
        severity="warning",
        message=f"a call peaks at {units.format_bytes(evidence.peak_bytes)} of {units.format_bytes(total)} ({words.share(evidence.peak_bytes / total)}): "
        f"{units.format_bytes(max(0, total - evidence.peak_bytes))} left",
        fix=f"a smaller batch ({smaller})"
        + (", or --precision bf16, which halves it" if half else "")
        + ", or weights streamed from the host",
        bytes=float(evidence.peak_bytes),
    )


RULE = Rule(
    code="GPU604",
    name="memory-nearly-full",
    what="A call takes nearly all memory of the GPU.",
    why="The next longer input runs out of memory, and the allocator frees and allocates again under pressure, which stalls the GPU.",
    before="serve(batch=96)  # 135 of 140 GiB",
    after="serve(batch=64)  # 92 of 140 GiB",
    safe=False,
    needs=frozenset({"device", "peak_bytes"}),
    find=find,
    source="90%, as torch's TensorBoard profiler warns at",
)
