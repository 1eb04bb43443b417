"""nn.Module + Precision -> the same module in another floating dtype, in place: integers stay integers, what was tied stays tied. TF32 is a switch, not a cast."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import Precision

CAST_DTYPES = ("float64", "float32", "bfloat16", "float16")
"""What a cast replaces. 8-bit floats are somebody's quantised values, complex numbers have no half; both are left."""

_FLOATS = tuple(getattr(torch, name) for name in CAST_DTYPES)
_ROTARY = frozenset({"inv_freq", "original_inv_freq"})
"""Buffers of transformers' rotary embeddings: its `forward` computes angles from them in fp32, and a position times a rounded frequency is a wrong angle."""


@contextmanager
def flags(precision: Precision | None) -> Iterator[None]:
    """TF32 on in products and convolutions for `tf32`, off for every other precision, untouched for None; put back afterwards.

    Set by the old switches alone, which carry the new ones (`fp32_precision`) with them: after the new ones alone, reading an old one raises (torch 2.9 to 2.13),
    and Inductor reads the old ones.
    """
    if precision is None:
        yield
        return
    with switches_kept():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision is Precision.TF32
        yield


@contextmanager
def switches_kept() -> Iterator[None]:
    """TF32 afterwards as it is now, whatever is set inside."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    try:
        yield
    finally:
        # allow_tf32 leaves the CPU's own switch alone; set_float32_matmul_precision would not.
        matmul.allow_tf32 = before[0] != "highest"
        cudnn.allow_tf32 = before[2] != "ieee" and before[2] != "none"
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before[1:]


def needs_cast(module: nn.Module, to: Precision) -> bool:
    """Whether any weight or buffer that a cast would touch has another dtype."""
    target = getattr(torch, to.dtype)
    return any(_is_cast(name, tensor, target) and tensor.dtype != target for name, tensor in _named_tensors(module))


def cast(module: nn.Module, to: Precision, keep_fp32: Sequence[str] = ()) -> list[str]:
    """Change every floating parameter and buffer of `module` to `to`, in place, but those of `keep_fp32`; returns what a user should know.

    `keep_fp32` holds qualified names, `*` allowed; such a module gets fp32 inputs and hands on outputs of the new dtype. Raises UsageError for a name that fits no
    module, and for weights shared between a kept and a cast module. Weights that share memory before share it after, whether they are one Parameter or several.
    """
    assert not to.is_quantised, f"{to} needs scales: quantised.quantise"
    target: torch.dtype = getattr(torch, to.dtype)
    kept = _kept(module, keep_fp32) if target != torch.float32 else {}
    groups = _aliases(module)
    _refuse_torn_ties(groups, kept)
    skipped = {id(tensor) for name, tensor in _named_tensors(module) if _inside(name, kept) or not _is_cast(name, tensor, target)}
    finite = {id(p): name for name, p in module.named_parameters() if target == torch.float16 and p.is_floating_point()}
    overflowed: list[str] = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in skipped or tensor.dtype not in _FLOATS:
            return tensor
        changed = tensor.to(target)
        name = finite.get(id(tensor))
        if name is not None and bool(torch.isinf(changed).any()) and not bool(torch.isinf(tensor).any()):
            overflowed.append(name)
        return changed

    module._apply(change)
    for part in kept.values():
        part._apply(lambda t: t.to(torch.float32) if t.dtype in _FLOATS else t)
        part.register_forward_pre_hook(_CastInputs(torch.float32), with_kwargs=True)
        part.register_forward_hook(_CastOutputs(target))
    _retie(groups)
    notes = [f"cast to {to.dtype}" + (f", {len(kept)} modules kept in fp32" if kept else "")]
    if overflowed:
        notes.append(
            f"weights too large for fp16 became infinite in {', '.join(overflowed[:3])}{' and more' if len(overflowed) > 3 else ''}: use bf16"
        )
    wanted = sorted(
        {*(getattr(module, "_keep_in_fp32_modules", None) or ()), *(getattr(module, "_keep_in_fp32_modules_strict", None) or ())}
    )
    if wanted and target == torch.float16 and not kept:
        notes.append(
            f"{type(module).__name__} asks that {', '.join(wanted)} stay in fp32 when the rest is fp16: --keep-fp32 '*.{wanted[0]}'"
        )
    return notes


def cast_inputs(inputs: Inputs, module: nn.Module) -> Inputs:
    """The same inputs on the module's device, floating ones in its dtype."""
    first = next((p for p in module.parameters() if p.dtype in _FLOATS), None)
    if first is None:
        return inputs
    device, dtype = first.device, first.dtype

    def change(value: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device=device, dtype=dtype if t.dtype in _FLOATS else None), value)

    return inputs.map(change)


