"""One row and up to three matrices -> their products: the kernel behind `gpuopt::matvecs`.

A program sums a few rows of a matrix. It asks for their first elements before it waits for the kernel that writes its input (programmatic dependent launch, from compute
capability 9.0): weights are nobody's results, so memory can be busy while one kernel ends and the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from gpuopt.programs.ops import overlapping
from gpuopt.programs.ops.matvec import MOST

LONGEST = 4096
"""Elements of a row that one program reads at once; rows beyond it are read in pieces."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut."""

    rows: int
    """A program."""
    piece: int
    """Elements of a row at a time."""
    warps: int


def shape_of(width: int) -> Shape:
    """For rows of `width` elements: one row a program where a row is read at once, else four in pieces, the next piece asked for while one is summed."""
    if width <= LONGEST:
        piece = triton.next_power_of_2(width)
        return Shape(rows=1, piece=piece, warps=max(1, min(8, piece // 512)))
    return Shape(rows=4, piece=512, warps=4)


@triton.jit  # type: ignore[untyped-decorator]
def _matvecs(  # type: ignore[no-untyped-def]
    input,
    weight,
    output,
    weight1,
    weight2,
    output1,
    output2,
    height0,
    height1,
    height2,
    programs0,
    programs1,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """weight, output: the first matrix's; the others' start `weight1`, `weight2`, `output1` and `output2` elements from them."""
    program = tl.program_id(0)
    is1 = program >= programs0
    is2 = program >= programs0 + programs1
    # Numbers are chosen here and not pointers: a pointer out of a branch has lost its alignment, and with it the wide loads.
    offset = tl.where(is2, weight2, tl.where(is1, weight1, 0))
    target = tl.where(is2, output2, tl.where(is1, output1, 0))
    height = tl.where(is2, height2, tl.where(is1, height1, height0))
    first = tl.where(is2, program - programs0 - programs1, tl.where(is1, program - programs0, program))
    rows = first * ROWS + tl.arange(0, ROWS)
    is_row = rows < height
    columns = tl.arange(0, PIECE)
    places = weight + offset + rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    there = is_row[:, None] if IS_EVEN else is_row[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(places, mask=there, other=0.0, eviction_policy="evict_first")
    if IS_DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([ROWS, PIECE], tl.float32)
    for start in range(0, WIDTH - PIECE, PIECE):
        after = start + PIECE
        there = is_row[:, None] if IS_EVEN else is_row[:, None] & (columns < WIDTH - after)[None, :]
        ahead = tl.load(places + after, mask=there, other=0.0, eviction_policy="evict_first")
        given = tl.load(input + start + columns, eviction_policy="evict_last")
        sums += values.to(tl.float32) * given.to(tl.float32)[None, :]
        values = ahead
    last = ((WIDTH - 1) // PIECE) * PIECE
    given = tl.load(input + last + columns, mask=columns < WIDTH - last, other=0.0, eviction_policy="evict_last")
    sums += values.to(tl.float32) * given.to(tl.float32)[None, :]
    tl.store(output + target + rows, tl.sum(sums, 1).to(output.dtype.element_ty), mask=is_row)


def run(input: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """[..., N] of each. For what `matvec.takes`."""
    width = weights[0].shape[1]
    shape = shape_of(width)
    found = [input.new_empty((*input.shape[:-1], weight.shape[0])) for weight in weights]
    heights = [weight.shape[0] for weight in weights] + [0] * (MOST - len(weights))
    programs = [triton.cdiv(height, shape.rows) for height in heights]
    _matvecs[(sum(programs),)](
        input,
        weights[0],
        found[0],
        *_distances(weights),
        *_distances(found),
        *heights,
        *programs[:-1],
        WIDTH=width,
        ROWS=shape.rows,
        PIECE=shape.piece,
        IS_EVEN=width % shape.piece == 0,
        num_warps=shape.warps,
        num_stages=1,
        **overlapping.launch(input),
    )
    return found


def _distances(tensors: list[Tensor]) -> list[int]:
    """In elements, from the first to each other one; 0 for one there is none of."""
    found = [(tensor.data_ptr() - tensors[0].data_ptr()) // tensor.element_size() for tensor in tensors[1:]]
    return found + [0] * (MOST - 1 - len(found))
