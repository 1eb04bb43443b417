"""Count + attention mask + causality -> the FLOPs the answer needs. Padded tokens and the masked half of causal attention run like all others, and are work for nobody.

A product over tokens is useful by the share of real tokens, attention by the share of query-key pairs in which both are real. Which products run over tokens is read off their
shapes: rows as many as the mask has tokens, or as many a sample. What fits neither (a pooler, an image tower) counts in full.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count, OpRecord, Useful
from gpuopt.profiling import formulas

REAL_IS_ONE = ("attention_mask", "input_mask", "padding_mask", "token_mask")
REAL_IS_ZERO = ("src_key_padding_mask", "key_padding_mask")
"""Arguments that say which tokens are real; torch.nn marks the padding instead."""
_GEMMS = frozenset(
    "aten::mm aten::addmm aten::_addmm_activation aten::linear aten::_scaled_mm aten::_int_mm aten::_weight_int4pack_mm aten::mkldnn_linear mkldnn::_linear_pointwise".split()
)
_WITH_BIAS_FIRST = frozenset({"aten::addmm", "aten::_addmm_activation"})
_BATCHED = {"aten::bmm": 0, "aten::baddbmm": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Which tokens of a batch are real."""

    lengths: tuple[int, ...]
    """Real tokens of each sample."""
    width: int
    """Tokens of each sample, padding included."""
    name: str = "attention_mask"

    @property
    def num_real(self) -> int:
        return sum(self.lengths)

    @property
    def share(self) -> float:
        """Real over all, 0..1."""
        total = self.width * len(self.lengths)
        return self.num_real / total if total else 1.0

    @property
    def pairs(self) -> float:
        """Share of the pairs of a token with a token in which both are real."""
        total = self.width * self.width * len(self.lengths)
        return sum(n * n for n in self.lengths) / total if total else 1.0


def tokens(module: nn.Module | None, inputs: Inputs) -> Tokens | None:
    """Read the mask among the inputs of a call: a 2-D tensor [sample, token] of zeros and ones under one of the names above, or None. Reads its values: one copy from its device."""
    for name, value in _named(module, inputs).items():
        if name not in (*REAL_IS_ONE, *REAL_IS_ZERO) or not isinstance(value, torch.Tensor) or value.dim() != 2 or not value.numel():
            continue
        if value.is_meta:
            continue
        flat = value.detach().to("cpu")
        if flat.dtype != torch.bool and not bool(((flat == 0) | (flat == 1)).all()):
            continue  # additive, or something else under that name
        real = ~flat.bool() if name in REAL_IS_ZERO else flat.bool()
        return Tokens(lengths=tuple(int(n) for n in real.sum(dim=1)), width=int(value.shape[1]), name=name)
    return None


def _named(module: nn.Module | None, inputs: Inputs) -> dict[str, Any]:
    found = dict(inputs.kwargs)
    if module is not None and inputs.args:
        try:
            names = list(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):  # a scripted or built-in forward has none
            names = []
        found.update(zip(names, inputs.args, strict=False))
    return found


def causal_modules(module: nn.Module) -> frozenset[str]:
    """Qualified names of the attention modules that say they are causal (`is_causal = True`, as in transformers)."""
    return frozenset(name for name, child in module.named_modules() if getattr(child, "is_causal", None) is True)


