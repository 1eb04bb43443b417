"""transformers' attention under names of our own: which kernel runs, and whether a mask that nobody gave is built.

A model asks its configuration for a name and looks the name up in two tables of transformers, one of attention functions and one of mask functions. New rows there
touch no other model, and the configuration belongs to one copy: nothing is patched, any number of threads may run, a copy keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gpuopt.core.errors import Unsupported

KERNELS = ("flash", "cudnn", "efficient", "math")

_CODES = {None: "any", "flash": "tiled", "cudnn": "cudnn", "efficient": "efficient", "math": "math"}
"""What a kernel is called inside a name: transformers takes any name with "flash" in it for the flash-attn package."""


def why_not(module: nn.Module) -> str | None:
    """None for a transformers model whose attention goes through the table of attention functions as "sdpa"; else the reason. Static."""
    configs: list[Any] = [getattr(part, "config", None) for part in module.modules()]
    names = {config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")}
    if not names:
        return "it is no transformers model"
    if not any("attention" in type(part).__name__.lower() for part in module.modules()):
        return "it has no attention"
    if not any(_can_be_set(part) for part in module.modules()):
        return "its attention does not go through transformers' table of attention functions, so its kernel has no name to change"
    if not list(_configurations(module)):
        return f"its attention is {' and '.join(sorted(map(str, names)))}, not sdpa"
    return None


def set_kernel(module: nn.Module, kernel: str) -> int:
    """Every "sdpa" below `module` runs this kernel from now on; how many configurations were changed."""
    return _rename(module, lambda _, masks: _name(kernel, builds_masks=masks))


def drop_masks(module: nn.Module) -> int:
    """No mask is built from now on where none is given; how many configurations were changed."""
    return _rename(module, lambda kernel, _: _name(kernel, builds_masks=False))


NOTHING_GIVEN = 0
"""Width of a mask that stands for none: it keeps transformers from looking for packed sequences in position ids that the model counts itself."""


def _can_be_set(part: nn.Module) -> bool:
    asks = getattr(type(part), "_can_set_attn_implementation", None)
    return asks is not None and hasattr(part, "config") and bool(asks())


def _configurations(module: nn.Module) -> Iterator[Any]:
    """Each configuration below `module` once whose attention is sdpa, ours included. Layers hold their model's, which may be a part of the root's."""
    seen: set[int] = set()
    for part in module.modules():
        config = getattr(part, "config", None)
        name = getattr(config, "_attn_implementation", None)
        is_fixed = hasattr(type(part), "_can_set_attn_implementation") and not _can_be_set(part)
        if config is None or id(config) in seen or is_fixed or not (name == "sdpa" or name in _NAMES):
            continue
        seen.add(id(config))
        yield config


def _rename(module: nn.Module, name: Callable[[str | None, bool], str]) -> int:
    _register()
    changed = 0
    for config in _configurations(module):
        kernel, masks = _NAMES.get(config._attn_implementation, (None, True))
        # The setter of the public property walks into sub-configurations, which may have their own.
        config._attn_implementation_internal = name(kernel, masks)
        changed += 1
    return changed


def _name(kernel: str | None, *, builds_masks: bool) -> str:
    return f"gpuopt_{_CODES[kernel]}" + ("" if builds_masks else "_no_mask")


_NAMES = {_name(kernel, builds_masks=masks): (kernel, masks) for kernel in _CODES for masks in (True, False)}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    for name, (kernel, masks) in _NAMES.items():
        AttentionInterface.register(name, sdpa_attention_forward if kernel is None else _FORWARDS[kernel])
        AttentionMaskInterface.register(name, sdpa_mask if masks else spared_mask)


# -- masks ------------------------------------------------------------------------------------------------------------------------


def spared_mask(**given: Any) -> torch.Tensor | None:
    """transformers' `sdpa_mask`, without the mask where none was given and the pattern is one that the kernel knows by itself.

    transformers builds it all the same while a graph is traced, where it could not read a given one. Its callers allow a skip for plain patterns alone: causal, or
    everything, with no packed sequences, overlays or padding.
    """
    from transformers.masking_utils import sdpa_mask

    mask = given.get("attention_mask")
    if mask is not None and mask.shape[-1] == NOTHING_GIVEN:
        mask = None
        given = {**given, "attention_mask": None, "kv_length": given["kv_length"] or given["q_length"]}
    if mask is None:
        window = given.get("local_size")
        is_whole = window is None or given["kv_length"] < window
        if given.get("allow_is_bidirectional_skip", False) and is_whole:
            return None
        # What a static cache has seen may be a tensor: then it is no fresh prefill, and the queries are not the last keys.
        starts = isinstance(given.get("q_offset", 0), int) and given.get("q_offset", 0) == 0
        if given.get("allow_is_causal_skip", True) and starts and given["kv_length"] == given["q_length"] and is_whole:
            return None
    found: torch.Tensor | None = sdpa_mask(**given)
    return found


# -- kernels ----------------------------------------------------------------------------------------------------------------------


def attend(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention over (batch, heads, length, width) by this kernel and no other; `key` and `value` may have fewer heads. Raises Unsupported where it cannot.

    The kernel's own operator is called: `torch.nn.attention.sdpa_kernel` sets switches of the whole process, which another thread's call would fall under, and a
    program saved by torch.export forgets them.
    """
    device = query.device.type
    groups = query.shape[1] // key.shape[1]
    _refuse(kernel, device, query, value, mask)
    if groups > 1 and not (device == "cuda" and kernel in ("flash", "cudnn")):
        key, value = _repeated(key, groups), _repeated(value, groups)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), float("-inf"))
    aten = torch.ops.aten
    found: torch.Tensor
    if kernel == "math":
        found = aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, is_causal, scale=scale)[0]
        return found
    if device == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
        return found
    width = query.shape[-1]
    if scale is None:
        scale = width**-0.5
    if width % 8:  # what torch pads to before it calls these kernels
        query, key, value = (F.pad(tensor, (0, 8 - width % 8)) for tensor in (query, key, value))
    if kernel == "flash":
        found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    elif kernel == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention(query, key, value, mask, False, 0.0, is_causal, False, scale=scale)[0]
    else:
        bias = None if mask is None else _aligned(mask, query, key)
        found = aten._scaled_dot_product_efficient_attention(query, key, value, bias, False, 0.0, is_causal, scale=scale)[0]
    return found[..., :width] if width % 8 else found


