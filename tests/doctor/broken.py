"""Models that raise, and the same ones mended: real ones, on devices that need no GPU (`meta` stands for it)."""

from __future__ import annotations

import math
from typing import Any

import torch
from builders import evidence
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.doctor.evidence import Evidence


def raised(module: nn.Module, *args: Any, **kwargs: Any) -> Exception:
    """What a call of it raises, with its traceback."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("the model works")


def failing(module: nn.Module, *args: Any, **kwargs: Any) -> Evidence:
    """Evidence of a call that raised."""
    return evidence(module=module.eval(), inputs=Inputs(args=args, kwargs=kwargs), failure=raised(module, *args, **kwargs))


def working(module: nn.Module, *args: Any, **kwargs: Any) -> Evidence:
    """The same of one that went through, traced nowhere: the models are too small to have opinions about."""
    with torch.no_grad():
        module.eval()(*args, **kwargs)
    return evidence(inputs=Inputs(args=args, kwargs=kwargs), failure=None)


class Scaled(nn.Module):
    """A layer whose scale is a plain attribute, or registered."""

    def __init__(self, width: int, *, registered: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        if registered:
            self.register_buffer("scale", torch.ones(width), persistent=False)
        else:
            self.scale = torch.ones(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc(hidden) * self.scale


class Mlp(nn.Module):
    """Two scaled layers and a head."""

    def __init__(self, *, registered: bool = True, head: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scaled(8, registered=True), Scaled(8, registered=registered)])
        self.head = nn.Linear(head, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        pooled = x.relu()
        return self.head(pooled)


class Attention(nn.Module):
    """Self-attention with rotary frequencies, in whatever dtype they were made."""

    def __init__(self, width: int, frequencies: torch.Tensor) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("frequencies", frequencies)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        turned = key * self.frequencies.cos()
        scores = query @ turned.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return self.out(scores.softmax(-1) @ value)


class Encoder(nn.Module):
    """Words, positions, attention."""

    def __init__(
        self, *, vocabulary: int = 50, positions: int = 16, registered: bool = True, frequencies: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, 8)
        self.positions = nn.Embedding(positions, 8)
        self.attention = Attention(8, torch.linspace(0, 1, 8) if frequencies is None else frequencies)
        self.norm = nn.LayerNorm(8)
        if registered:
            self.register_buffer("position_ids", torch.arange(positions), persistent=False)
        else:
            self.position_ids = torch.arange(positions)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        hidden = self.words(input_ids) + self.positions.weight[self.position_ids[:length]]
        return self.norm(self.attention(hidden))


class Positional(nn.Module):
    """Positions made inside forward()."""

    def __init__(self, *, follows: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.follows = follows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.follows:
            ramp = torch.arange(4, device=x.device)
        else:
            ramp = torch.arange(4)
        return self.fc(x) + ramp


class Images(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


class Hungry(nn.Module):
    """Raises as CUDA's allocator does, in its second layer."""

    def __init__(self, *, hungry: bool) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 4096)
        self.second = nn.Linear(4096, 1024)
        self.hungry = hungry

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.hungry and not isinstance(x, torch._subclasses.FakeTensor):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 64.00 MiB of which 8.00 MiB is free. "
                "Of the allocated memory 40.00 MiB is allocated by PyTorch, and 4.00 MiB is reserved by PyTorch but unallocated."
            )
        return self.second(hidden)