def useful(count: Count, padding: Tokens | None = None, causal: frozenset[str] = frozenset()) -> Useful | None:
    """What of `count` the answer needs; None where neither a mask nor a causal module says that anything is not.

    Parameters
    ----------
    padding: from `tokens`. causal: from `causal_modules`; an attention below one of them masks half of its pairs.
    """
    if padding is not None and padding.num_real == padding.width * len(padding.lengths):
        padding = None
    if padding is None and not causal:
        return None
    by_dtype: dict[str, float] = {}
    masked: list[float] = []
    padded: list[float] = []
    attention: list[float] = []
    for record in count.records:
        if not record.flops:
            continue
        without_mask, needed = _shares(record, padding, _is_in(record.module, causal))
        masked.append(record.flops * (1.0 - without_mask))
        padded.append(record.flops * (without_mask - needed))
        if without_mask < 1.0:
            attention.append(record.flops)
        by_dtype[record.dtype or "?"] = by_dtype.get(record.dtype or "?", 0.0) + record.flops * needed
    flops_padding, flops_causal = math.fsum(padded), math.fsum(masked)
    reasons = []
    if padding is not None:
        reasons.append(
            f"{padding.name} calls {100 * padding.share:.0f}% of {padding.width * len(padding.lengths)} tokens real: "
            f"{_share(flops_padding, count.flops)} of the FLOPs are spent on padding"
        )
    if flops_causal:
        reasons.append(
            f"causal attention masks {_share(flops_causal, math.fsum(attention))} of its pairs: {_share(flops_causal, count.flops)} of the FLOPs"
        )
    if not reasons:
        return None
    return Useful(
        flops=count.flops,
        flops_useful=math.fsum(by_dtype.values()),
        flops_by_dtype=by_dtype,
        real_tokens=padding.share if padding is not None else None,
        real_pairs=padding.pairs if padding is not None else None,
        flops_padding=flops_padding,
        flops_causal=flops_causal,
        reasons=tuple(reasons),
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g}%" if whole else "0%"


def _is_in(module: str, names: frozenset[str]) -> bool:
    return any(module == name or name == "" or module.startswith(f"{name}.") for name in names)


def _shares(record: OpRecord, padding: Tokens | None, causal: bool) -> tuple[float, float]:
    """(share of its FLOPs that causality leaves, share that padding leaves of those, too)."""
    name = record.op.replace(".", "::", 1)
    shapes = [tuple(int(n) for n in text.split("x")) for text in record.shapes.split(", ") if text]
    pairs = _attention(name, shapes, padding, causal)
    if pairs is not None:
        rows, num_query, num_key = pairs
        full = rows * num_query * num_key
        kept = rows * _pairs(num_query, num_key, causal)
        if padding is None or rows % len(padding.lengths) or padding.width not in (num_query, num_key):
            return kept / full, kept / full
        each = rows // len(padding.lengths)
        real = sum(
            _pairs(n if num_query == padding.width else num_query, n if num_key == padding.width else num_key, causal)
            for n in padding.lengths
        )
        return kept / full, min(kept, each * real) / full
    if padding is not None and _runs_over_tokens(name, shapes, padding):
        return 1.0, padding.share
    return 1.0, 1.0


def _pairs(num_query: int, num_key: int, causal: bool) -> float:
    """Pairs one sample and head needs: all of them, or those of a key not after its query (the last query sees every key)."""
    if not causal or num_query > num_key:
        return float(num_query * num_key)
    return num_query * num_key - num_query * (num_query - 1) / 2


def _attention(name: str, shapes: Sequence[tuple[int, ...]], padding: Tokens | None, causal: bool) -> tuple[int, int, int] | None:
    """(samples x heads or samples, queries, keys) of an attention or of one of its two batched products; None for anything else."""
    if formulas.canonical(name) == "attention":
        if len(shapes) < 2 or len(shapes[0]) < 3 or len(shapes[1]) < 3:
            return None
        return shapes[0][0], shapes[0][-2], shapes[1][-2]
    first = _BATCHED.get(formulas.family(name))
    if first is None or len(shapes) < first + 2 or len(shapes[first]) != 3 or len(shapes[first + 1]) != 3:
        return None
    (rows, m, k), (_, _, n) = shapes[first], shapes[first + 1]
    if padding is not None:
        if m == padding.width and padding.width in (n, k):
            return rows, m, n if n == padding.width else k
        return None
    if causal and m in (n, k):  # scores are m x n, their product with the values takes m x k
        return rows, m, m
    return None


def _runs_over_tokens(name: str, shapes: Sequence[tuple[int, ...]], padding: Tokens) -> bool:
    plain = formulas.family(name)
    if plain not in _GEMMS or not shapes:
        return False
    x = shapes[1] if plain in _WITH_BIAS_FIRST and len(shapes) > 2 else shapes[0]
    samples = len(padding.lengths)
    return math.prod(x[:-1]) == samples * padding.width or tuple(x[:2]) == (samples, padding.width)


def of_call(count: Count, module: nn.Module | None, inputs: Inputs) -> Useful | None:
    """`useful` with the mask and the causal modules found in the call itself."""
    return useful(count, tokens(module, inputs), causal_modules(module) if module is not None else frozenset())
