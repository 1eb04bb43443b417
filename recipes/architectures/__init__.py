"""Configurations of known architectures, each with its FLOPs counted by hand from the same numbers: what `gpuopt`'s counter is held against.

A hand count is a formula over the configuration's sizes (`arithmetic`), never a walk over the module. Widths are those of published models where the count is
cheap, depths are cut to what shows the structure; weights are never made: modules live on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row of the table."""

    name: str
    shows: str
    """What of the architecture a counter can get wrong."""
    build: Callable[[], nn.Module]
    """Called on the meta device."""
    args: tuple[torch.Tensor, ...] = ()
    kwargs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    hand: float
    """FLOPs of one call, by hand."""
    published: float | None = None
    """FLOPs that somebody else printed for the same model."""
    source: str = ""
    """Who printed it."""

    def module(self) -> nn.Module:
        """The model without weights, in eval mode."""
        with torch.device("meta"):
            return self.build().eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    """Token ids without values."""
    return torch.empty(batch, length, dtype=torch.int64, device="meta")


def floats(*shape: int) -> torch.Tensor:
    """Images, waves, features without values."""
    return torch.empty(shape, device="meta")


TORCHVISION = "torchvision's weights table (multiply-adds, doubled)"


def table() -> dict[str, Architecture]:
    """Name -> row, in the order of the documentation."""
    from . import convnets, decoders, encoders, recurrent, reference, sequences, vision

    modules: tuple[Any, ...] = (reference, encoders, decoders, sequences, vision, convnets, recurrent)
    rows: list[Architecture] = [row() for module in modules for row in module.ROWS]
    named = {row.name: row for row in rows}
    assert len(named) == len(rows), "two architectures of one name"
    return named
