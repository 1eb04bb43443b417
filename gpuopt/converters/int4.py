"""Weight [out, in] -> Int4WeightLinear: four bits a weight, a bf16 scale and zero a group along `in`, and products in bf16.

There is one stored form for every device: what `aten::_weight_int4pack_mm` reads on an NVIDIA GPU (ATen/native/cuda/int4mm.cu). It is a permutation of the weights' bits, so any
device can make it and undo it with plain ops, and a layer is copied, moved, saved, exported and faked like any other: nothing is packed anew on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = (128, 64, 32)
"""Weights that share a scale, the first that divides `in`: the kernel takes 32 to 256. Larger groups save bits (a scale and a zero of 32 bits are a quarter bit a weight
at 128), smaller ones signal: 2 dB from 128 to 32."""
OUT_STEP = 8
"""Rows of a tile: `out` must be a multiple."""
IN_STEP = GROUPS[-1]
LEVELS = 15
"""Steps from the smallest weight of a group to the largest."""
MIDDLE = 8
"""Stored values are 0 to 15; the kernel multiplies `stored - 8` by the scale and adds the zero."""
SMALLEST = 2.0**-100
"""The least scale: a group of equal weights is its zero alone, and 1/scale stays finite in fp32."""
KERNEL_ROWS = 128
"""Rows up to which a GPU multiplies by the packed weights. The kernel reads all of them for every 16 rows, which suits decoding; past this it pays to widen them once and
multiply as bf16 does (estimated from its traffic, not measured)."""

KERNEL_DEVICES = frozenset({"cuda"})


def group_of(num_in: int) -> int | None:
    """Weights a group, or None where `in_features` is no multiple of any."""
    return next((size for size in GROUPS if num_in % size == 0), None)


def affine(weight: Tensor, group: int) -> Tensor:
    """[out, in] -> (scale, zero) of each group, bf16 [in / group, out, 2]. A group with a NaN or an infinity gets a scale that is none either."""
    by_group = weight.reshape(weight.shape[0], -1, group)
    low, high = (x.to(torch.float32) for x in torch.aminmax(by_group, dim=-1))
    scale = (high / LEVELS - low / LEVELS).clamp(min=SMALLEST).to(torch.bfloat16)
    zero = (low + MIDDLE * scale.to(torch.float32)).to(torch.bfloat16)
    return torch.stack((scale, zero), -1).transpose(0, 1).contiguous()


def levels(weight: Tensor, scale: Tensor) -> Tensor:
    """[out, in] and `affine`'s result -> uint8 0 to 15 [out, in], from the scales as they are stored, rounded to nearest even and saturated."""
    step, zero = scale.to(torch.float32).transpose(0, 1).unbind(-1)
    by_group = weight.reshape(weight.shape[0], scale.shape[0], -1).to(torch.float32)
    found = (by_group - zero.unsqueeze(-1)).mul_((1.0 / step).unsqueeze(-1)).round_().add_(MIDDLE).clamp_(0, LEVELS)
    return found.to(torch.uint8).reshape(weight.shape)


def packed(values: Tensor, group: int) -> Tensor:
    """uint8 0 to 15 [out, in] -> int32 [out / 8, in / group, 32, group / 32]: `aten::_convert_weight_to_int4pack`, which exists on GPUs alone, in plain ops.

    A warp's lane `4 * row + column` holds of 8 rows and 32 columns of the weight, in one int32, the elements (row, 8 j + 2 column + h), j = 0..3, h = 0, 1, at the
    bits 4 (4 h + j): the B operand of two m16n8k16 tiles. `group / 16` tiles lie together (`inner_k_tiles`: 8, 4 or 2), one load of 16, 8 or 4 bytes.
    """
    num_out, num_in = values.shape
    tiles = values.reshape(num_out // 8, 8, num_in // group, group // 32, 4, 4, 2)  # tile, row, outer, inner, j, column, h
    by_lane = tiles.permute(0, 2, 1, 5, 3, 6, 4).reshape(num_out // 8, num_in // group, 32, group // 32, 8)
    found = by_lane[..., 0].to(torch.int32)
    for place in range(1, 8):
        found = found | (by_lane[..., place].to(torch.int32) << (4 * place))
    return found.contiguous()


def unpacked(words: Tensor) -> Tensor:
    """`packed`'s result -> int32 0 to 15 [out, in]."""
    num_tiles, num_outer, _, num_inner = words.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    nibbles = torch.bitwise_right_shift(words.unsqueeze(-1), shifts) & 15  # `>>` is another op, which no ONNX exporter knows
    lanes = nibbles.reshape(num_tiles, num_outer, 8, 4, num_inner, 2, 4)  # tile, outer, row, column, inner, h, j
    return lanes.permute(0, 2, 1, 4, 6, 3, 5).reshape(num_tiles * 8, num_outer * num_inner * 32)


class Int4WeightLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] as `weight_q` (see `packed`) and `scale` (see `affine`); x and y [..., features] in bf16.

    On a GPU a few rows are multiplied by the packed weights as they lie in memory; many rows, and every other device, get them widened first. Both multiply the same bf16 values.
    """

    scale: Tensor
    bias: nn.Parameter | None
    WEIGHTS_PER_ELEMENT: ClassVar[Mapping[str, int]] = {"weight_q": 8, "scale": 0}
    """Read by programs/packing.py."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, carrier: torch.dtype, *, by_row: bool = True) -> None:
        """`weight`: [out, in], any floating dtype, `out` a multiple of 8, `in` one of 32; `bias` [out] or None. Groups are of one size, whatever `by_row` says."""
        super().__init__()
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        group = group_of(self.in_features)
        assert group is not None and self.out_features % OUT_STEP == 0, f"[{self.out_features}, {self.in_features}] does not pack"
        assert carrier == torch.bfloat16, "the kernel knows no other"
        self.group, self.carrier, self.by_row = group, carrier, by_row
        with torch.no_grad():
            scale = affine(weight, group)
            # A parameter, as weights are, though an integer: buffers of integers count as state, not as bytes that every call reads.
            self.weight_q = nn.Parameter(packed(levels(weight, scale), group), requires_grad=False)
            self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """W again in bf16, as the kernel sees it: (stored - 8) * scale + zero, rounded once."""
        step, zero = self.scale.to(torch.float32).transpose(0, 1).unbind(-1)
        centred = (unpacked(self.weight_q) - MIDDLE).reshape(self.out_features, -1, self.group).to(torch.float32)
        wide = centred * step.unsqueeze(-1) + zero.unsqueeze(-1)
        return wide.to(self.carrier).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, self.in_features).to(self.carrier)
        if rows.device.type in KERNEL_DEVICES and _suits_kernel(rows.shape[0]):
            # The kernel checks neither dtype nor layout of the scales, and would read others as garbage; both are as they should be unless somebody cast the module.
            own = self.scale.to(torch.bfloat16).contiguous()
            found: Tensor = torch.ops.aten._weight_int4pack_mm(rows.contiguous(), self.weight_q, self.group, own)
            found = found if self.bias is None else found + self.bias.to(self.carrier)
        else:
            found = functional.linear(rows, self.weight, None if self.bias is None else self.bias.to(self.carrier))
        return found.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As nn.Linear shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, group={self.group}"


def _suits_kernel(num_rows: Any) -> bool:
    """Of an exported graph with a free number of rows, always: it has no branches, and the kernel is right for any number."""
    return isinstance(num_rows, torch.SymInt) or 0 < num_rows <= KERNEL_ROWS
