"""Draws of millions of random weights -> one bank of numbers, drawn once and laid out again and again.

A generator of random numbers runs on one core: 340 M normals take ten seconds, in every process that builds the model, and what is timed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LARGE = 1_000_000
"""Tensors of more elements than this are filled from a bank; the others are drawn one number at a time, as without it."""
BANK = 4_194_301
"""Numbers in a bank: a prime, so that no two rows of a matrix of fewer rows hold the same values, whatever their width."""
STEP = 2_592_221
"""What each tensor starts further on in the bank: the golden section of BANK, so that tensors whose size is near a multiple of it do not come out alike."""


class BankedDraws(TorchDispatchMode):
    """Context manager: inside, `normal_` and `uniform_` of large CPU tensors are filled from banks, and so is what `torch.nn.init` makes of them.

    A bank is drawn with the generator of the thread when it is first needed, so the values follow from the seed. Dtypes are those torch can draw in; a tensor need not
    be contiguous. A draw that names its generator is left alone: whoever names one wants its numbers. So are `torch.randn` and its like, which draw below this mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._banks: dict[str, torch.Tensor] = {}
        self._start = 0
        self.num_drawn = 0
        """Numbers drawn for banks so far."""
        self.num_laid = 0
        """Elements filled from banks so far."""

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._banks.clear()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.ops.aten.normal_.default and _replaceable(args[0], named):
            mean, std = _two(args, named, ("mean", "std"))
            if std >= 0.0:  # torch says what is wrong with a negative one
                return self._fill(args[0], "normal", scale=std, shift=mean)
        elif func is torch.ops.aten.uniform_.default and _replaceable(args[0], named):
            low, high = _two(args, named, ("from", "to"))
            if low <= high:
                return self._fill(args[0], "uniform", scale=high - low, shift=(low + high) / 2)
        return func(*args, **named)

    def _fill(self, target: torch.Tensor, kind: str, *, scale: float, shift: float) -> torch.Tensor:
        bank = self._banks.get(kind)
        if bank is None:
            bank = torch.empty(BANK, dtype=torch.float32)
            # Uniform ones lie about zero, as nearly all that are asked for: one pass then fills them.
            self._banks[kind] = bank.normal_() if kind == "normal" else bank.uniform_().sub_(0.5)
            self.num_drawn += BANK
        in_place = target.is_contiguous()
        flat = target.view(-1) if in_place else torch.empty(target.numel(), dtype=target.dtype)
        end = lay(bank, flat, self._start, scale)
        self._start = (end + STEP) % BANK
        if shift:
            flat.add_(shift)
        if not in_place:
            target.copy_(flat.view(target.shape))
        self.num_laid += target.numel()
        return target


def lay(bank: torch.Tensor, target: torch.Tensor, start: int, scale: float = 1.0) -> int:
    """Fill the flat `target` with `scale` times the flat `bank` from `start` on, wrapping round; returns where the next one starts."""
    done = 0
    while done < target.numel():
        size = min(bank.numel() - start, target.numel() - done)
        torch.mul(bank[start : start + size], scale, out=target[done : done + size])
        done, start = done + size, (start + size) % bank.numel()
    return start


def _replaceable(target: torch.Tensor, named: Mapping[str, Any]) -> bool:
    return (
        target.numel() > LARGE
        and target.device.type == "cpu"
        and target.layout == torch.strided
        and target.is_floating_point()
        and named.get("generator") is None
    )


def _two(args: tuple[Any, ...], named: Mapping[str, Any], names: tuple[str, str]) -> tuple[float, float]:
    """Both numbers of a draw, by place or by name; torch's defaults are 0 and 1 for both kinds."""
    given = (*args[1:], *(None,) * 2)
    first, second = (
        named.get(name, default) if value is None else value for name, value, default in zip(names, given, (0.0, 1.0), strict=False)
    )
    return float(first), float(second)
