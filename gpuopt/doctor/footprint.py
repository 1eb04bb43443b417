"""Module + inputs -> bytes of weights and peak bytes of everything else in one call, without running it: on fake tensors, which have shapes and no memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpuopt.core.live import Inputs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Of one call. Libraries' workspaces and the allocator's rounding come on top."""

    weight_bytes: int
    input_bytes: int
    activation_bytes: int
    """Peak of what the call itself allocates, outputs included."""

    def largest_batch(self, batch: int, room_bytes: float) -> int:
        """Samples a call for which `room_bytes` suffice, if all but the weights grows with the batch; 0 where not even one fits."""
        each = (self.input_bytes + self.activation_bytes) / max(1, batch)
        left = room_bytes - self.weight_bytes
        return 0 if left <= 0 else int(left // each) if each else batch


def weight_bytes(module: Any) -> int:
    """Of parameters and buffers, shared ones once."""
    held = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


def measure(module: Any, inputs: Inputs, *, grad: bool = False) -> Footprint | None:
    """None where the module cannot be run on fake tensors: shapes that depend on values, ops without a fake kernel.

    grad: whether the call keeps activations for a backward pass.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    live, peak = 0, 0
    seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def free(size: int) -> None:
        nonlocal live
        live -= size

    class Weigh(TorchDispatchMode):
        """Counts each storage from its birth to its death."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal live, peak
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage not in seen:
                        seen.add(storage)
                        live += storage.nbytes()
                        weakref.finalize(storage, free, storage.nbytes()).atexit = False
                        peak = max(peak, live)
            return out

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(grad):
            fake = {
                name: _fake(mode, t).requires_grad_(grad and t.requires_grad)
                for name, t in (*module.named_parameters(), *module.named_buffers())
            }
            args, kwargs = (_faked(mode, v) for v in (inputs.args, dict(inputs.kwargs)))
            for tensor in (*fake.values(), *tree_leaves((args, kwargs))):
                if isinstance(tensor, torch.Tensor):
                    seen.add(tensor.untyped_storage())
            with Weigh():
                functional_call(module, fake, args, kwargs)
    except Exception:  # noqa: BLE001 - a model that broke may break here too, in any way: then there is no estimate, and the finding says less
        return None
    given = [t for t in tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(t, torch.Tensor)]
    return Footprint(weight_bytes=weight_bytes(module), input_bytes=sum(t.numel() * t.element_size() for t in given), activation_bytes=peak)


def _fake(mode: Any, tensor: torch.Tensor) -> Any:
    return mode.from_tensor(tensor.detach())


def _faked(mode: Any, value: Any) -> Any:
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda v: _fake(mode, v) if isinstance(v, torch.Tensor) else v, value)
