"""Records + another number format -> the time they would save: the same share of the ceiling in the new format, and never below what a launch takes."""

from __future__ import annotations

from collections.abc import Iterable

from gpuopt.core import kernels
from gpuopt.core.result import Ceilings, OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.doctor import modules
from gpuopt.doctor.evidence import Evidence

LAUNCH_NS = 2_000.0
"""No kernel is shorter, whatever it does: an empty one takes about as long on an H200."""
HOST_NS = 14_000.0
"""What eager PyTorch's host side takes for an op and its launch: BERT-large and ResNet-101 at batch 1 take 14 to 20 µs a kernel on an H200."""
HOST_BOUND = 0.25
"""With more of the call than this idle, the host sets the pace: faster kernels only wait longer."""

REACHED = {"matrix": 0.87, "attention": 0.45, "convolution": 0.78, "nchw half": 0.27, "nchw tf32": 0.57}
"""Share of its floor a large product reaches on tensor cores: BERT-large and ResNet-101 on an H200 (recipes/profile/*-h200.json), convolutions in NCHW from the times of
recipes/resnet101/h200.json. A product that is better than this in its old format will not be in the new one."""

_STORED = {"tf32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
_MATRIX = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addbmm", "einsum", "mv", "addmv")


def short_name(record: OpRecord) -> str:
    """`aten.addmm` -> `addmm`; a kernel's name stays."""
    name = record.op.replace("::", ".")
    return name.split(".")[1].rstrip("_") if name.startswith(("aten.", "mkldnn.")) else name


def is_matrix(record: OpRecord) -> bool:
    """A matrix product: what `matmul.allow_tf32` governs."""
    return short_name(record) in _MATRIX


def is_convolution(record: OpRecord) -> bool:
    """A convolution of any library: what `cudnn.allow_tf32` governs."""
    return "conv" in short_name(record) and not record.op.startswith("triton_")


def is_attention(record: OpRecord) -> bool:
    """Fused attention."""
    return "attention" in short_name(record)


def is_product(record: OpRecord) -> bool:
    """Work for tensor cores."""
    return bool(record.flops) and (is_matrix(record) or is_convolution(record) or is_attention(record) or "rnn" in record.op)


def floor_ns(record: OpRecord, ceilings: Ceilings, dtype: str | None) -> float | None:
    """max(FLOPs / peak, bytes / bandwidth) with its elements stored and multiplied as `dtype`; None where no ceiling is known."""
    bandwidth = ceilings.bandwidth("measured")
    floors = []
    if record.flops:
        peak = ceilings.flops(dtype, "measured")
        if not peak:
            return None
        floors.append(record.flops / peak)
    if record.bytes and bandwidth:
        now, then = (DTYPE_BYTES.get(_STORED.get(d or "", d or "")) for d in (record.dtype, dtype))
        floors.append(record.bytes * (then / now if now and then else 1.0) / bandwidth)
    return max(floors) * 1e9 if floors else None


def saved_ms(evidence: Evidence, records: Iterable[OpRecord], dtype: str) -> float:
    """Milliseconds a call that `records` would take less in `dtype` (a torch dtype, or `tf32`), as far as the host lets it show. 0 where nothing can be said."""
    if evidence.device is None:
        return 0.0
    ceilings = evidence.device.ceilings
    is_nhwc = modules.is_channels_last(evidence)
    saved = 0.0
    for record in records:
        # TF32 allowed is not TF32 done: a library's kernel may multiply in plain fp32 all the same, and is then measured by that.
        now, then = floor_ns(record, ceilings, "float32" if _is_plain(record) else record.dtype), floor_ns(record, ceilings, dtype)
        if not record.time_ns or not now or not then or then >= now:
            continue
        # As far from its ceiling as now, or as products of its kind are on tensor cores; where a cache makes it faster than memory, at its new floor.
        share = min(1.0, now / record.time_ns, reach(record, dtype, is_nhwc))
        after = then / share
        saved += max(0.0, record.time_ns - max(after, min(record.time_ns, LAUNCH_NS * record.count)))
    return shown_ms(evidence, saved / 1e6)


def _is_plain(record: OpRecord) -> bool:
    """A product said to be TF32 whose kernels use no tensor cores."""
    ways = {kernels.on_tensor_cores(name) for name in record.kernels if kernels.kind(name) in ("product", "attention")}
    return record.dtype == "tf32" and ways == {False}


def reach(record: OpRecord, dtype: str, is_nhwc: bool) -> float:
    """Share of the floor to expect of it in `dtype`; 1 for what is no product for tensor cores."""
    if dtype not in (*modules.HALVES, "tf32") or not record.flops:
        return 1.0
    if is_attention(record):
        return REACHED["attention"]
    if is_convolution(record):
        return REACHED["convolution" if is_nhwc else "nchw tf32" if dtype == "tf32" else "nchw half"]
    return REACHED["matrix"] if is_matrix(record) else 1.0


def shown_ms(evidence: Evidence, saved: float, gone: float = 0.0) -> float:
    """How much of device time saved shows in the wall time: nothing where the device waits for the host, and no more than what leaves the host its own time.

    gone: launches a call that go with it, which the host need not make either.
    """
    wall = evidence.wall_ms
    if wall is None or not evidence.records or not evidence.on_gpu or _is_replayed(evidence):
        return saved
    busy = sum(r.time_ns or 0.0 for r in evidence.records) / 1e6
    if wall <= 0 or (wall - busy) / wall > HOST_BOUND:
        return 0.0
    if evidence.backend != "eager":
        return saved
    launches = sum(r.count for r in evidence.records if r.time_ns)
    return max(0.0, min(saved, wall - max(0.0, launches - gone) * HOST_NS / 1e6))


def total_ms(records: Iterable[OpRecord]) -> float:
    """Their time a call."""
    return sum(r.time_ns or 0.0 for r in records) / 1e6


def wall_share_ms(evidence: Evidence, records: Iterable[OpRecord]) -> float:
    """Their time in an untraced call. On a GPU a kernel lasts as long as it lasts; on a CPU a profiler stretches each op by about as much, so a record is worth its share of all
    records, and never more than that of the wall time."""
    taken = total_ms(records)
    whole = total_ms(evidence.records)
    if evidence.on_gpu or evidence.wall_ms is None or not whole:
        return taken
    return taken * min(1.0, evidence.wall_ms / whole)


def _is_replayed(evidence: Evidence) -> bool:
    """From a CUDA graph: the host launches once."""
    preset = evidence.preset or ""
    graphed = preset.endswith(("reduce-overhead", "graphed")) or preset in ("max-autotune", "max-autotune-freezing")
    return evidence.backend in ("cudagraphs", "trt") or graphed
