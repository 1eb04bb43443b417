"""Model -> a .safetensors file of its weights. Tied weights are written once; the metadata names the other names, as safetensors' own `load_model` expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gpuopt.converters.publish import publish
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Model


def save(model: Model, path: Path) -> Path:
    """Write parameters and persistent buffers to `path`, whole or not at all. Raises Unsupported for a form without weights of its own, ResourceError for a full disk.

    Metadata: `format` is `pt`; for each name left out because it is tied, its name -> the name it is tied to.
    """
    state = _state(model)
    kept, metadata = untie(state)
    with publish(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, temporary, metadata=metadata | {"format": "pt"})
    return path


def untie(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors without repeats, name left out -> name kept). Tensors that overlap without being the same are copied apart: a file cannot hold both."""
    kept: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name in sorted(state):
        tensor = state[name].detach()
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            tied[name] = first[view]
            continue
        first[view] = name
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone() if tensor.numel() and storage in storages else tensor
        storages.add(storage)
    return kept, tied


def _state(model: Model) -> dict[str, torch.Tensor]:
    if model.form in ("module", "torchscript"):
        found = model.module.state_dict()
    elif model.form == "exported":
        found = model.exported.state_dict
    else:
        raise Unsupported(
            f"a model of form {model.form!r} has no weights that could be written to safetensors", fix="convert the source model"
        )
    others = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise Unsupported(f"{others[0]} of {model.name} is not a tensor; safetensors holds nothing else", fix="leave it out of the state")
    return dict(found)
