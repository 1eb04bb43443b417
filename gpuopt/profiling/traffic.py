"""One ATen call -> the bytes it has to move: each distinct region read once, each output written once, views free.

Compulsory traffic, no fusion and no cache assumed: an expanded input counts at its real size, a gather at the rows it takes, a strided 1×1 convolution at the rows it reaches,
a grouped product at the experts its rows can reach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gpuopt.profiling import formulas

_WRITE_ONLY = frozenset(
    """
    aten::copy_ aten::fill_ aten::zero_ aten::normal_ aten::uniform_ aten::bernoulli_ aten::random_ aten::exponential_ aten::log_normal_ aten::cauchy_ aten::geometric_
    """.split()
)
"""In-place ops that overwrite their first argument without reading it."""
_GATHERS = frozenset(
    """
    aten::embedding aten::index aten::_unsafe_index aten::index_select aten::gather aten::take aten::_embedding_bag aten::_embedding_bag_forward_only
    aten::masked_select aten::grid_sampler_2d aten::grid_sampler_3d
    """.split()
)
"""Ops that read of their first tensor only what they return, at most all of it."""
_SCATTERS_IN_PLACE = frozenset(
    "aten::index_put_ aten::_index_put_impl_ aten::index_copy_ aten::scatter_ aten::index_fill_ aten::scatter_add_ aten::index_add_ aten::scatter_reduce_ aten::put_".split()
)
"""Ops that write into their first tensor only what they are given (a key-value cache): never the whole of it."""
_NOTHING_MOVES = frozenset(
    """
    aten::empty aten::empty_like aten::empty_strided aten::empty_permuted aten::new_empty aten::new_empty_strided aten::_unsafe_view aten::detach aten::detach_ aten::alias
    aten::lift aten::lift_fresh aten::resize_ aten::resize_as_ aten::set_ aten::record_stream aten::_mkldnn_reshape aten::unsafe_split aten::unsafe_split_with_sizes
    aten::_assert_async aten::_assert_scalar aten::_functional_assert_async
    """.split()
)


def traffic(func: Any, bound: Mapping[str, Any], out: Any) -> float:
    """Compulsory bytes of one call: distinct regions read, plus what is written."""
    name = func._schema.name
    if name in _NOTHING_MOVES or func.is_view or torch.Tag.inplace_view in func.tags:
        return 0.0
    written_names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    mutated = [t for n in written_names for t in tensors_in(bound.get(n))]
    reads = [t for n, v in bound.items() if n not in written_names for t in tensors_in(v)]
    outputs = tensors_in(out)
    if not mutated:
        sources = {_storage(t) for t in reads}
        if outputs and all(_storage(t) in sources for t in outputs):
            return 0.0  # an alias, whatever its schema says
    if name in _SCATTERS_IN_PLACE:
        # Values and indices are read; as many elements as the values hold are written (an accumulating one reads them first, too).
        values = tensors_in(_first_of(bound, "values", "source", "src", "value"))
        size = math.fsum(_region_bytes(t) for t in values) or regions_bytes(reads)
        return regions_bytes(reads) + size
    if formulas.canonical(name) == "attention":
        outputs = outputs[:1]  # the rest is for a backward pass nobody runs
    total = 0.0
    if name in _GATHERS and reads:
        source, rest = reads[0], reads[1:]
        if name.startswith("aten::_embedding_bag") and rest:
            taken = float(math.prod(rest[0].shape) * source.shape[-1] * source.element_size())
        else:
            taken = regions_bytes(outputs[:1])
        total += min(taken, _region_bytes(source)) + regions_bytes(rest)
    elif formulas.canonical(name) == "convolution" and reads:
        total += _region_bytes(reads[0]) * _touched(bound, reads[0]) + regions_bytes(reads[1:])
    else:
        total += regions_bytes(reads) - _experts_not_reached(name, bound)
    if mutated:
        is_out_variant = all(a.is_out for a in func._schema.arguments if a.name in written_names)
        reread = 0.0 if is_out_variant or name in _WRITE_ONLY else regions_bytes(mutated)
        kept = {_storage(t) for t in mutated}
        return total + reread + regions_bytes(mutated) + regions_bytes([t for t in outputs if _storage(t) not in kept])
    return total + regions_bytes(outputs)


def _first_of(bound: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in bound:
            return bound[name]
    return None


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    return []


def _touched(bound: Mapping[str, Any], x: torch.Tensor) -> float:
    """Share of a convolution's input that its filter reaches: a strided 1×1 skips rows and columns."""
    weight, stride, dilation = bound.get("weight"), bound.get("stride"), bound.get("dilation")
    if weight is None or stride is None or bound.get("transposed") or weight.dim() < 3:
        return 1.0
    spatial = weight.dim() - 2
    strides = list(stride) * (spatial if len(stride) == 1 else 1)
    dilations = list(dilation or [1])
    dilations = dilations * (spatial if len(dilations) == 1 else 1)
    share = 1.0
    for size, taps, step, spread in zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=False):
        if taps * 1 < step and spread == 1:
            share *= min(1.0, math.ceil(size / step) * taps / size)
    return share


def _experts_not_reached(name: str, bound: Mapping[str, Any]) -> float:
    """Bytes of the expert weights [E, k, n] that a grouped product of fewer than E rows cannot need: one token reads its top-k experts, not all of them."""
    a, b = bound.get("self"), bound.get("mat2")
    if not name.startswith(("aten::_grouped_mm", "aten::_scaled_grouped_mm")) or a is None or b is None or (a.dim(), b.dim()) != (2, 3):
        return 0.0
    return _region_bytes(b) * max(0.0, 1.0 - int(a.shape[0]) / int(b.shape[0]))


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse and mkldnn tensors have none
        return id(tensor)


def _region_bytes(tensor: torch.Tensor) -> float:
    """Distinct bytes a strided view covers: an expanded dimension costs nothing, overlapping windows are counted once."""
    if tensor.layout != torch.strided:
        return float(tensor.numel() * tensor.element_size())
    distinct, span = 1, 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if int(size) == 0:
            return 0.0
        if int(stride) != 0:
            distinct *= int(size)
            span += (int(size) - 1) * int(stride)
    return float(min(distinct, span) * tensor.element_size())


def regions_bytes(tensors: list[torch.Tensor]) -> float:
    """The same region twice is read once; several views of one storage never cost more than the storage."""
    regions: dict[int, dict[tuple[Any, ...], float]] = {}
    limits: dict[int, float] = {}
    for tensor in tensors:
        key = _storage(tensor)
        strided = tensor.layout == torch.strided
        geometry = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride()) if strided else (tuple(tensor.shape),)
        regions.setdefault(key, {})[geometry] = _region_bytes(tensor)
        limits[key] = float(tensor.untyped_storage().nbytes()) if strided else math.inf
    return math.fsum(min(math.fsum(sizes.values()), limits[key]) for key, sizes in regions.items())
