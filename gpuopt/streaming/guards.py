"""A module whose parameters are views of slots -> one that never takes a slot's bytes for its weights: what reads weights reads the true ones, what would lose or move them raises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import nn

from gpuopt.core.errors import UsageError

Undo = Callable[[], object]


class Turn:
    """Whose forward it is. A thread may take it again within its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def take(self) -> None:
        """Raises UsageError while another thread has it."""
        me = threading.get_ident()
        if self._owner != me:
            if not self._lock.acquire(blocking=False):
                raise UsageError(
                    "a second forward began while another thread's was running: both would read and write the same slots",
                    fix="run one forward at a time: a lock around the model, or a queue in front of it",
                )
            self._owner = me
        self._depth += 1

    def give(self) -> None:
        """Once for each `take`."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()


def refuse_training(module: nn.Module) -> None:
    """Raises UsageError in training mode and where gradients are recorded: a backward would read weights that have been overwritten."""
    if module.training:
        raise UsageError("the model is in training mode; streamed weights are overwritten within a forward", fix="call model.eval()")
    if torch.is_grad_enabled():
        raise UsageError(
            "gradients are recorded; a backward would read weights that have been overwritten since",
            fix="call the model under torch.inference_mode() or torch.no_grad()",
        )


class Writes:
    """Parameters whose data are slots, and how often PyTorch had seen each written when it was bound."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        counted = ((name, parameter, _count(parameter)) for name, parameter in parameters.items())
        self._known = [(name, parameter, count) for name, parameter, count in counted if count is not None]

    def refuse(self) -> None:
        """Raises UsageError where one was written in place since (a merged adapter, an optimiser): the next copy would undo it. `p.data.add_` goes unseen."""
        for name, parameter, version in self._known:
            if parameter._version != version:
                raise UsageError(
                    f"{name} was changed while streamed: the change is in a slot, and the next copy overwrites it",
                    fix="close() first, change the weights, and stream again",
                )


def _count(parameter: torch.Tensor) -> int | None:
    """None for what was made in inference mode, even if its data is not: it keeps no count."""
    try:
        return parameter._version
    except RuntimeError:
        return None


def install(root: nn.Module, owned: Mapping[str, Mapping[str, str]], read: Callable[[str], torch.Tensor], device: torch.device) -> Undo:
    """Guard a module. Gives what takes the guards off.

    Parameters
    ----------
    owned: module name -> its own streamed parameters, as `weight` -> `model.layers.3.mlp.weight`.
    read: a parameter's full name -> its true values, on the CPU.
    device: a `.to(device)` to where the model is already changes nothing and passes.
    """
    undo = ExitStack()
    modules = dict(root.named_modules())
    for name, names in owned.items():
        undo.callback(modules[name].register_state_dict_post_hook(_reader(names, read)).remove)
    for name in sorted(_with_ancestors(owned)):
        module = modules[name]
        undo.callback(module.register_load_state_dict_pre_hook(_refuse_loading).remove)
        # Looked up on the instance by torch, copy and pickle alike.
        for attribute, replacement in (
            ("_apply", _refuse_applying),
            ("to", _to(module, device)),
            ("__deepcopy__", _refuse_copying),
            ("__reduce_ex__", _refuse_copying),
        ):
            undo.callback(put(module, attribute, replacement))
    return undo.close


def put(module: nn.Module, attribute: str, value: Any) -> Undo:
    """Set an attribute on an instance; gives what puts back what it had, or did not have."""
    missing = object()
    before = module.__dict__.get(attribute, missing)
    module.__dict__[attribute] = value

    def back() -> None:
        if before is missing:
            module.__dict__.pop(attribute, None)
        else:
            module.__dict__[attribute] = before

    return back


def _with_ancestors(names: Iterable[str]) -> set[str]:
    found = {""}
    for name in names:
        parts = name.split(".") if name else []
        found.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return found


def _reader(names: Mapping[str, str], read: Callable[[str], torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for local, full in names.items():
            if prefix + local in state:
                state[prefix + local] = read(full)

    return hook


def _refuse_loading(*_args: Any) -> NoReturn:
    raise UsageError(
        "load_state_dict() would write into slots, which the next copy overwrites", fix="close() first, load, and stream again"
    )


def _refuse_applying(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise UsageError(
        "weights cannot be moved or cast while they are streamed: most are in host memory, and slots hold others' by turns",
        fix="close() first, then .to(); to run in another precision, convert before streaming",
    )


def _refuse_copying(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise UsageError(
        "a streamed model cannot be copied or pickled: the copy would take what the slots hold by turns for its weights",
        fix="save model.state_dict(), which reads the true weights, or close() first",
    )


def _to(module: nn.Module, device: torch.device) -> Callable[..., nn.Module]:
    def to(*args: Any, **kwargs: Any) -> nn.Module:
        asked, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        is_here = asked is not None and asked.type == device.type and asked.index in (None, device.index)
        if is_here and dtype is None and memory_format is None:
            return module
        return _refuse_applying()

    return to
