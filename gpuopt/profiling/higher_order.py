"""One higher-order op (cond, scan, flex_attention, …) -> the ATen calls it makes, or its own FLOPs, or neither: then it is unknown.

PyTorch runs the inside of a higher-order op below every dispatch mode, so a counter that lets it pass counts nothing of it. What is only control flow is
therefore run here, piece by piece, by the rule PyTorch's own dense kernel follows: a branch or a trip count that depends on values needs real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gpuopt.profiling import formulas


def flops(name: str, args: tuple[Any, ...]) -> float | None:
    """FLOPs of a higher-order op that is a product itself; None of any other.

    Attention is counted full here as everywhere: a block mask or a `score_mod` does not change its FLOPs.
    """
    if name == "flex_attention":
        query, key, value = (tuple(int(n) for n in tensor.shape) for tensor in args[:3])
        return formulas.sdpa_flops(query, key, value)
    return None


def pieces(func: Any) -> Callable[..., Any] | None:
    """A function that computes what `func` computes by ordinary calls, each seen by the modes around it; None where there is no such thing."""
    name = func.name()
    if name in _LOOPS:
        return _LOOPS[name]
    return func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd) if name in _BY_ITS_DENSE_KERNEL else None


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any) -> Any:
    return (true_fn if bool(pred) else false_fn)(*operands)


def _while_loop(cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Any, additional: Any) -> Any:
    values = tuple(carried)
    while bool(cond_fn(*values, *additional)):
        out = body_fn(*values, *additional)
        values = tuple(out) if isinstance(out, tuple | list) else (out,)
    return values


def _scan(combine_fn: Callable[..., Any], init: Any, xs: Any, additional_inputs: Any) -> Any:
    from torch._higher_order_ops.scan import generic_scan

    return generic_scan(combine_fn, init, xs, additional_inputs=additional_inputs)


_LOOPS: Mapping[str, Callable[..., Any]] = {"cond": _cond, "while_loop": _while_loop, "scan": _scan}
"""Control flow whose dense kernel refuses to run under a mode."""

_BY_ITS_DENSE_KERNEL = frozenset(
    """
    map_impl associative_scan invoke_subgraph auto_functionalized auto_functionalized_v2 with_effects hints_wrapper strict_mode out_dtype local_map_hop foreach_map
    invoke_quant invoke_quant_packed
    """.split()
)
"""Wrappers whose dense kernel is plain Python around plain ops. Not here, and so unknown: Triton kernels, compiled code, delegates to other runtimes."""


@contextmanager
def uncompiled_flex_attention() -> Iterator[None]:
    """Called outside torch.compile, `flex_attention` compiles itself, which refuses to run under a dispatch mode: have it call its op directly."""
    from torch.nn.attention import flex_attention as module

    if not hasattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"):  # before torch 2.9
        yield
        return
    was = module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = was
