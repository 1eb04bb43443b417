"""Nothing -> T5-large (v1.0 shapes): 24 + 24 layers, 1024 wide, 737,668,096 parameters, its embedding tied three times."""

from __future__ import annotations

from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from gpuopt.models.factory import factory


@factory("input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]")
def t5_large() -> nn.Module:
    """`forward(input_ids, decoder_input_ids=…)` -> logits [N, T, 32128], encoder_last_hidden_state [N, S, 1024]; float32, no cache.

    The second parameter of `forward` is `attention_mask`: pass `decoder_input_ids` by name.
    """
    model: nn.Module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32128,
            d_model=1024,
            d_kv=64,
            d_ff=4096,
            num_layers=24,
            num_heads=16,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )
    return model


@factory("input_ids:int64[N,S]", "decoder_input_ids:int64[N,T]")
def t5_large_tiny() -> nn.Module:
    """The same classes: 2 + 2 layers, 32 wide, 2 heads, 99 tokens."""
    model: nn.Module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=99,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )
    return model
