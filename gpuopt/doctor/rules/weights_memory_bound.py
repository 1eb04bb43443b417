"""GPU406: the call's time is the time it takes to read the weights."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.doctor import recast, weights, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

MIN_RATE = 0.7
"""Of the measured bandwidth, while products run: above it, they wait for memory and for nothing else."""
MIN_WEIGHTS = 0.7
"""Of the products' bytes."""
MIN_SHARE = 0.5
"""Of the call's device time in such products."""


def reads_weights(found: weights.Products) -> bool:
    """Decode-like: products that stream weights at memory speed, with few FLOPs a byte."""
    return (
        found.rate >= MIN_RATE * found.bandwidth
        and found.weight_bytes >= MIN_WEIGHTS * found.bytes
        and found.share >= MIN_SHARE
        and found.intensity < found.ridge / 2
    )


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: priced as the bytes that 8-bit weights would not read."""
    found = weights.products(evidence)
    if not evidence.on_gpu or found is None or not reads_weights(found):
        return
    width = DTYPE_BYTES.get({"tf32": "float32"}.get(found.dtype, found.dtype), 2)
    saved_ms = recast.shown_ms(evidence, found.weight_bytes * (1 - 1 / width) / found.rate * 1e3)
    finding = Finding(
        code="",
        severity="info",
        message=f"{units.format_bytes(found.weight_bytes)} of weights are read in {words.ms(found.time_ms)} at {units.format_bytes_per_s(found.rate)}, "
        f"{words.share(found.rate / found.bandwidth)} of the bandwidth, at {words.number(found.intensity, 'FLOP')} a byte (compute binds from {words.digits(found.ridge)})",
        fix="more samples a call (batching costs next to nothing here), or weights in int8: --precision w8 (w4 halves them again)",
        op="aten::mm",
        bytes=found.weight_bytes,
        time_ms=found.time_ms,
    )
    # Dequantising costs a little, and small kernels do not shrink with the weights.
    yield priced(finding, saved_ms, low=0.6, high=1.0, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU406",
    name="weights-memory-bound",
    what="Products read their weights at the full speed of memory and compute almost nothing with them.",
    why="Every weight is read for each call, however few samples it serves: nothing but fewer bytes or more samples helps.",
    before="y = model(x)  # one token at a time, bf16",
    after="gpuopt bench model.pt --precision w8 --backend inductor:max-autotune",
    safe=False,
    needs=frozenset({"records", "device"}),
    find=find,
    source="Williams et al. 2009, the roofline; ceilings measured on this machine",
)
