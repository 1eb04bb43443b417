"""Draws of millions of random weights -> one bank of numbers, drawn once and laid out again and again, on the host or straight on a GPU.

A generator of random numbers runs on one core: 340 M normals take ten seconds, in every process that builds the model, and what is timed does not depend on them. Nor
need their memory be the host's: where processes that build models at the same time queue up for new pages, gigabytes take tens of seconds, and a GPU fills them in none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


class Elsewhere(RuntimeError):
    """Why a model cannot be built with its large tensors on the device: build it on the host."""


@dataclass(frozen=True, slots=True)
class _Laid:
    """How a tensor was filled: with `bank * scale + shift` from `start` on."""

    target: torch.Tensor
    kind: str
    start: int
    scale: float
    shift: float


class BankedDraws(TorchDispatchMode):
    """Context manager: inside, `normal_` and `uniform_` of large tensors are filled from banks, and so is what `torch.nn.init` makes of them.

    A bank is drawn with the CPU's generator of the thread when it is first needed, so the values follow from the seed. Dtypes are those torch can draw in; a tensor need not
    be contiguous. A draw that names its generator is left alone: whoever names one wants its numbers. So are `torch.randn` and its like, which draw below this mode.

    With a device, memory that is asked for on the host for more than LARGE floating elements (`torch.empty`, as layers' constructors call it) is the device's, and the banks
    are copied there once. Small tensors and what is computed stay on the host, for the caller to move. The values are the host's bit for bit, as long as what is done
    with them is exact to the bit everywhere: copies, comparisons, products and sums by a scalar, `erfinv_` of a uniform draw (a bank of its own, computed on the host).
    """

    def __init__(self, device: str | torch.device | None = None, *, limit_bytes: int | None = None) -> None:
        """`limit_bytes`: of tensors on the device; one that passes it raises Elsewhere, and so does a random function of tensors there that no bank can stand for."""
        super().__init__()
        self._device = None if device is None else torch.device(device)
        if self._device is not None and self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())  # as tensors there call it
        self._limit_bytes = math.inf if limit_bytes is None else limit_bytes
        self._banks: dict[tuple[Any, ...], torch.Tensor] = {}
        self._copies: dict[tuple[Any, ...], torch.Tensor] = {}
        """Banks on the device."""
        self._start = 0
        self._last: _Laid | None = None
        """Of the op before this one, where it was a draw."""
        self.num_drawn = 0
        """Numbers drawn for banks so far."""
        self.num_laid = 0
        """Elements filled from banks so far."""
        self.placed_bytes = 0
        """Asked for on the host, and made on the device."""

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._last = None
        self._banks.clear()
        self._copies.clear()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        last, self._last = self._last, None
        if func is torch.ops.aten.normal_.default and self._is_replaceable(args[0], named):
            mean, std = _two(args, named, ("mean", "std"))
            if std >= 0.0:  # torch says what is wrong with a negative one
                return self._fill(args[0], ("normal",), scale=std, shift=mean)
        elif func is torch.ops.aten.uniform_.default and self._is_replaceable(args[0], named):
            low, high = _two(args, named, ("from", "to"))
            if low <= high:
                return self._fill(args[0], ("uniform",), scale=high - low, shift=(low + high) / 2)
        elif func is torch.ops.aten.erfinv_.default and last is not None and last.target is args[0]:
            # Of a truncated normal. Two devices' error functions differ in the last bit, and so do one's in the middle and at the end of a vector.
            return self._lay(args[0], (last.kind, "erfinv", last.scale, last.shift), last.start, 1.0, 0.0)
        if self._device is None:
            return func(*args, **named)
        if func is torch.ops.aten.empty.memory_format:
            self._place(args[0], named)
        elif torch.Tag.nondeterministic_seeded in func.tags and any(self._is_there(value) for value in args):  # type: ignore[attr-defined]
            return self._drawn_on_host(func, args, named)
        return func(*args, **named)

    # -- where ---------------------------------------------------------------------------------------------------------------------

    def _is_there(self, value: Any) -> bool:
        return self._device is not None and isinstance(value, torch.Tensor) and value.device == self._device

    def _place(self, size: Sequence[int], named: dict[str, Any]) -> None:
        """Ask for the device's memory instead of the host's."""
        dtype = named.get("dtype") or torch.get_default_dtype()
        device, layout = named.get("device"), named.get("layout")
        on_host = (device is None or torch.device(device).type == "cpu") and not named.get("pin_memory")
        count = math.prod(size)
        if count > LARGE and dtype.is_floating_point and on_host and layout in (None, torch.strided):
            self.placed_bytes += count * dtype.itemsize
            if self.placed_bytes > self._limit_bytes:
                raise Elsewhere(f"{self.placed_bytes} bytes or more, and {self._limit_bytes} may be on {self._device}")
            named["device"] = self._device

    def _drawn_on_host(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A draw that is no bank's, in the numbers that the host would have had."""
        target = args[0]
        if not (self._is_there(target) and func._schema.name.endswith("_")):
            raise Elsewhere(f"{func} draws with the generator of {self._device}")
        host = target.to("cpu")
        func(host, *args[1:], **named)
        return target.copy_(host)

    # -- what ----------------------------------------------------------------------------------------------------------------------

    def _is_replaceable(self, target: torch.Tensor, named: Mapping[str, Any]) -> bool:
        return (
            target.numel() > LARGE
            and (target.device.type == "cpu" or self._is_there(target))
            and target.layout == torch.strided
            and target.is_floating_point()
            and named.get("generator") is None
        )

    def _fill(self, target: torch.Tensor, kind: tuple[str], *, scale: float, shift: float) -> torch.Tensor:
        start = self._start
        if kind not in self._banks:
            bank = torch.empty(BANK, dtype=torch.float32)
            # Uniform ones lie about zero, as nearly all that are asked for: one pass then fills them.
            self._banks[kind] = bank.normal_() if kind == ("normal",) else bank.uniform_().sub_(0.5)
            self.num_drawn += BANK
        self._lay(target, kind, start, scale, shift)
        self._start = (start + target.numel() + STEP) % BANK
        self._last = _Laid(target, kind[0], start, scale, shift)
        self.num_laid += target.numel()
        return target

    def _lay(self, target: torch.Tensor, key: tuple[Any, ...], start: int, scale: float, shift: float) -> torch.Tensor:
        in_place = target.is_contiguous()
        flat = target.view(-1) if in_place else torch.empty(target.numel(), dtype=target.dtype, device=target.device)
        lay(self._bank(key, target), flat, start, scale)
        if shift:
            flat.add_(shift)
        if not in_place:
            target.copy_(flat.view(target.shape))
        return target

    def _bank(self, key: tuple[Any, ...], target: torch.Tensor) -> torch.Tensor:
        """The numbers of a kind, on the target's device. A bank is drawn first; what is computed of one is computed here, on the host."""
        if key not in self._banks:
            kind, _, scale, shift = key
            self._banks[key] = torch.mul(self._banks[(kind,)], scale).add_(shift).erfinv_()
        if not self._is_there(target):
            return self._banks[key]
        if key not in self._copies:
            self._copies[key] = self._banks[key].to(target.device)
        return self._copies[key]


def lay(bank: torch.Tensor, target: torch.Tensor, start: int, scale: float = 1.0) -> int:
    """Fill the flat `target` with `scale` times the flat `bank` from `start` on, wrapping round; returns where the next one starts."""
    done = 0
    while done < target.numel():
        size = min(bank.numel() - start, target.numel() - done)
        piece, into = bank[start : start + size], target[done : done + size]
        if scale == 1.0:
            into.copy_(piece)
        else:
            torch.mul(piece, scale, out=into)
        done, start = done + size, (start + size) % bank.numel()
    return start


def _two(args: tuple[Any, ...], named: Mapping[str, Any], names: tuple[str, str]) -> tuple[float, float]:
    """Both numbers of a draw, by place or by name; torch's defaults are 0 and 1 for both kinds."""
    given = (*args[1:], *(None,) * 2)
    first, second = (
        named.get(name, default) if value is None else value for name, value, default in zip(names, given, (0.0, 1.0), strict=False)
    )
    return float(first), float(second)
