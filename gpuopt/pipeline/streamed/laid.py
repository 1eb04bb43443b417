"""A factory with `laid()` -> its module for streaming without weights, each of them made where it will lie: in a slab, once, at the speed of memory. Imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef
from gpuopt.core.streaming import Unit
from gpuopt.loaders import FACTORY_EXAMPLE, describe, factory
from gpuopt.streaming import meta

if TYPE_CHECKING:
    import torch

    from gpuopt.models.laid import Laid


def opened(ref: ModelRef) -> tuple[Model, LaidWeights] | None:
    """None for a factory that has no `laid`. Raises UsageError and Unavailable, as loading does."""
    where, _, name = ref.text.rpartition(":")
    if not where or where.endswith(".py"):  # a user's file is run by whoever loads it, once
        return None
    target, _ = factory.named(ref.text, "factory", FACTORY_EXAMPLE)
    if not hasattr(target, "laid"):
        return None
    weights = LaidWeights(target.laid())
    unused = [f"--arch {ref.arch} is not used: {ref.text} is a factory itself"] if ref.arch else []
    return describe.of_module(weights.module, name=name, signature=describe.declared_signature(target), notes=unused), weights


class LaidWeights:
    """`streaming.meta.Weights` of a model whose weights are laid from a bank. Any of them can be made again, so none has to be kept."""

    def __init__(self, laid: Laid) -> None:
        self._laid = laid
        self.module = laid.module
        self.notes: list[str] = []

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Write a parameter's values into a tensor of its dtype and shape."""
        self._laid.fill(name, target)

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        """Write a unit's slab: its tensors, and zeros between them."""
        meta.clear_gaps(unit, target)
        for place in unit.places:
            self._laid.fill(place.name, meta.typed(target[place.offset : place.offset + place.num_bytes], place))

    def materialize(self, names: Iterable[str] | None = None) -> None:
        """Give parameters memory and values on the CPU, all that have none where none are named."""
        self._laid.materialize(names)

    def fingerprint(self) -> str:
        """As of the files they would be saved to."""
        return meta.fingerprint(self.module, self._laid.sample)

    def close(self) -> None:
        """Nothing is open."""
