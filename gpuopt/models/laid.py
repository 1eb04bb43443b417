"""A module on the meta device and how widely each weight scatters -> the module with its weights laid from one bank: whole, or one at a time into memory of the caller's.

For models whose weights are gigabytes: drawing them takes minutes, and a second copy of them does not fit. Where each weight starts in the bank follows from the module
alone, so any of them can be filled by itself, in any order and by several threads, and has the same values every time.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable

import torch
from torch import nn

from gpuopt.models.drawing import lay
from gpuopt.models.factory import SEED, Factory, offered, room_bytes

BANK = 16_777_213
"""Numbers in the bank of a large model: a prime, so that no two rows of a matrix of fewer rows hold the same values, whatever their width."""
TINY_BANK = 8_191
"""Of one of less than TINY parameters."""
TINY = 10_000_000
GOLDEN = 0.6180339887
"""Of the bank: what each weight starts further on. Sizes that are powers of two lie within a few numbers of a multiple of BANK, and their weights would be alike."""

Scatter = Callable[[str, nn.Parameter], float | None]
"""A parameter's name and itself -> its standard deviation about 0; None: all ones."""

_log = logging.getLogger(__name__)


class Laid:
    """A module without its weights, which can be had one by one. Its buffers are real."""

    def __init__(self, module: nn.Module, scatter: Scatter) -> None:
        """Parameters are on the meta device, in their final dtype; tied ones are one Parameter."""
        self.module = module
        self.num_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
        named = list(module.named_parameters())
        small = sum(p.numel() for _, p in named) < TINY
        self._bank = torch.empty(TINY_BANK if small else BANK, dtype=torch.float32).normal_(generator=torch.Generator().manual_seed(SEED))
        length, start = self._bank.numel(), 0
        self._holds: dict[int, tuple[float | None, int]] = {}
        """id of a parameter -> its deviation, and where it starts."""
        for name, parameter in named:
            self._holds[id(parameter)] = (scatter(name, parameter), start)
            start = (start + parameter.numel() + int(GOLDEN * length)) % length
        self._empty = dict(module.named_parameters(remove_duplicate=False))
        self._scaled: dict[tuple[float, torch.dtype, torch.device], torch.Tensor] = {}
        self._lock = threading.Lock()

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Write a parameter's values into a tensor of its dtype and shape, on any device. Raises ValueError for another."""
        parameter = self._empty[name]
        if target.shape != parameter.shape or target.dtype != parameter.dtype:
            raise ValueError(f"{name} is {parameter.dtype} {list(parameter.shape)}, its target {target.dtype} {list(target.shape)}")
        deviation, start = self._holds[id(parameter)]
        if deviation is None:
            target.fill_(1.0)
            return
        in_place = target.is_contiguous()
        flat = target.view(-1) if in_place else torch.empty(target.numel(), dtype=target.dtype, device=target.device)
        lay(self._numbers(deviation, target.dtype, target.device), flat, start)
        if not in_place:
            target.copy_(flat.view(target.shape))

    def sample(self, name: str, start: int, count: int) -> torch.Tensor:
        """[count] of a parameter's values in row-major order, from `start` on."""
        parameter = self._empty[name]
        deviation, first = self._holds[id(parameter)]
        found = torch.ones(count, dtype=parameter.dtype)
        if deviation is not None:
            bank = self._numbers(deviation, parameter.dtype, torch.device("cpu"))
            lay(bank, found, (first + start) % bank.numel())
        return found

    def materialize(self, names: Iterable[str] | None = None, *, device: str = "cpu") -> nn.Module:
        """Give parameters memory and values there, under all their names at once; all that have none yet where none are named. Returns the module; buffers stay where they are."""
        wanted = {id(self._empty[name]) for name in (self._empty if names is None else names)}
        made: dict[int, nn.Parameter] = {}
        for name, parameter in self._empty.items():
            owner, _, attribute = name.rpartition(".")
            holder = self.module.get_submodule(owner)
            if id(parameter) not in wanted or holder._parameters[attribute] is not parameter:  # given already
                continue
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                self.fill(name, value)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            holder._parameters[attribute] = made[id(parameter)]
        return self.module

    def _numbers(self, deviation: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The bank as it is copied: scaled and rounded on the host, so that every device has the same."""
        with self._lock:
            key = (deviation, dtype, device)
            if key not in self._scaled:
                host = (deviation, dtype, torch.device("cpu"))
                if host not in self._scaled:
                    self._scaled[host] = torch.mul(self._bank, deviation).to(dtype)
                self._scaled[key] = self._scaled[host].to(device)
            return self._scaled[key]


def laid_factory(*input_specs: str) -> Callable[[Callable[[], Laid]], Factory]:
    """Decorator, as `factory`, of a function that returns a Laid. The factory also has `laid()`, which returns it as it is."""

    def wrap(build: Callable[[], Laid]) -> Factory:
        def empty() -> Laid:
            found = build()
            found.module.eval().requires_grad_(False)
            return found

        @functools.wraps(build)
        def make() -> nn.Module:
            return empty().materialize()

        def on_device(device: str) -> nn.Module:
            found = empty()
            room = room_bytes(device)
            if room is not None and found.num_bytes > room:
                _log.debug("%s is built on the host: %s bytes, and %s may be on %s", build.__name__, found.num_bytes, room, device)
                return found.materialize()
            return found.module if device == "meta" else found.materialize(device=device).to(device)

        made = offered(make, input_specs, on_device)
        made.laid = empty  # type: ignore[attr-defined]
        return made

    return wrap
