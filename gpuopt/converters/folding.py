"""nn.Module + inputs -> the same module with its eval-mode batch norms folded into the convolutions and linear layers before them, in place.

Which layer feeds which batch norm is seen, not guessed: in a run with inputs, every tensor a layer gives is followed, and the batch norm must be its only reader.
Without inputs, each module that directly holds such a pair is traced by FX.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpuopt.converters.precision import cast_inputs
from gpuopt.core.live import Inputs

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVS, nn.Linear)


def fold(module: nn.Module, inputs: Inputs | None = None) -> str:
    """Fold every batch norm that can be; an Identity takes its place. Computed in fp64, stored in the weights' dtype. Returns how many of how many, and why not more."""
    norms = {name: part for name, part in module.named_modules() if type(part) in _NORMS}
    pairs = _by_running(module, cast_inputs(inputs, module)) if inputs is not None else list(_by_tracing(module))
    folded = 0
    for layer_name, norm_name in pairs:
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        if _is_safe(module, layer, norm):
            module.set_submodule(layer_name, _fused(layer, norm))
            module.set_submodule(norm_name, nn.Identity())
            folded += 1
    left = len(norms) - folded
    rest = f"; {left} stay: no layer feeds them alone, or its weights are shared or hooked" if left else ""
    return f"folded {folded} of {len(norms)} batch norms{rest}" if norms else "folded no batch norm: there is none"


def _fused(layer: Any, norm: Any) -> nn.Module:
    dtype, training = layer.weight.dtype, layer.training
    wide, wide_norm = copy.deepcopy(layer).double().eval(), copy.deepcopy(norm).double().eval()
    if isinstance(layer, nn.Linear):
        fused: nn.Module = fuse_linear_bn_eval(wide, wide_norm)
    else:
        fused = fuse_conv_bn_eval(wide, wide_norm, transpose=isinstance(layer, _CONVS[3:]))
    fused.to(dtype).train(training)
    for parameter in fused.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    return fused


def _is_safe(root: nn.Module, layer: Any, norm: Any) -> bool:
    """Exact types, statistics to fold, nothing attached, and weights that nobody else uses."""
    if type(layer) not in _LAYERS or type(norm) not in _NORMS or norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    # The generic rule of fuse_conv_bn_weights for transposed weights holds for one group only.
    if isinstance(layer, _CONVS[3:]) and layer.groups != 1:
        return False
    if any(part._forward_hooks or part._forward_pre_hooks or hasattr(part, "parametrizations") for part in (layer, norm)):
        return False
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.num_features != channels:
        return False
    own = [t for part in (layer, norm) for t in part.parameters(recurse=False)]
    memory = {t.untyped_storage().data_ptr() for t in own}
    users = sum(p.untyped_storage().data_ptr() in memory for p in (q for _, q in root.named_parameters(remove_duplicate=False)))
    return users == len(own)


# -- by running -------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What a run showed of one layer's output."""

    layer: str
    output: torch.Tensor
    """Held, so that no later tensor is taken for it."""
    readers: set[str] = field(default_factory=set)
    """Names of the batch norms that read it; "" is anybody else."""


def _by_running(root: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    calls: dict[str, int] = {}
    seen: dict[int, _Seen] = {}
    inside: list[str] = []
    """Batch norms being run now."""

    class Watch(TorchDispatchMode):
        """Every ATen op reads its arguments here, whichever module or function called it."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
                    seen[id(leaf)].readers.add(inside[-1] if inside else "")
            return func(*args, **(kwargs or {}))

    handles = []
    for name, part in root.named_modules():
        if type(part) in _LAYERS:

            def after_layer(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                is_flat = output.dim() == 2 or not isinstance(module, nn.Linear)
                if is_flat:
                    seen[id(output)] = _Seen(name, output)

            handles.append(part.register_forward_hook(after_layer))
        elif type(part) in _NORMS:

            def before_norm(module: nn.Module, args: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                inside.append(name)

            def after_norm(module: nn.Module, args: Any, output: Any) -> None:
                inside.pop()

            handles += [part.register_forward_pre_hook(before_norm), part.register_forward_hook(after_norm)]
    try:
        with torch.no_grad(), Watch():
            outputs = root(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in pytree.tree_leaves(outputs):
        if id(leaf) in seen:
            seen[id(leaf)].readers.add("")
    found = []
    for entry in seen.values():
        norm = next(iter(entry.readers)) if len(entry.readers) == 1 else ""
        if norm and calls[entry.layer] == 1 and calls[norm] == 1:
            found.append((entry.layer, norm))
    return found


# -- by tracing -------------------------------------------------------------------------------------------------------------------


class _OneLevel(fx.Tracer):
    """Traces a module's own forward; what it calls stays a single node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _by_tracing(root: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs inside one module's own forward. Linear layers are left out: the rank of their output, which decides, is not known here."""
    uses: dict[int, int] = {}
    for _, part in root.named_modules(remove_duplicate=False):
        uses[id(part)] = uses.get(id(part), 0) + 1
    for name, holder in root.named_modules():
        if not any(type(child) in _NORMS for child in holder.children()):
            continue
        try:
            graph = _OneLevel().trace(holder)
        # The module's own code runs on symbols and may raise anything at all: nothing is known of it then, and nothing is folded.
        except Exception:  # noqa: BLE001
            continue
        called: dict[str, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                called[str(node.target)] = called.get(str(node.target), 0) + 1
        for node in graph.nodes:
            if node.op != "call_module" or type(holder.get_submodule(str(node.target))) not in _NORMS:
                continue
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
                continue
            layer, norm = str(source.target), str(node.target)
            is_alone = called[layer] == called[norm] == 1 and all(uses[id(holder.get_submodule(n))] == 1 for n in (layer, norm))
            if type(holder.get_submodule(layer)) in _CONVS and is_alone:
                yield (f"{name}.{layer}" if name else layer), (f"{name}.{norm}" if name else norm)
