"""Nothing -> T5-large (v1.0 shapes): 24 + 24 layers, 1024 wide, 737,668,096 parameters, its embedding tied three times; and T5-11B in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from gpuopt.models.factory import factory
from gpuopt.models.laid import Laid, laid_factory

_TINY: dict[str, Any] = {"vocab_size": 99, "d_model": 32}


@factory("input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]")
def t5_large() -> nn.Module:
    """`forward(input_ids, decoder_input_ids=…)` -> logits [N, T, 32128], encoder_last_hidden_state [N, S, 1024]; float32, no cache.

    The second parameter of `forward` is `attention_mask`: pass `decoder_input_ids` by name.
    """
    return _t5(vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)


@factory("input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]")
def t5_large_tiny() -> nn.Module:
    """The same classes: 2 + 2 layers, 32 wide, 2 heads, 99 tokens."""
    return _t5(**_TINY, num_layers=2, d_kv=16, d_ff=64, num_heads=2)


@laid_factory("input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]")
def t5_11b() -> Laid:
    """As `t5_large` in bf16 with the shapes of T5-11B: 128 heads of 128, 65536 wide inside a block, 11,307,321,344 parameters, 22.6 GB. For `gpuopt stream`."""
    return _laid(vocab_size=32128, d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128)


@laid_factory("input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]")
def t5_11b_tiny() -> Laid:
    """The same classes in bf16: 5 + 5 layers, 32 wide, 4 heads of 32, 512 wide inside a block, 99 tokens."""
    return _laid(**_TINY, num_layers=5, d_kv=32, d_ff=512, num_heads=4)


def _t5(**sizes: Any) -> nn.Module:
    model: nn.Module = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, use_cache=False, **sizes))
    return model


def _laid(**sizes: Any) -> Laid:
    with torch.device("meta"):
        model = _t5(**sizes)
    width, inner = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"]
    # As transformers draws them (T5PreTrainedModel._init_weights): attention has no scale of its own, the queries' is in their weights.
    own = {
        "shared": 1.0,
        "q": (width * sizes["d_kv"]) ** -0.5,
        "k": width**-0.5,
        "v": width**-0.5,
        "o": inner**-0.5,
        "relative_attention_bias": width**-0.5,
        "wi": width**-0.5,
        "wo": sizes["d_ff"] ** -0.5,
    }

    def scatter(name: str, parameter: nn.Parameter) -> float | None:
        return None if "norm" in name.split(".")[-2] else own[name.split(".")[-2]]

    return Laid(model.to(torch.bfloat16), scatter)
