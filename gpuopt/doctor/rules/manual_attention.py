"""GPU305: attention written out as two products and a softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gpuopt.core import kernels, units
from gpuopt.core.result import Finding, OpRecord
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

_POINTWISE = (
    "mul",
    "div",
    "add",
    "sub",
    "masked_fill",
    "where",
    "clone",
    "copy",
    "_to_copy",
    "dropout",
    "native_dropout",
    "baddbmm",
    "expand",
)


@dataclass(frozen=True, slots=True)
class Block:
    """Attention of one module, op by op."""

    module: str
    matrix_bytes: float
    """Of all S x S matrices of a call."""
    side: str
    """`512x512`."""
    softmax: OpRecord
    others: tuple[OpRecord, ...]
    """Scale, mask and the like on the same matrix, and copies that only change a layout."""
    products: tuple[OpRecord, ...]


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all modules that do softmax between two products; without ops to look at, for a transformers model set to `eager`."""
    records = evidence.records or (evidence.count.records if evidence.count is not None else ())
    found = blocks(records)
    if evidence.trace is not None:
        # The math path of scaled_dot_product_attention dispatches the same ops: that is another matter (its mask, its dtype).
        inside = {op.module for op in evidence.trace.ops if "scaled_dot_product_attention" in op.name}
        found = [b for b in found if b.module not in inside]
    config = getattr(evidence.module, "config", None)
    is_hf_eager = getattr(config, "_attn_implementation", None) == "eager" and bool(getattr(evidence.module, "_supports_sdpa", False))
    if found:
        yield _block_finding(evidence, found, is_hf_eager)
    elif is_hf_eager and not records:
        yield Finding(
            code="",
            severity="warning",
            message=f"{type(evidence.module).__name__} is set to attn_implementation='eager': each attention writes its S x S matrix to memory several times",
            fix="from_pretrained(..., attn_implementation='sdpa')",
            module="",
        )


def _block_finding(evidence: Evidence, blocks: list[Block], is_hf_eager: bool) -> Finding:
    rows = [r for b in blocks for r in (b.softmax, *b.others, *b.products)]
    taken = recast.total_ms(rows)
    size = sum(b.matrix_bytes for b in blocks)
    worst = max(blocks, key=lambda b: b.matrix_bytes)
    passes = 2 + 2 * (1 + max(sum(r.count for r in b.others) / max(1, b.softmax.count) for b in blocks))
    is_mha = worst.softmax.module_class == "MultiheadAttention"
    finding = Finding(
        code="",
        severity="warning",
        message=f"attention is written out in {words.number(len(blocks), 'module')} ({words.listed(b.module for b in blocks)}): matrices of {worst.side}, "
        f"{units.format_bytes(size)} a call, pass through memory about {passes:.0f} times" + (f"; {words.ms(taken)}" if taken else ""),
        fix="attn_implementation='sdpa' in from_pretrained or the config"
        if is_hf_eager
        else "need_weights=False in the call of nn.MultiheadAttention"
        if is_mha
        else "torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=..., scale=...) in its forward",
        module=worst.module,
        line=worst.softmax.line or (modules.line(evidence.module, worst.module) if evidence.module is not None else None),
        op=worst.softmax.op,
        count=sum(b.softmax.count for b in blocks),
        bytes=size,
        time_ms=taken or None,
    )
    return priced(finding, recast.shown_ms(evidence, _saved_ms(evidence, blocks)), wall_ms=evidence.wall_ms)


def _saved_ms(evidence: Evidence, blocks: list[Block]) -> float:
    """All they take, less what a fused kernel takes for the same products; in fp32, where it is no faster at them, the passes between alone."""
    saved = 0.0
    for block in blocks:
        now = recast.total_ms((block.softmax, *block.others, *block.products))
        products = recast.total_ms(block.products)
        flops = sum(r.flops or 0.0 for r in block.products)
        dtype = block.products[0].dtype
        peak = evidence.device.ceilings.flops(dtype, "measured") if evidence.device is not None else None
        fused = flops / (peak * recast.REACHED["attention"]) * 1e3 if peak and dtype in modules.HALVES else products
        saved += max(0.0, now - max(fused, recast.LAUNCH_NS * block.softmax.count / 1e6))
    return saved


def blocks(records: tuple[OpRecord, ...]) -> list[Block]:
    """Modules where a softmax over [..., q, k] stands between a product that makes [..., q, k] and one that reads it."""
    by_module: dict[str, list[OpRecord]] = {}
    for record in records:
        if record.module != "?":
            by_module.setdefault(record.module, []).append(record)
    found = []
    for name, rows in by_module.items():
        # `_safe_softmax` is what the math path of scaled_dot_product_attention calls.
        for softmax in (r for r in rows if recast.short_name(r) in ("_softmax", "softmax")):
            shape = _shapes(softmax)[0] if softmax.shapes else ()
            if len(shape) < 3:
                continue
            *lead, q, k = shape
            products = [r for r in rows if recast.is_matrix(r) and _role(r, math.prod(lead), q, k)]
            roles = {role for r in products for role in _role(r, math.prod(lead), q, k)}
            if roles != {"makes", "reads"} or sum(r.count for r in products) < 2 * softmax.count:
                continue
            others = tuple(r for r in rows if recast.short_name(r) in _POINTWISE and any(s[-2:] == (q, k) for s in _shapes(r)) and r.bytes)
            # A fused kernel reads q, k and v by their strides and writes what the next layer wants: the copies that lay them out for the products go too.
            others += tuple(
                r for r in rows if r not in others and r.time_ns and r.kernels and all(kernels.kind(n) == "strided copy" for n in r.kernels)
            )
            width = DTYPE_BYTES.get(softmax.dtype or "", 4)
            found.append(Block(name, float(math.prod(shape) * width * softmax.count), f"{q}x{k}", softmax, others, tuple(products)))
            break
    return found


def _role(record: OpRecord, batch: int, q: int, k: int) -> set[str]:
    """What a product has to do with [batch, q, k]: its last two operands are [b, q, d] and [b, d, k], or [b, q, k] and [b, k, d]."""
    operands = [s for s in _shapes(record) if len(s) >= 2][-2:]
    if len(operands) != 2:
        return set()
    left, right = operands
    roles = set()
    if math.prod(left[:-2]) == batch and (left[-2], right[-1]) == (q, k):
        roles.add("makes")
    if math.prod(left[:-2]) == batch and left[-2:] == (q, k):
        roles.add("reads")
    return roles


def _shapes(record: OpRecord) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in text.split("x")) for text in record.shapes.split(", ") if text.replace("x", "").isdigit()]


RULE = Rule(
    code="GPU305",
    name="manual-attention",
    what="Attention is written out: product, scale, mask, softmax, product.",
    why="The S x S matrix of every head goes to memory and back at each of these steps; a fused kernel keeps it in registers, and memory no longer grows with S squared.",
    before="weights = torch.softmax(q @ k.transpose(-2, -1) / d**0.5 + mask, dim=-1)\ny = weights @ v",
    after="y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
    safe=False,
    needs=frozenset({"model"}),
    find=find,
    source="FlashAttention-2, https://arxiv.org/abs/2307.08691; FLOPs and bytes of the records",
)
