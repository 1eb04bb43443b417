"""Which positions may be looked at -> the additive masks a model takes as they are.

Given no mask, transformers makes one inside the traced graph, and attention falls to a slower kernel; given a two-dimensional one, it does too. Added numbers are what
every attention takes: scaled-dot-product attention, the plain products, and those with a bias on positions.
"""

from __future__ import annotations

from typing import Any

import torch

from gpuopt.core.errors import Unsupported
from gpuopt.generation.subject import Subject

KINDS = ("full_attention", "sliding_attention")


def require_known(subject: Subject) -> None:
    """Raises Unsupported for layers that keep something else than keys and values of all tokens."""
    others = [kind for kind in subject.layer_kinds if kind not in KINDS]
    if others:
        raise Unsupported(
            f"its layers are of the kind {', '.join(others)}, for which there is no static cache here",
            fix="--backend eager runs generate() as shipped",
        )


def of_step(subject: Subject, allowed: torch.Tensor, slots: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> Any:
    """One token at `index`: allowed [batch, cache] -> [batch, 1, 1, cache], or one for each kind of layer."""
    seen = allowed & (slots <= index)

    def of(kind: str) -> torch.Tensor:
        near = seen & (slots > index - subject.window) if kind == "sliding_attention" and subject.window else seen
        return added(near[:, None, None, :], dtype)

    return _by_kind(subject, of)


def of_prompt(subject: Subject, given: torch.Tensor, dtype: torch.dtype) -> Any:
    """Every token of a prompt at those before it: given [batch, length] -> [batch, 1, length, length], or one for each kind of layer."""
    slots = torch.arange(given.shape[1], device=given.device)
    before = slots[None, :] <= slots[:, None]

    def of(kind: str) -> torch.Tensor:
        near = before & (slots[None, :] > slots[:, None] - subject.window) if kind == "sliding_attention" and subject.window else before
        return added(near[None, None] & given[:, None, None, :], dtype)

    return _by_kind(subject, of)


def added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """True -> 0, False -> the smallest number: a row of those alone gives an even mean, where minus infinity would give NaN."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _by_kind(subject: Subject, of: Any) -> Any:
    """Models with layers of one kind take a tensor, those with several a dict."""
    if len(subject.layer_kinds) == 1:
        return of(subject.layer_kinds[0])
    return {kind: of(kind) for kind in subject.layer_kinds}
