"""One eager decode step -> what it reads of the model: every weight's bytes once, of embeddings the rows looked up.

Read off the ops themselves, so that an encoder, the cross-attention's keys of a prompt, experts nobody chose and a head that is tied to an embedding count as what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from gpuopt.programs import packing

_ROWS = frozenset({"embedding", "index_select", "index"})
"""Ops that read the rows they are asked for, not all of their first tensor."""


class _Reads(TorchDispatchMode):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in _plain((*module.parameters(), *module.buffers()))}
        per_element = packing.weights_per_element(module)
        self.packed = {
            t.untyped_storage().data_ptr(): n
            for t in (*module.parameters(), *module.buffers())
            if (n := per_element.get(id(t))) is not None
        }
        self.seen: dict[tuple[int, int, int], tuple[float, float]] = {}
        self.rows = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view:
            return found
        looks_up = func._schema.name.partition("::")[2] in _ROWS
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        for tensor in _plain(tensors):
            if tensor.device.type == "meta" or tensor.untyped_storage().data_ptr() not in self.storages:
                continue
            if looks_up and isinstance(found, torch.Tensor):
                self.rows += found.numel() * tensor.element_size()
                continue
            products = 2.0 * tensor.numel() * self.packed.get(tensor.untyped_storage().data_ptr(), 1) if tensor.dim() > 1 else 0.0
            self.seen[(tensor.data_ptr(), tensor.numel(), tensor.element_size())] = (tensor.numel() * tensor.element_size(), products)
        return found


def read(module: Any, step: Callable[[], Any]) -> tuple[float, float]:
    """`step` runs one decode step -> (bytes of weights it reads, FLOPs of their products a sequence: 2 a weight)."""
    with _Reads(module) as reads, torch.no_grad():
        step()
    return sum(size for size, _ in reads.seen.values()) + reads.rows, sum(flops for _, flops in reads.seen.values())


def held(module: Any) -> float:
    """Bytes of all parameters, each once."""
    return float(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _plain(module.parameters())}.values()))


def _plain(tensors: Any) -> Iterator[torch.Tensor]:
    """Quantised weights are tensors made of tensors: those."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain([getattr(tensor, name) for name in names])
        else:
            yield tensor
