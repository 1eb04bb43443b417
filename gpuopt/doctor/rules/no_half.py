"""GPU203: work for tensor cores runs in fp32 or TF32 where 16 bits would do."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core import units
from gpuopt.core.result import Finding
from gpuopt.core.spec import Change, Precision
from gpuopt.doctor import recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

WORTH = 0.05
"""Share of the device time in fp32 products below which a cast of the whole model is not advised."""
_WIDE_RANGE = ("t5", "mt5", "umt5", "gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3", "mixtral", "falcon", "olmo2")
"""transformers' model types trained in bf16 whose activations are known to, or may, pass fp16's 65504."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: all floating fp32 and TF32 records, priced per record at half the bytes and the 16-bit peak."""
    device = evidence.device
    assert device is not None
    half = _half(evidence)
    if not evidence.on_gpu or half is None:
        return
    rows = [r for r in evidence.records if r.dtype in ("float32", "tf32") and r.time_ns]
    products = [r for r in rows if recast.is_product(r)]
    busy, taken = recast.total_ms(evidence.records), recast.total_ms(products)
    if not products or taken < WORTH * busy:
        return
    flops, whole = sum(r.flops or 0.0 for r in products), sum(r.flops or 0.0 for r in evidence.records)
    formats = " and ".join(sorted({"fp32" if r.dtype == "float32" else "TF32" for r in products}))
    other = "; TF32 (GPU202) is the alternative, the two gains do not add up" if "fp32" in formats else ""
    worst = max(products, key=lambda r: r.time_ns or 0.0)
    finding = Finding(
        code="",
        severity="warning",
        message=f"{words.share(flops / whole)} of the FLOPs ({units.format_flops(flops)}) run in {formats}, {words.ms(taken)} of {words.ms(busy)} on the device, "
        f"where {half.value} has {_ratio(evidence, products[0].dtype, half):.3g} times the rate and half the bytes{other}",
        fix=f"model.{'half' if half is Precision.FP16 else 'bfloat16'}() and floating inputs likewise, or --precision {half.value}",
        module=worst.module,
        op=worst.op,
        count=sum(r.count for r in products),
        time_ms=recast.total_ms(rows),
        change=Change(precision=half),
    )
    yield priced(finding, recast.saved_ms(evidence, rows, half.dtype), wall_ms=evidence.wall_ms)


def _half(evidence: Evidence) -> Precision | None:
    """bf16 where the model was trained in it, fp16 otherwise, whichever this GPU has."""
    assert evidence.device is not None
    ceilings = evidence.device.ceilings
    config = getattr(evidence.module, "config", None)
    stored = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "")
    is_wide = (
        "bfloat16" in stored
        or getattr(config, "model_type", "") in _WIDE_RANGE
        or bool(getattr(evidence.module, "_keep_in_fp32_modules", None))
    )
    order = (Precision.BF16, Precision.FP16) if is_wide else (Precision.FP16, Precision.BF16)
    return next((p for p in order if ceilings.flops(p.dtype, "measured")), None)


def _ratio(evidence: Evidence, now: str | None, then: Precision) -> float:
    assert evidence.device is not None
    ceilings = evidence.device.ceilings
    before, after = ceilings.flops(now, "measured"), ceilings.flops(then.dtype, "measured")
    return after / before if before and after else 2.0


RULE = Rule(
    code="GPU203",
    name="no-half",
    what="Products that tensor cores could take in 16 bits run in fp32 or TF32.",
    why="fp16 and bf16 have twice TF32's rate and about 15 times plain fp32's, and every tensor is half as many bytes to read and write.",
    before="model = BertModel.from_pretrained(name).cuda()",
    after="model = BertModel.from_pretrained(name, dtype=torch.float16).cuda()",
    safe=False,
    needs=frozenset({"device", "records"}),
    find=find,
    source="per record max(FLOPs / peak, bytes / bandwidth), measured on this machine (gpuopt device), at the share of it that is reached now",
    has_change=True,
)