def _refuse(kernel: str, device: str, query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
    if kernel == "math":
        return
    fix = "leave --rewrite attention out, or name another kernel"
    if device == "cpu" and kernel != "flash":
        raise Unsupported(f"the {kernel} attention kernel exists on GPUs alone", fix="--rewrite attention:flash or attention:math on a CPU")
    if device not in ("cpu", "cuda"):
        raise Unsupported(f"no {kernel} attention kernel is known for {device}", fix=fix)
    if query.shape[-1] != value.shape[-1] and kernel != "cudnn":
        raise Unsupported(f"the {kernel} attention kernel wants heads of one width, not {query.shape[-1]} and {value.shape[-1]}", fix=fix)
    if device == "cuda" and kernel in ("flash", "cudnn") and query.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported(f"the {kernel} attention kernel computes in fp16 and bf16, not {query.dtype}".replace("torch.", ""), fix=fix)
    if device == "cuda" and kernel == "flash" and mask is not None:
        raise Unsupported(
            "the flash attention kernel takes no mask, and this model makes or is given one", fix=f"--rewrite no_mask; else {fix}"
        )


def _repeated(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    batch, heads, length, width = tensor.shape
    return tensor[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask at full size, its rows starting at multiples of 16 elements: the efficient kernel loads them so."""
    length = key.shape[-2]
    mask = mask.to(query.dtype)
    if length % 16:
        mask = F.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _forward(kernel: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """An attention function as transformers' table holds them: (module, q, k, v, mask, …) -> (batch, length, heads, width), no weights."""

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: torch.Tensor | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        for word in ("softcap", "cache", "s_aux"):
            if more.get(word) is not None:
                raise Unsupported(f"attention with {word} has no {kernel} kernel in torch", fix="leave --rewrite attention out")
        if dropout:
            raise Unsupported("attention that drops weights is for training", fix="module.eval()")
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and attention_mask is None
        length = query.shape[2]
        if causal and key.shape[2] != length:
            if length == 1:  # it sees every key
                causal = False
            else:  # keys past the queries of a fresh static cache are not written yet
                key, value = key[:, :, :length], value[:, :, :length]
                position_bias = position_bias[..., :length] if position_bias is not None else None
        if position_bias is not None:
            from transformers.integrations.sdpa_attention import create_position_bias_mask

            attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
            causal = False
        found = attend(kernel, query, key, value, attention_mask, is_causal=causal, scale=scaling)
        return found.transpose(1, 2).contiguous(), None

    return forward


_FORWARDS = {kernel: _forward(kernel) for kernel in KERNELS}
