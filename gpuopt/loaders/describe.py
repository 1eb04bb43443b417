"""nn.Module -> Model: eval mode, a printable name, its commonest dtype, its size."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuopt.core.errors import BadInput, GateFailed, UsageError
from gpuopt.core.live import Model
from gpuopt.core.spec import TensorSpec
from gpuopt.trust.policy import printable


def of_module(
    module: nn.Module,
    *,
    name: str,
    form: str = "module",
    exported: Any = None,
    signature: tuple[TensorSpec, ...] = (),
    sha256: str | None = None,
    notes: Iterable[str] = (),
) -> Model:
    """The Model around a module. Puts it into eval mode, which a note says."""
    said = list(notes)
    if form == "module" and any(part.training for part in module.modules()):
        module.eval()
        said.append("the model was in training mode: switched to eval (dropout off, batch-norm statistics fixed)")
    parameters = list(module.parameters())
    return Model(
        form=form,
        name=printable_name(name),
        module=module,
        exported=exported,
        signature=signature or declared_signature(module),
        sha256=sha256,
        config=getattr(module, "config", None) if _has_configuration(module) else None,
        dtype=commonest_dtype(parameters),
        num_parameters=sum(p.numel() for p in parameters),
        notes=said,
    )


def printable_name(text: str) -> str:
    """A name for tables and file names: letters, digits, `._-`, at most 64.

    >>> printable_name("../../étc/my model\\n.pt")
    'tc_my_model_.pt'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:64] or "model"


def name_of(path: Path) -> str:
    """A file's or folder's name without its suffix."""
    full = path.absolute()
    return full.stem if full.is_file() else full.name


def commonest_dtype(tensors: Iterable[torch.Tensor]) -> str | None:
    """Torch's name of the floating dtype with the most elements; None without floating tensors."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else None


def declared_signature(source: Any) -> tuple[TensorSpec, ...]:
    """`input_specs` of a factory or module, parsed; empty where there is none. Raises UsageError for a text that is no TensorSpec."""
    texts = getattr(source, "input_specs", ())
    if not isinstance(texts, (tuple, list)):
        raise UsageError(f"input_specs is a {type(texts).__name__}, not a tuple of texts", fix='input_specs = ("x:float32[N,3,224,224]",)')
    specs: list[TensorSpec] = []
    for text in texts:
        specs.append(text if isinstance(text, TensorSpec) else TensorSpec.parse(str(text)))
    return tuple(specs)


def refuse_nonfinite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Raises GateFailed naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors:
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided or tensor.is_meta:
            continue
        checked = tensor.float() if tensor.element_size() == 1 else tensor  # neither has a kernel for the 8-bit floats
        if _is_finite(checked):
            continue
        finite = torch.isfinite(checked)
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise GateFailed(
                f"{where}: tensor {printable(name)!r} holds {count} NaN or Inf of {tensor.numel()} values",
                fix="find out where training diverged; --allow-nonfinite loads it anyway",
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether extremes show that all is finite. They take no memory, where `isfinite` takes more than the tensor; NaN among the values is an extreme."""
    if tensor.is_complex() or tensor.numel() == 0 or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def require_module(value: Any, what: str) -> nn.Module:
    """Raises BadInput naming what there is instead."""
    if not isinstance(value, nn.Module):
        raise BadInput(f"{what} is a {type(value).__name__}, not an nn.Module", fix="name something that gives an nn.Module")
    return value


def _has_configuration(module: nn.Module) -> bool:
    """Whether `config` is a transformers configuration; looked up without importing transformers."""
    config = getattr(module, "config", None)
    return any(base.__name__ in ("PretrainedConfig", "PreTrainedConfig") for base in type(config).__mro__)
