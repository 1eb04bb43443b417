"""A graph that torch.compile traced -> the same graph, its masked attention in FlexAttention: kernels that Inductor writes around the mask.

`scaled_dot_product_attention` reads a mask as an additive tensor, element by element in every layer; flash kernels take none at all, and for some shapes it falls to products with a
full softmax. A FlexAttention kernel adds a bias where it computes the score, and of a boolean mask it reads no block that is masked as a whole (sliding windows, packed sequences,
padding) and tests no block that is not masked at all. Which blocks those are is computed from the mask in every call, once for all layers that share it: nothing is
assumed of what a mask holds. Attention without a mask, causal or not, stays where it is: flash and cuDNN kernels are written for it.

Inductor's template for a CPU takes fewer forms than its one for GPUs (of a query that is a view of a product it reads the product's sizes): what it refuses fails to build.

In Inductor's pre-grad pass and not in the module: any module has it so, an exported program too, and a bundle keeps the plain attention (`torch.export.save` cannot write the other).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.flex_attention import flex_attention as kernel
from torch._inductor import inductor_prims
from torch.nn import functional as F
from torch.nn.attention import flex_attention as api

from gpuopt.programs.passes import PreGrad

BLOCK = 128
"""Queries and keys a side of what is skipped or not tested as a whole: FlexAttention's own default."""
LEAST_WIDTH = 16
"""Of a head: FlexAttention's kernels take no narrower one."""
_WHOLE = 1 << 30
"""A block that holds everything: nothing is skipped."""

_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


class Flex(PreGrad):
    """A pre-grad pass. What it changed and what it left shows in its attributes."""

    def __init__(self) -> None:
        self.num_changed = 0
        self.left: list[str] = []
        """Why attention stayed as it was, a reason for each."""

    def __call__(self, graph: fx.Graph) -> None:
        tables: dict[tuple[fx.Node, str], fx.Node] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in _ATTENTION:
                continue
            given = {**_DEFAULTS, **dict(zip(_NAMES, node.args)), **node.kwargs}
            reason = _why_not(given)
            if reason:
                self.left.append(reason)
                continue
            query, key, value, mask = (given[name] for name in _NAMES[:4])
            mask = _unsliced(mask)
            with graph.inserting_before(node):
                place = (mask, str((_shape(query)[-2], _shape(key)[-2])))
                if place not in tables:
                    tables[place] = graph.call_function(blocks, (mask, query, key))
                made = graph.call_function(attend, (query, key, value, mask, tables[place]), {"scale": given["scale"]})
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            self.num_changed += 1

    def why(self) -> str:
        """Why nothing was changed."""
        return "; ".join(dict.fromkeys(self.left)) or "there is no scaled_dot_product_attention in its graphs"


