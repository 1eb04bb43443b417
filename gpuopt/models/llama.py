"""Nothing -> Llamas in bf16: of the 8B class (Llama-3.1-8B shapes: 32 layers, 4096 wide, 8,030,261,248 parameters, 16.06 GB), and half of the layers of the 70B class (72.7 GB)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpuopt.models.laid import Laid, laid_factory

_SHAPES: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@laid_factory("input_ids:int64[N,S]")
def llama_8b() -> Laid:
    """`forward(input_ids, …)` -> logits [N, S, 128256]; bf16, grouped-query attention (8 of 32 heads), no cache in the outputs."""
    return _laid(**_SHAPES, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)


@laid_factory("input_ids:int64[N,S]")
def llama_8b_tiny() -> Laid:
    """The same classes and the same way of filling them, in bf16: 2 layers, 64 wide, 4 heads over 2, 99 tokens, S up to 128."""
    return _laid(**_TINY, num_hidden_layers=2, num_key_value_heads=2)


@laid_factory("input_ids:int64[N,S]")
def llama_70b_half() -> Laid:
    """`forward(input_ids, …)` -> logits [N, S, 128256]; bf16, 40 of the 80 layers of Llama-3.1-70B: 8192 wide, 8 of 64 heads, 36,327,530,496 parameters. For `gpuopt stream`."""
    return _laid(**_SHAPES, hidden_size=8192, intermediate_size=28672, num_hidden_layers=40, num_attention_heads=64, num_key_value_heads=8)


@laid_factory("input_ids:int64[N,S]")
def llama_70b_half_tiny() -> Laid:
    """The same classes in bf16: 5 layers, 64 wide, 4 heads over 1, 99 tokens, S up to 128."""
    return _laid(**_TINY, num_hidden_layers=5, num_key_value_heads=1)


def _laid(**sizes: Any) -> Laid:
    config = LlamaConfig(tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa", **sizes)
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    # The rotary tables are computed, not loaded: they went through the meta device and hold nothing now.
    model.get_submodule("model").rotary_emb = LlamaRotaryEmbedding(config)

    def scatter(name: str, parameter: nn.Parameter) -> float | None:
        return None if "norm" in name.split(".")[-2] else float(config.initializer_range)

    return Laid(model, scatter)
