"""A transformers model -> the same model, in whose graph no attention mask is built where none is given.

Called without a mask, transformers leaves it away in eager but builds it while a graph is traced (it could not look into a given one there): the attention kernel then
falls to one that takes masks, and for some shapes to fp32 products with a full softmax. Causal models tell the kernel `is_causal` instead. A mask that is given stays.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from gpuopt.converters.rewrites import dry, implementations
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs

WHAT = "build no attention mask inside the graph where none is given (transformers)"
APPROXIMATE = False
SETTINGS: tuple[str, ...] = ()

_BUILDERS = frozenset(
    {
        "create_causal_mask",
        "create_bidirectional_mask",
        "create_sliding_window_causal_mask",
        "create_bidirectional_sliding_window_mask",
        "create_chunked_causal_mask",
        "create_masks_for_generate",
    }
)
"""transformers' own, in masking_utils."""


def applies(module: nn.Module) -> str | None:
    """None for a transformers model that calls one of transformers' mask builders and attends by sdpa. Static."""
    reason = implementations.why_not(module)
    if reason is not None:
        return reason
    if not any(_builders(part) for part in module.modules()):
        return "its attention takes no mask"
    return None


def apply(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
    """Mask functions of ours in every configuration below `module`. Raises Unsupported where no configuration is left to change."""
    if not implementations.drop_masks(module):
        raise Unsupported("no_mask has nothing to change", fix="leave it out")
    note = "no attention mask is built where none is given"
    counting = [part for part in module.modules() if _counts_positions(part)]
    if counting and inputs is not None:
        handles = [part.register_forward_pre_hook(_NothingGiven(part), with_kwargs=True) for part in counting]
        try:
            dry.run(module, inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            for handle in handles:
                handle.remove()
            dry.run(module, inputs)  # as it was: what this raises is the model's own
            reason = (str(error).splitlines() or [""])[0][:120]
            note += f"; positions are still searched for packed sequences ({reason})"
    return note


def _builders(part: nn.Module) -> frozenset[str]:
    """Names of mask builders that a method of this module's class calls."""
    if not hasattr(part, "config"):
        return frozenset()
    found: set[str] = set()
    for cls in type(part).__mro__:
        if cls is nn.Module:
            break
        for value in vars(cls).values():
            function = inspect.unwrap(value) if inspect.isfunction(value) else None
            if function is not None and hasattr(function, "__code__"):
                found |= _BUILDERS & set(function.__code__.co_names)
    return frozenset(found)


def _counts_positions(part: nn.Module) -> bool:
    """Whether, without a cache, it makes position ids by itself and has them searched for packed sequences: an arange has none."""
    if not _builders(part) & {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"}:
        return False
    names = inspect.signature(type(part).forward).parameters
    return {"attention_mask", "position_ids", "past_key_values"} <= names.keys() and not getattr(part.config, "use_cache", True)


class _NothingGiven:
    """Forward pre-hook: a call without mask, positions and cache gets a mask of no width, which `implementations.spared_mask` reads as none.

    A class, so that the module can still be copied and pickled.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        given = dict(zip(self.names, args))
        given.update(kwargs)
        for name in ("attention_mask", "position_ids", "past_key_values"):
            if given.get(name) is not None:
                return None
        if given.get("use_cache"):
            return None
        first = given.get("input_ids")
        if first is None:
            first = given.get("inputs_embeds")
        if first is None:
            return None
        mask = torch.zeros((first.shape[0], implementations.NOTHING_GIVEN), dtype=torch.bool, device=first.device)
        index = self.names.index("attention_mask")
        if len(args) > index:
            return (*args[:index], mask, *args[index + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}
