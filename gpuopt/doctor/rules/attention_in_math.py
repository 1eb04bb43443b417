"""GPU306: attention runs as products and a softmax in fp32 instead of one fused kernel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

from gpuopt.core import kernels
from gpuopt.core.live import Inputs
from gpuopt.core.result import Finding
from gpuopt.core.spec import Change
from gpuopt.core.trace import Kernel, Trace
from gpuopt.doctor import modules, timeline, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

MATH = "_scaled_dot_product_attention_math"
FUSED_RATE = 0.5
"""Of the fp16 ceiling: what flash kernels reach (400 of 764 TFLOP/s on an H200), the slower end of the prediction."""
BEST_RATE = 0.8
"""What cuDNN's and flash 3's reach on Hopper: the faster end."""
MIN_SHARE = 0.05
"""Of the call."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding. Eager: everything under the math op. Compiled: fp32 products and softmax kernels of a model that computes in 16 bits, with no fused attention kernel beside them."""
    trace = evidence.trace
    assert trace is not None
    if not trace.on_device:
        return
    steps = timeline.num_steps(trace)
    under = [o.index for o in trace.ops if o.step is not None and MATH in o.name and not any(MATH in a.name for a in trace.chain(o.parent))]
    mine = _below(trace, frozenset(under)) if under else _compiled(evidence)
    time_ms = sum(k.dur_ns for k in mine) / steps / 1e6
    span_ms = evidence.wall_ms or sum(s.dur_ns for s in trace.steps) / steps / 1e6
    if not mine or time_ms < MIN_SHARE * span_ms:
        return
    softmax = [k for k in mine if kernels.kind(k.name) == "softmax"]
    products = [k for k in mine if kernels.kind(k.name) == "product"]
    plain = next(
        (k.name for k in products if kernels.dtype(k.name) in ("float32", "tf32", "float64")),
        products[0].name if products else mine[0].name,
    )
    where = list(dict.fromkeys(m for k in mine if (m := timeline.module_of(trace, k.op))))
    change, fix = _remedy(evidence, is_eager=bool(under))
    finding = Finding(
        code="",
        severity="warning",
        message=f"attention runs on its math path: {words.number(len(products) / steps, 'product')} ({kernels.short(plain)}) and {words.number(len(softmax) / steps, 'softmax pass', 'softmax passes')} over S x S scores, "
        f"{words.ms(time_ms)}, {words.share(time_ms / span_ms)} of the call" + (f", in {words.listed(where)}" if where else ""),
        fix=fix,
        module=where[0] if len(where) == 1 else None,
        line=modules.line(evidence.module, where[0]) if evidence.module is not None and where else None,
        op=f"aten::{MATH}" if under else plain,
        count=max(1, round(len(softmax) / steps)),
        time_ms=time_ms,
        change=change,
    )
    flops = _attention_flops(evidence, [trace.ops[i].shapes for i in under])
    peak = evidence.device.ceilings.flops(_fused_dtype(evidence), "measured") if evidence.device is not None else None
    if not flops or not peak:
        yield finding
        return
    slow, fast = (time_ms - flops / (peak * rate) * 1e3 for rate in (FUSED_RATE, BEST_RATE))
    if fast <= 0:
        return
    yield priced(finding, fast, low=max(0.6, 0.9 * slow / fast), high=1.1, wall_ms=evidence.wall_ms)


def _below(trace: Trace, roots: frozenset[int]) -> list[Kernel]:
    return [k for k in trace.kernels if k.step is not None and any(o.index in roots for o in trace.chain(k.op))]


def _compiled(evidence: Evidence) -> list[Kernel]:
    """fp32 products, softmax kernels and what else names SDPA in a 16-bit program; nothing where a fused kernel ran, or where the program asked for fp32."""
    trace = evidence.trace
    assert trace is not None
    if _fused_dtype(evidence) not in modules.HALVES:
        return []
    if evidence.count is not None and not any("attention" in r.op for r in evidence.count.records):
        return []  # written by hand, or no attention at all
    ran = [k for k in trace.kernels if k.step is not None]
    if any(kernels.kind(k.name) == "attention" for k in ran):
        return []
    softmax = [k for k in ran if kernels.kind(k.name) == "softmax"]
    # The scores' softmax comes with a product before and one after it: fewer are a classifier's.
    products = [k for k in ran if kernels.kind(k.name) == "product" and kernels.dtype(k.name) in ("float32", "tf32")]
    if not softmax or len(products) < 2 * len(softmax):
        return []
    attention = [o for o in trace.ops if o.step is not None and o.shapes and "softmax" in o.name]
    if attention and all(len(o.shapes[0]) < 3 for o in attention):
        return []
    around = [
        k
        for k in ran
        if k.name.startswith("triton_") and "scaled_dot_product" in k.name and kernels.kind(k.name) not in ("softmax", "product")
    ]
    return products + softmax + around + _between(ran, products)


