"""A GPU that is none: tensors that say they are on cuda:0, hold their values in a tensor of the host, and refuse to meet the host's as a GPU's do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PLACE = torch.device("cuda:0")
_MAY_MEET = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Far(torch.Tensor):
    """Its values are in `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # a device that needs no library
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return PLACE

    @property
    def is_meta(self) -> bool:
        return False

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class OneGpu(TorchDispatchMode):
    """Inside, cuda:0 can be asked for. Counts what is made on the host besides."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # under which naming a GPU does not start CUDA
        self.largest_on_host = 0
        """Elements of the largest floating tensor with memory of its own that an op made on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _run(func, args, kwargs or {})
        given = {leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if _is_near(leaf)}
        for leaf in pytree.tree_leaves(made):
            if _is_near(leaf) and leaf.is_floating_point() and leaf.untyped_storage()._cdata not in given:
                self.largest_on_host = max(self.largest_on_host, leaf.numel())
        return made


def near(tensor: torch.Tensor) -> torch.Tensor:
    """Its values, on the host."""
    return tensor.held if isinstance(tensor, Far) else tensor


def _is_near(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, Far) and value.device.type == "cpu"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    is_far = any(isinstance(leaf, Far) for leaf in leaves)
    wanted = kwargs.get("device")
    goes = is_far if wanted is None else torch.device(wanted).type == "cuda"
    if is_far and func not in _MAY_MEET and any(not isinstance(leaf, Far) and leaf.dim() > 0 for leaf in leaves):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")
    if func is torch.ops.aten.copy_.default:
        goes = isinstance(args[0], Far)
    if wanted is not None and goes:
        kwargs = {**kwargs, "device": "cpu"}
    found = func(*pytree.tree_map_only(Far, lambda t: t.held, args), **pytree.tree_map_only(Far, lambda t: t.held, kwargs))
    if not goes:
        return found
    same = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, Far)}
    return pytree.tree_map_only(torch.Tensor, lambda t: same.get(id(t)) if id(t) in same else Far(t), found)
