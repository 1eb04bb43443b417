"""A running forward -> the places where it computes outside PyTorch's dispatcher: Triton kernels it launches itself, and tensors it hands to NumPy or another library.

A counter of ATen calls sees nothing of either, so each becomes a row without FLOPs: named among the unknown ops, its bytes missing from the coverage.
A C++ extension that reads a tensor's memory directly cannot be told from nothing; it runs in the real run only, and the note of that run says what it leaves open.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Seen = Callable[[str, list[torch.Tensor]], bool]
"""Told an op's name and the tensors it touches; answers whether the op shall run."""


@contextmanager
def triton_launches(seen: Seen) -> Iterator[None]:
    """Tell `seen` of each `kernel[grid](…)`; one that is not to run (its tensors are fake) is skipped."""
    jit = sys.modules.get("triton.runtime.jit")  # nothing launches a Triton kernel that has not imported it
    if jit is None:
        yield
        return
    original = jit.KernelInterface.__getitem__

    def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
        launch = original(kernel, grid)

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            return launch(*args, **kwargs) if seen(f"triton.{_name(kernel)}", tensors) else None

        return run

    jit.KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        jit.KernelInterface.__getitem__ = original


def _name(kernel: Any) -> str:
    """The function's name, below autotuning and heuristics."""
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", type(kernel).__name__))


_HANDED_OUT = {
    torch.Tensor.numpy: "Tensor.numpy",
    torch.Tensor.__array__: "Tensor.__array__",
    torch.Tensor.__dlpack__: "Tensor.__dlpack__",
}


class HandedOut(TorchFunctionMode):
    """Tells `seen` of each tensor that leaves PyTorch by name; what the other side computes with it nobody counts."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _HANDED_OUT.get(func)
        if name is not None:
            self.seen(name, [t for t in args if isinstance(t, torch.Tensor)])
        return func(*args, **(kwargs or {}))