def _between(ran: list[Kernel], products: list[Kernel]) -> list[Kernel]:
    """torch's own passes over the scores, from the product that makes them to the one that uses them: a replay names no op, their order alone tells. Inductor's are named."""
    found: list[Kernel] = []
    inside: list[Kernel] = []
    ends = {id(k) for k in products}
    is_open = False
    for kernel in sorted(ran, key=lambda k: k.start_ns):
        if id(kernel) in ends:
            if is_open and any(kernels.kind(k.name) == "softmax" for k in inside):
                found += [k for k in inside if "at::native::" in k.name and kernels.kind(k.name) not in ("softmax", "product")]
                is_open = False
            else:
                is_open = True
            inside = []
        elif is_open:
            inside.append(kernel)
    return found


def _fused_dtype(evidence: Evidence) -> str | None:
    """What attention would compute in: the precision asked for, else the dtype of the weights."""
    own = modules.own_dtype(evidence.module) if evidence.module is not None else None
    if evidence.precision is not None:
        return modules.running(evidence, own or "float32")
    return own


def _attention_flops(evidence: Evidence, shapes: list[tuple[tuple[int, ...], ...]]) -> float | None:
    """A call: from the count, else 4·B·H·S·T·D from the math ops' query and key."""
    if evidence.count is not None:
        counted = math.fsum(r.flops or 0.0 for r in evidence.count.records if "attention" in r.op)
        if counted:
            return counted
    total = 0.0
    for found in shapes:
        if len(found) < 2 or len(found[0]) < 2 or len(found[1]) < 2:
            return None
        total += 4.0 * math.prod(found[0]) * found[1][-2]
    assert evidence.trace is not None
    return total / timeline.num_steps(evidence.trace) or None


def _remedy(evidence: Evidence, *, is_eager: bool) -> tuple[Change | None, str]:
    """Where the model got no mask and makes one inside the graph: the rewrite that makes none, which leaves the fastest kernels free, or an all-ones mask as an input where only
    that can be. Else what keeps fused kernels away."""
    spec = _mask(evidence)
    if not is_eager and _no_mask_given(evidence) and evidence.can_rewrite("no_mask"):
        own = f" (in code of your own, pass an all-ones attention_mask: --input '{spec}')" if spec is not None else ""
        return Change(rewrites=("no_mask",)), f"--rewrite no_mask: the model makes a mask inside the graph though none is given{own}"
    if spec is not None:
        return Change(
            inputs=(spec,)
        ), f"pass an all-ones attention_mask as an input (--input '{spec}'): without one the model makes a mask inside the graph"
    if is_eager:
        return (
            None,
            "what fused kernels refuse: fp32, an explicit mask that asks for a gradient, head dimensions over 256; use is_causal=True instead of a mask, and half precision",
        )
    return None, "make the mask outside the compiled graph and pass it in, or drop it (is_causal=True); compare with backend eager"


def _no_mask_given(evidence: Evidence) -> bool:
    return evidence.inputs is not None and not any("mask" in name for name in _given(evidence.inputs))


def _given(inputs: Inputs) -> set[str]:
    return {*inputs.kwargs, *(s.name for s in inputs.specs)}


def _mask(evidence: Evidence) -> str | None:
    """`attention_mask:int64[N,S]=1` where forward takes one, none is given, and the ids say its shape."""
    forward = getattr(type(evidence.module), "forward", None)
    if evidence.inputs is None or forward is None:
        return None
    try:
        names = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return None
    given = _given(evidence.inputs)
    if "attention_mask" not in names or "attention_mask" in given:
        return None
    ids = next((s for s in evidence.inputs.specs if s.name == "input_ids" or (s.dtype in ("int64", "int32") and len(s.shape) == 2)), None)
    if ids is not None:
        return f"attention_mask:int64[{','.join(str(n) for n in ids.shape)}]=1"
    shape = next((tuple(t.shape) for _, t in modules.inputs(evidence) if modules.dtype(t) in ("int64", "int32") and t.dim() == 2), None)
    return f"attention_mask:int64[{','.join(str(n) for n in shape)}]=1" if shape else None


RULE = Rule(
    code="GPU306",
    name="attention-in-math",
    what="scaled_dot_product_attention fell to its math path: separate products and a full S x S softmax, often in fp32.",
    why="The scores are written to memory and read back, the products run without half-precision tensor cores, and compiled code can be slower than eager.",
    before="y = torch.compile(model)(input_ids)  # makes its mask inside the graph",
    after="y = torch.compile(model)(input_ids, attention_mask=torch.ones_like(input_ids))",
    safe=True,
    needs=frozenset({"trace"}),
    find=find,
    source="BERT-large, 64 x 512, fp16 on an H200: compiled without a mask as input 74 to 103 ms, with one 46 ms",
    has_change=True,
)
