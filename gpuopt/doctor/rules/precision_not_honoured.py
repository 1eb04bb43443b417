"""GPU507: the artifact computes in another precision than was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpuopt.core.result import CEILING_OF_DTYPE, Finding
from gpuopt.doctor import words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

SHOWN = 3


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding with the shares and the largest layers outside; priced as their time at the ceiling of the precision asked for."""
    audit = evidence.audit
    assert audit is not None
    wanted = audit.requested or evidence.precision
    if audit.honoured or wanted is None:
        return
    shares = ", ".join(
        f"{words.share(share)} in {dtype}" for dtype, share in sorted(audit.shares.items(), key=lambda item: -item[1])[:SHOWN]
    )
    layers = "; ".join(audit.exceptions[:SHOWN]) + (f"; and {len(audit.exceptions) - SHOWN} more" if len(audit.exceptions) > SHOWN else "")
    time_ms, saved_ms = _lost_ms(evidence, wanted)
    finding = Finding(
        code="",
        severity="warning",
        message=f"{wanted} was asked for, and the FLOPs run {shares or 'in something else'}"
        + (f": {layers}" if layers else f" ({audit.reason})" if audit.reason else ""),
        fix=_fix(wanted),
        module=audit.exceptions[0].partition(":")[0] if audit.exceptions else None,
        time_ms=time_ms,
    )
    yield finding if not saved_ms else priced(finding, saved_ms, low=0.6, high=1.0, wall_ms=evidence.wall_ms)


def _lost_ms(evidence: Evidence, wanted: str) -> tuple[float | None, float]:
    """(time of the products in another dtype, what they would save at the same share of the ceiling asked for)."""
    if evidence.device is None:
        return None, 0.0
    peak = evidence.device.ceilings.flops(wanted, "measured")
    rows = [
        (r.time_ns / 1e6, now)
        for r in evidence.records
        if r.time_ns
        and r.flops
        and r.dtype
        and CEILING_OF_DTYPE.get(r.dtype, r.dtype) != wanted
        and (now := evidence.device.ceilings.flops(r.dtype, "measured"))
    ]
    if not rows or not peak:
        return None, 0.0
    return math.fsum(ms for ms, _ in rows), math.fsum(ms * max(0.0, 1.0 - now / peak) for ms, now in rows)


def _fix(wanted: str) -> str:
    if wanted == "tf32":
        return "torch.set_float32_matmul_precision('high') and torch.backends.cudnn.allow_tf32 = True, before the model is built"
    if wanted in ("fp8", "int8", "w8", "w4"):
        return f"quantise the named layers too, or accept them: what has no {wanted} scales stays in the dtype it had"
    dtype = {"fp16": "torch.float16", "bf16": "torch.bfloat16", "fp32": "torch.float32", "fp64": "torch.float64"}.get(wanted, wanted)
    return f"cast the named layers themselves before the export (module.to({dtype})): a backend keeps the dtypes it is given"


RULE = Rule(
    code="GPU507",
    name="precision-not-honoured",
    what="The built artifact does not compute in the precision that was asked for.",
    why="Backends keep layers in the dtype they find, or fall back where they lack a kernel, and say nothing: the speed of the small format is paid for and not had.",
    before="gpuopt compile model --backend trt --precision fp16  # engine runs 40% in fp32",
    after="model.half() before the export, so that the graph itself is fp16",
    safe=False,
    needs=frozenset({"audit"}),
    find=find,
    source="dtypes read back from the artifact; ceilings measured on this machine",
)
