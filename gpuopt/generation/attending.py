"""Attention of one token over the keys of a static cache, written so that a compiler makes three small reductions of it and reads every key once.

Given a mask, transformers' scaled-dot-product attention copies keys and values out once for each query head that shares them (`repeat_kv` under a compiler), and the kernels
that take a mask are made for many queries: per layer and token two copies and a slow launch. A product with one row is a reduction, here in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gpuopt.programs.ops import attend_one

NAME = "gpuopt_one_token"
LAUNCHED = "gpuopt_one_token_in_one_launch"
MOST_KEYS = 16_384
"""Sequences x positions; beyond it a kernel that splits long caches and shares keys between heads does better."""


def one_token(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **more: Any
) -> tuple[torch.Tensor, None]:
    """As transformers calls attention: query [batch, heads, 1, width], keys and values [batch, heads that hold them, length, width] -> [batch, 1, heads, width].

    More than one query, a long cache, or what this knows nothing of goes to scaled-dot-product attention.
    """
    if query.shape[2] != 1 or key.shape[0] * key.shape[2] > MOST_KEYS or more.get("cache") is not None or more.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    batch, heads, _, width = query.shape
    held, length = key.shape[1:3]
    rows = query.reshape(batch, held, heads // held, 1, width).float() * _scale(width, more)
    scores = (rows * key[:, :, None].float()).sum(-1)
    for added in (attention_mask, more.get("position_bias")):
        if added is not None:
            scores = _with(scores, added[..., :length])
    shares = scores.softmax(-1)
    found = (shares[..., None] * value[:, :, None].float()).sum(-2)
    return found.to(query.dtype).reshape(batch, 1, heads, value.shape[-1]), None


def in_one_launch(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **more: Any
) -> tuple[torch.Tensor, None]:
    """The same, in a kernel of ours where it takes this: three reductions wait for each other, which is most of what they cost where there are few keys."""
    seen = attention_mask[..., : key.shape[2]] if attention_mask is not None else None
    others = [word for word in ("cache", "softcap", "position_bias") if more.get(word) is not None]
    if others or not attend_one.takes(query, key, value, seen):
        return one_token(module, query, key, value, attention_mask, **more)
    return attend_one.attend_one(query, key, value, seen, _scale(query.shape[3], more)), None


def _scale(width: int, more: dict[str, Any]) -> float:
    given = more.get("scaling")
    return width**-0.5 if given is None else float(given)


def _with(scores: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """[batch, held, groups, length] and a mask or bias [1 or batch, 1 or heads, 1, length]."""
    _, held, groups, length = scores.shape
    rows = added.reshape(-1, 1, 1, length) if added.shape[1] == 1 else added.reshape(-1, held, groups, length)
    return scores.masked_fill(~rows, float("-inf")) if rows.dtype == torch.bool else scores + rows.float()


@contextmanager
def in_place(module: torch.nn.Module, *, launched: bool = False) -> Iterator[None]:
    """While a loop of ours runs; put back afterwards, because generate() as shipped runs the same module. Models that attend otherwise than by `sdpa` are left alone.

    launched: in our own kernel.
    """
    held: Iterator[Any] = (getattr(part, "config", None) for part in module.modules())
    configs = {id(config): config for config in held if getattr(config, "_attn_implementation", None) == "sdpa"}
    if configs:
        for name, attend in ((NAME, one_token), (LAUNCHED, in_one_launch)):
            AttentionInterface.register(name, attend)
            AttentionMaskInterface.register(name, sdpa_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = LAUNCHED if launched else NAME
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = "sdpa"
