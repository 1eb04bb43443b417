"""One row and two matrices -> act(row · gateᵀ) · (row · upᵀ): the kernel behind `gpuopt::gated_matvec`.

A program sums the same few rows of both matrices, so that what it makes of them never leaves it. Otherwise as `matvec_triton.py`: weights are asked for before the wait.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpuopt.programs.ops import overlapping
from gpuopt.programs.ops.matvec_triton import shape_of


@triton.jit  # type: ignore[untyped-decorator]
def _activated(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of fp32. NaN stays NaN."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)), which loses nothing where tanh comes near -1.
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACT == "relu")
        return tl.where(x <= 0.0, 0.0, x)


@triton.jit  # type: ignore[untyped-decorator]
def _matvecs_gated(  # type: ignore[no-untyped-def]
    input,
    gate,
    up,
    output,
    height,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    ACT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Its name begins as the other kernel's does: `core/kernels.py` knows both as products."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < height
    columns = tl.arange(0, PIECE)
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    there = is_row[:, None] if IS_EVEN else is_row[:, None] & (columns < WIDTH)[None, :]
    gates = tl.load(gate + places, mask=there, other=0.0, eviction_policy="evict_first")
    ups = tl.load(up + places, mask=there, other=0.0, eviction_policy="evict_first")
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate_sums = tl.zeros([ROWS, PIECE], tl.float32)
    up_sums = tl.zeros([ROWS, PIECE], tl.float32)
    for start in range(0, WIDTH - PIECE, PIECE):
        after = start + PIECE
        there = is_row[:, None] if IS_EVEN else is_row[:, None] & (columns < WIDTH - after)[None, :]
        gates_ahead = tl.load(gate + places + after, mask=there, other=0.0, eviction_policy="evict_first")
        ups_ahead = tl.load(up + places + after, mask=there, other=0.0, eviction_policy="evict_first")
        given = tl.load(input + start + columns, eviction_policy="evict_last").to(tl.float32)[None, :]
        gate_sums += gates.to(tl.float32) * given
        up_sums += ups.to(tl.float32) * given
        gates, ups = gates_ahead, ups_ahead
    last = ((WIDTH - 1) // PIECE) * PIECE
    given = tl.load(input + last + columns, mask=columns < WIDTH - last, other=0.0, eviction_policy="evict_last").to(tl.float32)[None, :]
    gate_sums += gates.to(tl.float32) * given
    up_sums += ups.to(tl.float32) * given
    # As the unfused operators hand their results on: each in the half's precision.
    half = output.dtype.element_ty
    gated = _activated(tl.sum(gate_sums, 1).to(half).to(tl.float32), ACT).to(half).to(tl.float32)
    tl.store(output + rows, (gated * tl.sum(up_sums, 1).to(half).to(tl.float32)).to(half), mask=is_row)


def run(input: Tensor, gate: Tensor, up: Tensor, act: str) -> Tensor:
    """[..., N]. For what `matvec.takes` of both, which have one shape, and an activation of `gated_matvec.ACTS`."""
    height, width = gate.shape
    shape = shape_of(width)
    found = input.new_empty((*input.shape[:-1], height))
    _matvecs_gated[(triton.cdiv(height, shape.rows),)](
        input,
        gate,
        up,
        found,
        height,
        WIDTH=width,
        ROWS=shape.rows,
        PIECE=shape.piece,
        ACT=act,
        IS_EVEN=width % shape.piece == 0,
        num_warps=shape.warps,
        num_stages=1,
        **overlapping.launch(input),
    )
    return found
