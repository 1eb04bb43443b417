"""One query a sequence and a cache of keys -> its attention: the kernel behind `gpuopt::attend_one`.

A program is one head of one sequence. It goes over the keys in blocks and keeps the largest score so far, as flash attention does; a block's values are asked for with its keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpuopt.programs.ops import overlapping

BLOCK = 128
"""Keys read at once."""


@triton.jit  # type: ignore[untyped-decorator]
def _attend_one(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    mask,
    output,
    scale,
    heads,
    query_batch,
    query_head,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    mask_batch,
    mask_head,
    mask_token,
    LENGTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """The rest are strides in elements. GROUP: query heads a head of keys. MASK: "none", "seen" or "added"."""
    program = tl.program_id(0)
    batch = (program // heads).to(tl.int64)
    head = program % heads
    held = head // GROUP
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    columns = tl.arange(0, COLUMNS)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    row = tl.load(query + batch * query_batch + head * query_head + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) * scale
    keys = key + batch * key_batch + held * key_head
    values = value + batch * value_batch + held * value_head
    largest = float("-inf")
    total = 0.0
    sums = tl.zeros([VALUE_COLUMNS], tl.float32)
    for start in range(0, LENGTH, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        is_there = tokens < LENGTH
        k = tl.load(keys + tokens[:, None] * key_token + columns[None, :], mask=is_there[:, None] & (columns < WIDTH)[None, :], other=0.0)
        v = tl.load(
            values + tokens[:, None] * value_token + value_columns[None, :],
            mask=is_there[:, None] & (value_columns < VALUES)[None, :],
            other=0.0,
        )
        scores = tl.sum(k.to(tl.float32) * row[None, :], 1)
        if MASK == "seen":
            seen = tl.load(mask + batch * mask_batch + head * mask_head + tokens * mask_token, mask=is_there, other=0)
            is_there = is_there & (seen != 0)
        elif MASK == "added":
            scores += tl.load(mask + batch * mask_batch + head * mask_head + tokens * mask_token, mask=is_there, other=0.0).to(tl.float32)
        scores = tl.where(is_there, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 0))
        base = tl.where(now == float("-inf"), 0.0, now)  # nothing seen so far: no difference of two infinities
        shares = tl.exp(scores - base)
        kept = tl.exp(largest - base)
        total = total * kept + tl.sum(shares, 0)
        # Where nothing of a block is seen, a value that is no number must not count: a cache's unwritten end may hold anything.
        sums = sums * kept + tl.sum(tl.where(shares[:, None] == 0.0, 0.0, shares[:, None] * v.to(tl.float32)), 0)
        largest = now
    place = output + (batch * heads + head) * VALUES + value_columns
    tl.store(place, (sums / total).to(output.dtype.element_ty), mask=value_columns < VALUES)


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[batch, 1, heads, width of the values]. For what `attend_one.takes`."""
    batch, heads, _, width = query.shape
    held, length = key.shape[1:3]
    found = query.new_empty((batch, 1, heads, value.shape[3]))
    kind, strides = "none", (0, 0, 0)
    if mask is not None:
        kind = "seen" if mask.dtype == torch.bool else "added"
        strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(1) if mask.shape[1] > 1 else 0, mask.stride(3))
    _attend_one[(batch * heads,)](
        query,
        key,
        value,
        query if mask is None else mask.view(torch.uint8) if kind == "seen" else mask,
        found,
        scale,
        heads,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *strides,
        LENGTH=length,
        GROUP=heads // held,
        WIDTH=width,
        VALUES=value.shape[3],
        COLUMNS=triton.next_power_of_2(width),
        VALUE_COLUMNS=triton.next_power_of_2(value.shape[3]),
        BLOCK=BLOCK,
        MASK=kind,
        num_warps=8,
        **overlapping.launch(query),
    )
    return found
