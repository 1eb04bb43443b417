"""Nothing -> a Llama of the 8B class (Llama-3.1-8B shapes) in bf16: 32 layers, 4096 wide, 8,030,261,248 parameters, 16.06 GB."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpuopt.models.drawing import lay
from gpuopt.models.factory import factory

_BANK = 16_777_213
"""Random values drawn once and laid out again and again over the weights: a prime, so that no two rows of any matrix hold the same values."""


@factory("input_ids:int64[N,S]")
def llama_8b() -> nn.Module:
    """`forward(input_ids, …)` -> logits [N, S, 128256]; bf16, grouped-query attention (8 of 32 heads), no cache in the outputs."""
    return _build(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


@factory("input_ids:int64[N,S]")
def llama_8b_tiny() -> nn.Module:
    """The same classes and the same way of filling them, in bf16: 2 layers, 64 wide, 4 heads over 2, 99 tokens, S up to 128."""
    return _build(
        LlamaConfig(
            vocab_size=99,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


def _build(config: LlamaConfig) -> nn.Module:
    """Meta device first, then bf16 memory, then one pass of copies: drawing 8 G numbers in fp32 would take minutes and twice the memory."""
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    # The rotary tables are computed, not loaded: they went through the meta device and hold nothing now.
    model.get_submodule("model").rotary_emb = LlamaRotaryEmbedding(config)
    bank = (
        torch.empty(_BANK if config.hidden_size > 1024 else 8191, dtype=torch.float32)
        .normal_(std=config.initializer_range, generator=torch.default_generator)  # named: a bank of its own, larger than the factory's
        .to(torch.bfloat16)
    )
    start = 0
    for name, parameter in model.named_parameters():
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            nn.init.ones_(parameter)
        else:
            start = lay(bank, parameter.data.view(-1), start)
    return model