def copied(module: nn.Module, device: str | None = None) -> Any:
    """A deep copy in which whatever shared memory still does: `copy.deepcopy` tears two Parameters over one memory apart.

    `device`: of the copy's parameters and buffers, which go there without a copy on their own device. Tensors kept in plain attributes stay where they are, as in `.to`.
    """
    twin = copy.deepcopy(module, _moved(module, device) if device is not None else {})
    tensors = dict(_named_tensors(twin))
    _retie([[(name, tensors[name]) for name, _ in group] for group in _aliases(module)])
    return twin


def _moved(module: nn.Module, device: str) -> dict[int, Any]:
    """What `copy.deepcopy` takes for copied already: id of a tensor -> its copy there. Other than plain ones are left to it."""
    found: dict[int, Any] = {}
    for _, tensor in _named_tensors(module):
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_leaf and not tensor.is_meta and id(tensor) not in found:
            copied_there = tensor.detach().to(device, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            found[id(tensor)] = nn.Parameter(copied_there, tensor.requires_grad) if is_parameter else copied_there
    return found


class _CastInputs:
    """Forward pre-hook: floating inputs to `dtype`. A class, so that the module can still be copied and pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _floats_to(args, self.dtype), _floats_to(kwargs, self.dtype)


class _CastOutputs:
    """Forward hook: floating outputs to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _floats_to(output, self.dtype)


def _floats_to(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.dtype in _FLOATS else t, value)


def _is_cast(name: str, tensor: torch.Tensor, target: torch.dtype) -> bool:
    if tensor.dtype not in _FLOATS:
        return False
    return not (name.rpartition(".")[2] in _ROTARY and target.itemsize < tensor.dtype.itemsize)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _kept(module: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Outermost modules that fit a pattern, by name."""
    parts = {name: part for name, part in module.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        names = [name for name in parts if fnmatchcase(name, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern, parts, n=1)
            raise UsageError(
                f"no module is called {pattern!r}, which was to stay in fp32",
                fix=f"did you mean {close[0]!r}?" if close else f"its modules begin with {', '.join(list(parts)[:5])}",
            )
        found |= {name: parts[name] for name in names}
    return {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _inside(tensor_name: str, kept: Iterable[str]) -> bool:
    return any(tensor_name.startswith(f"{name}.") for name in kept)


def _aliases(module: nn.Module) -> list[list[tuple[str, torch.Tensor]]]:
    """Groups of names whose tensors are the same memory seen the same way; only groups of two or more."""
    groups: dict[Any, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _named_tensors(module):
        if tensor.numel() and tensor.layout == torch.strided and tensor.device.type != "meta":
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), []).append((name, tensor))
    return [group for group in groups.values() if len(group) > 1]


def _refuse_torn_ties(groups: list[list[tuple[str, torch.Tensor]]], kept: dict[str, nn.Module]) -> None:
    for group in groups:
        inside = [name for name, _ in group if _inside(name, kept)]
        outside = [name for name, _ in group if name not in inside]
        if inside and outside:
            raise UsageError(
                f"{inside[0]} was to stay in fp32 but is the same weight as {outside[0]}",
                fix="keep both of their modules in fp32, or neither",
            )


def _retie(groups: list[list[tuple[str, torch.Tensor]]]) -> None:
    """One Parameter under two names was cast once; two Parameters over one memory were cast apart and are joined again here."""
    for group in groups:
        first = group[0][1]
        for name, tensor in group[1:]:
            if tensor is not first:
                tensor.data = first.data
            assert tensor.data_ptr() == first.data_ptr(), f"{name} came loose from {group[0][0]}"