def blocks(mask: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...] | None:
    """How many blocks of keys each block of queries reads, and which: two tensors for those to be tested, two for those that are not masked at all. None for a bias.

    mask: bool, True where a key is read, broadcasting to [B, H, Sq, Sk]. The tables are [B or 1, H or 1, blocks of queries] and one more dimension for the blocks of keys.
    """
    if mask.dtype != torch.bool:
        return None
    rows, columns = query.shape[-2], key.shape[-2]
    full = mask.expand(*mask.shape[:-2], rows, columns)
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    # What lies past the end is read by nobody: a block at the edge is never "not masked at all", and is tested.
    full = F.pad(full, (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    full = full.reshape(*full.shape[:2], down, BLOCK, across, BLOCK).to(torch.int32).sum((-3, -1), dtype=torch.int32)
    whole = full == BLOCK * BLOCK
    heads = query.shape[1] if full.shape[0] > 1 else full.shape[1]
    return tuple(_dense(table, heads) for table in (*_ordered((full > 0) & ~whole), *_ordered(whole)))


def _dense(table: Tensor, heads: int) -> Tensor:
    """The same values with strides that can be trusted.

    FlexAttention's kernels find a batch entry's table by the stride of the dimension of heads. Of one head, a buffer that Inductor lays out itself may say any stride there, and the
    kernel then reads past its end: every head has its own row where there are several entries, laid out row by row.
    """
    table = table.expand(-1, heads, *table.shape[2:]).clone()
    stride = [math.prod(table.shape[d + 1 :]) for d in range(table.dim())]
    laid: Tensor = inductor_prims.force_stride_order(table, stride)
    return laid


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, tables: tuple[Tensor, ...] | None, *, scale: float | None) -> Tensor:
    """scaled_dot_product_attention(query, key, value, mask) [B, H, Sq, E]; key and value may have fewer heads. Runs while a graph is traced, never in a call."""
    lengths = (query.shape[-2], key.shape[-2])
    kept = tuple(size != 1 for size in mask.shape)
    buffer = mask.reshape([size for size in mask.shape if size != 1])

    def at(*index: Tensor) -> tuple[Tensor, ...]:
        return tuple(i for i, is_kept in zip(index, kept, strict=True) if is_kept)

    if tables is None:

        def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, bias: Tensor) -> Tensor:
            return score + bias[at(b, h, i, j)]

        ones = query.new_ones((1, 1, 1), dtype=torch.int32)
        chosen = _mask_of((ones, query.new_zeros((1, 1, 1, 1), dtype=torch.int32)), _WHOLE, api.noop_mask, lengths)
        return _run(query, key, value, add, chosen, scale, (buffer,), ())

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor, given: Tensor) -> Tensor:
        return given[at(b, h, i, j)]

    def same(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score

    return _run(query, key, value, same, _mask_of(tables, BLOCK, seen, lengths), scale, (), (buffer,))


def _run(
    query: Tensor, key: Tensor, value: Tensor, score: Callable[..., Tensor], mask: Any, scale: float | None, bias: tuple[Tensor, ...], seen: tuple[Tensor, ...]
) -> Tensor:  # fmt: skip
    """The operator itself: the function around it (`api.flex_attention`) wants Dynamo, whose work is done when this runs."""
    operator_: Any = kernel
    options = api._apply_kernel_options(query, key, value, False, None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = operator_(query, key, value, score, mask.as_tuple(), scale, options, bias, seen)[0]
    return out


def _mask_of(tables: tuple[Tensor, ...], size: int, mod: Callable[..., Tensor], lengths: tuple[int, int]) -> Any:
    make: Any = api.BlockMask.from_kv_blocks
    more: dict[str, Any] = {}
    if "compute_q_blocks" in inspect.signature(make).parameters:
        more["compute_q_blocks"] = False  # a backward pass would want them
    return make(*tables, BLOCK_SIZE=size, mask_mod=mod, seq_lengths=lengths, **more)


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """A row of flags -> how many are set, and their places first."""
    count = dense.sum(-1, dtype=torch.int32)
    return count, torch.argsort(dense.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)


def _why_not(given: dict[str, Any]) -> str:
    """Why this attention stays; "" where it does not."""
    mask, query = given["attn_mask"], given["query"]
    if mask is None:
        return "attention without a mask has faster kernels"
    if not all(isinstance(given[name], fx.Node) and _shape(given[name]) is not None for name in _NAMES[:4]):
        return "attention whose shapes are not known while it is traced"
    if given["dropout_p"] or given["is_causal"]:
        return "attention that drops weights, or has a mask and is causal besides"
    if len(_shape(query)) != 4 or len(_shape(mask)) != 4 or len(_shape(given["key"])) != 4:
        return "attention, or a mask, of other than four dimensions"
    if _shape(mask)[-1] == 1:
        return "a mask that is the same for every key"
    if min(_shape(query)[-1], _shape(given["value"])[-1]) < LEAST_WIDTH:
        return f"heads narrower than {LEAST_WIDTH}"
    return ""


def _shape(node: fx.Node) -> Any:
    found = node.meta.get("example_value", node.meta.get("val"))
    return found.shape if isinstance(found, Tensor) else None


def _unsliced(node: fx.Node) -> fx.Node:
    """The mask that all layers share, where each took all of it as a slice of its own (`mask[:, :, :, : keys]`)."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        is_sliced = all(isinstance(part, slice) for part in index)
        if not is_sliced or _shape(node.args[0]) is None or _shape(node.args[0]) != _shape(node):
            break
        node = node.args[0]
    return node
