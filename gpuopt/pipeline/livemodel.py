"""A caller's nn.Module and tensors -> the handles Model and Inputs, with the original left alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec


def handles(module: torch.nn.Module, inputs: Any) -> tuple[Model, Inputs]:
    """The first dimension of the first tensor is the batch, N. Raises UsageError for what is no module or no tensors, Unsupported for what cannot be copied."""
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"a torch.nn.Module is wanted, not {type(module).__name__}", fix="pass the module itself")
    bound = inputs if isinstance(inputs, Inputs) else of_call(inputs)
    was_training = any(part.training for part in module.modules())
    notes = ["the model is in training mode: a copy in eval mode is used"] if was_training else []
    try:
        # Always a copy: the original must not move to another device, nor keep tensors that were made without gradients.
        copied = copy.deepcopy(module).eval()
    except (RuntimeError, TypeError) as error:  # weight norm, locks, open files
        if was_training:
            raise Unsupported(f"the model cannot be copied, and it is in training mode: {error}", fix="model.eval() first") from error
        copied = module
        notes.append(f"the model cannot be copied, it is used itself: {error}")
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    model = Model(
        form="module",
        name=type(module).__name__,
        module=copied,
        dtype=str(max(set(floats), key=floats.count)).removeprefix("torch.") if floats else "float32",
        num_parameters=sum(p.numel() for p in module.parameters()),
        notes=notes,
    )
    return model, bound


def of_call(inputs: Any) -> Inputs:
    """A tensor, a tuple of them, or a dict of keyword arguments -> Inputs. Raises UsageError for anything else."""
    kwargs: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    named = [(f"arg{i}", value) for i, value in enumerate(args)] + list(kwargs.items())
    for name, value in named:
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"input {name} is a {type(value).__name__}, not a tensor", fix="pass tensors, a tuple of them, or a dict of them"
            )
    specs = tuple(TensorSpec(name=n, dtype=str(v.dtype).removeprefix("torch."), shape=tuple(v.shape)) for n, v in named)
    batch = named[0][1].shape[0] if named and named[0][1].dim() else 1
    return Inputs(args=args, kwargs=kwargs, specs=specs, dims={"N": batch}, source="the caller's tensors")
