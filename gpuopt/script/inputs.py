"""A call's arguments -> specs as text (`x:float32[8,3,224,224]`), and a file that `--inputs` takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

SpecKey = tuple[tuple[int | str, str, tuple[int, ...]], ...]
"""(position or keyword, dtype, shape) of every tensor."""


def spec_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SpecKey:
    """What kind of call this is: cheap, for it is made at every call. Tensors one level down in a list, tuple or mapping count too."""
    return tuple((place, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for place, tensor in _tensors(args, kwargs))


def spec_texts(names: tuple[str, ...], key: SpecKey) -> tuple[str, ...]:
    """As `TensorSpec` is written, with the names of forward()'s parameters."""
    return tuple(f"{_named(names, place)}:{dtype}[{','.join(str(n) for n in shape)}]" for place, dtype, shape in key)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of forward()'s positional parameters; of the wrapped model's for a wrapper that takes anything."""
    inner = getattr(module, "_orig_mod", None) or (module.module if isinstance(module, nn.DataParallel) else module)
    kind: type = type(inner)
    return _signature(kind)


@lru_cache(maxsize=256)
def _signature(kind: type) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (TypeError, ValueError, AttributeError):  # built in C, or scripted
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int | str, torch.Tensor]]:
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in given:
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, list | tuple):
            for at, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield f"{place}.{at}", item
        elif isinstance(value, Mapping):
            for name, item in value.items():
                if isinstance(item, torch.Tensor):
                    yield f"{place}.{name}", item


def _named(names: tuple[str, ...], place: int | str) -> str:
    text = str(place)
    head, dot, rest = text.partition(".")
    if head.isdigit():
        head = names[int(head)] if int(head) < len(names) else f"input{head}"
    return f"{head}{dot}{rest}"


def save(folder: Path, name: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], notes: list[str]) -> str | None:
    """Write the tensors of a call as `folder/name.safetensors`: its file name, or None with a note that says why not. The program goes on either way."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        notes.append("inputs were not saved: pip install safetensors")
        return None
    # Clones: two inputs may share memory, which the format does not allow.
    tensors = {_named(names, place): tensor.detach().cpu().clone().contiguous() for place, tensor in _tensors(args, kwargs)}
    if not tensors:
        notes.append(f"{name}: its first call has no tensors to save")
        return None
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "model"
    path = folder / f"{stem}.safetensors"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    except (OSError, ValueError, RuntimeError) as error:
        notes.append(f"{name}: its inputs were not saved: {error}"[:300])
        return None
    return path.name
