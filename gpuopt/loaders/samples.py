"""A file of real samples + one call's inputs -> batches of that call's sizes, with the targets beside them.

Samples lie along the dimension that the model calls N (the first one where it names none). Arrays are matched to inputs by name; whatever else the file holds
is a target. The last batch is filled up with the first samples, so that every sample is used and compiled code sees the one size it was built for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.loaders import inputs as input_files
from gpuopt.trust import consent
from gpuopt.trust.policy import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One call on real data."""

    inputs: Inputs
    """On the CPU, as stored."""
    targets: Mapping[str, torch.Tensor]
    """Arrays that are no inputs, the same samples."""
    num_new: int
    """Samples that no batch before it held: the weight of its score."""

    def arrays(self) -> dict[str, torch.Tensor]:
        """Everything by its name in the file."""
        names = [spec.name for spec in self.inputs.specs]
        values = [*self.inputs.args, *self.inputs.kwargs.values()]
        return {**dict(zip(names, values, strict=True)), **self.targets}


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A file's samples, in batches made when they are asked for."""

    like: Inputs
    axes: Mapping[str, int]
    """Input -> the dimension its samples lie along; an input without one is the same in every batch."""
    inputs: Mapping[str, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    num_samples: int
    batch: int
    sha256: str
    """Of the file."""

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.batch
        chosen = torch.arange(start, start + self.batch) % self.num_samples
        values = [self._chosen(spec.name, chosen) for spec in self.like.specs]
        count = len(self.like.args)
        names = list(self.like.kwargs)
        made = Inputs(
            args=tuple(values[:count]),
            kwargs=dict(zip(names, values[count:], strict=True)),
            specs=self.like.specs,
            dims=self.like.dims,
            source=f"samples {start} to {min(start + self.batch, self.num_samples) - 1}",
        )
        targets = {name: tensor.index_select(0, chosen) for name, tensor in self.targets.items()}
        return Batch(inputs=made, targets=targets, num_new=min(self.batch, self.num_samples - start))

    def _chosen(self, name: str, chosen: torch.Tensor) -> torch.Tensor:
        axis = self.axes.get(name)
        return self.inputs[name] if axis is None else self.inputs[name].index_select(axis, chosen)


def read(path: Path, like: Inputs, option: str, *, with_targets: bool = True) -> Samples:
    """`like`: the candidate's own inputs, whose names, dtypes and sizes the samples must have. Raises UsageError naming the array that does not fit, BadInput
    for a damaged file."""
    arrays = input_files.read(path, option)
    what = f"{option} {printable(path.name)}"
    own = dict(zip((spec.name for spec in like.specs), (*like.args, *like.kwargs.values()), strict=True))
    found: dict[str, torch.Tensor] = {}
    axes: dict[str, int] = {}
    counts: dict[str, int] = {}
    any_named = any("N" in spec.shape for spec in like.specs)
    for spec in like.specs:
        tensor = arrays.get(spec.name)
        if tensor is None and spec.fill is not None:
            found[spec.name] = own[spec.name]  # a mask of ones, a type of zeros: the same in every sample
            continue
        if tensor is None:
            raise UsageError(
                f"{what} has no array {spec.name!r}; it has {', '.join(printable(n) for n in arrays)}",
                fix=f"numpy.savez(FILE, {', '.join(f'{s.name}=…' for s in like.specs)}), one array an input",
            )
        axis = spec.shape.index("N") if "N" in spec.shape else None if any_named or not own[spec.name].dim() else 0
        found[spec.name] = _fitting(tensor, own[spec.name], spec, axis, what, like)
        if axis is not None:
            axes[spec.name], counts[spec.name] = axis, int(tensor.shape[axis])
    targets = {name: tensor for name, tensor in arrays.items() if name not in own} if with_targets else {}
    for name, tensor in targets.items():
        if not tensor.dim():
            raise UsageError(
                f"{what}: {printable(name)!r} is a single number, and a target has one entry a sample", fix="leave it out of the file"
            )
        counts[name] = int(tensor.shape[0])
    if not axes:
        raise UsageError(
            f"{what}: no input of this model has a batch dimension to take samples along",
            fix="--inputs FILE gives the one set there can be",
        )
    sizes = sorted(set(counts.values()))
    if len(sizes) != 1:
        raise UsageError(
            f"{what}: arrays of different numbers of samples: {', '.join(f'{printable(n)} {c}' for n, c in counts.items())}",
            fix="one entry a sample in each",
        )
    if not sizes[0]:
        raise UsageError(f"{what} holds no samples", fix="at least one")
    first = next(iter(axes))
    return Samples(
        like=like,
        axes=axes,
        inputs=found,
        targets=targets,
        num_samples=sizes[0],
        batch=int(own[first].shape[axes[first]]),
        sha256=consent.sha256_of(path),
    )


def _fitting(tensor: torch.Tensor, own: torch.Tensor, spec: TensorSpec, axis: int | None, what: str, like: Inputs) -> torch.Tensor:
    """The array in the input's dtype, if it has its sizes but for the samples."""
    shape = [*tensor.shape]
    wanted = [*own.shape]
    if len(shape) != len(wanted) or any(a != b for i, (a, b) in enumerate(zip(shape, wanted, strict=True)) if i != axis):
        shown = ", ".join("samples" if i == axis else str(size) for i, size in enumerate(wanted))
        raise UsageError(f"{what}: {spec.name!r} is {shape}, the candidate takes [{shown}]", fix=_resized(spec, shape, axis))
    if _kind(tensor) != _kind(own):
        raise UsageError(f"{what}: {spec.name!r} is {_name(tensor)}, {_name(own)} is taken", fix=f"store it as {_name(own)}")
    if not own.is_floating_point() and not own.is_complex() and tensor.dtype != own.dtype:
        changed = tensor.to(own.dtype)
        if not torch.equal(changed.to(tensor.dtype), tensor):
            raise UsageError(f"{what}: {spec.name!r} holds numbers that {_name(own)} cannot", fix=f"store it as {_name(own)}")
        return changed
    return tensor


def _resized(spec: TensorSpec, shape: Sequence[int], axis: int | None) -> str:
    if len(shape) == len(spec.shape):
        free = [
            f"--dim {letter}={size}"
            for i, (letter, size) in enumerate(zip(spec.shape, shape, strict=True))
            if isinstance(letter, str) and i != axis
        ]
        if free:
            return " ".join(free)
    return f"store it as {spec}"


def _kind(tensor: Any) -> str:
    if tensor.dtype is torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
