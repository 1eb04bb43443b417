"""Nothing -> BERT-large (uncased shapes): 24 layers, 1024 wide, 16 heads, 335 M parameters, scaled-dot-product attention."""

from __future__ import annotations

from torch import nn
from transformers import BertConfig, BertModel

from gpuopt.models.factory import factory


@factory("input_ids:int64[N,S]")
def bert_large() -> nn.Module:
    """`forward(input_ids, attention_mask=None, …)` -> last_hidden_state [N, S, 1024], pooler_output [N, 1024]; float32, S up to 512.

    No attention mask is among the inputs: transformers then makes its own where it is traced. Pass `attention_mask:int64[N,S]` to decide otherwise.
    """
    model: nn.Module = BertModel(
        BertConfig(
            vocab_size=30522,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=512,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=True,
    )
    return model


@factory("input_ids:int64[N,S]")
def bert_large_tiny() -> nn.Module:
    """The same classes: 2 layers, 32 wide, 2 heads, 99 tokens, S up to 64."""
    model: nn.Module = BertModel(
        BertConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=True,
    )
    return model
