"""Code that builds a module -> the same module on the meta device: shapes, dtypes and ties, and no weight drawn or kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

T = TypeVar("T")

_META = torch.device("meta")
_STAYS = frozenset({torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory})


class OnMeta(TorchFunctionMode):
    """Context manager: inside, what makes tensors makes them on the meta device, whichever device it names, and none of them leaves it.

    `with torch.device("meta")` does so only where no device is named: code that says `to_empty(device="cpu")` would get that memory after all.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _STAYS and args[0].is_meta:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_META if _is_device(value) else value for value in args)
        if func in _device_constructors() or named.get("device") is not None:
            named["device"] = _META
        return func(*args, **named)


def hollow(build: Callable[[], T]) -> T:
    """Call `build` with every tensor it makes on the meta device. Raises what it raises: a RuntimeError, among others, where it reads a value that is not there."""
    with OnMeta():
        return build()


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and torch.device(value) is not None)
