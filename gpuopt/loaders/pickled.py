"""A file of torch.save -> Model: a whole module where its globals are admitted, else tensors for --arch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gpuopt.core.live import Model
from gpuopt.core.spec import ModelRef
from gpuopt.loaders import describe, weights
from gpuopt.trust import consent, gate


def load(ref: ModelRef, path: Path) -> Model:
    """Raises Untrusted, BadInput, GateFailed; UsageError for bare tensors without --arch."""
    loaded = gate.load_checkpoint(path, ref.trust)
    notes: list[str] = []
    module = _module_in(loaded, notes)
    if module is None:
        return weights.of_tensors(ref, path, loaded)
    if ref.arch:
        notes.append(f"--arch {ref.arch} is not used: the file holds a whole module")
    if not ref.allow_nonfinite:
        describe.refuse_nonfinite(module.named_parameters(), path.name)
    return describe.of_module(module, name=describe.name_of(path), sha256=consent.sha256_of(path), notes=notes)


def _module_in(loaded: Any, notes: list[str]) -> nn.Module | None:
    """The module itself, or the only one in a training checkpoint such as {"epoch": 3, "model": module}."""
    if isinstance(loaded, nn.Module):
        return loaded
    if isinstance(loaded, Mapping):
        modules = {str(key): value for key, value in loaded.items() if isinstance(value, nn.Module)}
        if len(modules) == 1:
            ((key, module),) = modules.items()
            others = [str(k) for k in loaded if str(k) != key]
            notes.append(f"took the module under {key!r}" + (f"; ignored {', '.join(others[:5])}" if others else ""))
            return module
    return None
