"""Text decoders, mixtures of experts and state-space models, with their vocabulary's projection for every token."""

from __future__ import annotations

from typing import Any

import transformers as hf

from . import Architecture, tokens
from .arithmetic import attention, conv, encoder_layer, linear

BATCH, LENGTH = 3, 40
LAYERS, VOCABULARY = 2, 997
WIDTH, HEADS, KV_HEADS, FEED = 512, 8, 2, 1376
HEAD = WIDTH // HEADS
TOKENS = BATCH * LENGTH
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FEED,
    **SPECIAL,
}


def grouped_query(head: int = HEAD) -> float:
    """Attention whose keys and values have fewer heads: narrower projections, the same scores."""
    projections = 2 * linear(TOKENS, WIDTH, HEADS * head) + 2 * linear(TOKENS, WIDTH, KV_HEADS * head)
    return projections + attention(BATCH, LENGTH, LENGTH, HEADS * head)


def gated(rows: int, feed: int, width: int = WIDTH) -> float:
    """gate, up and down."""
    return 3 * linear(rows, width, feed)


HEADROW = linear(TOKENS, WIDTH, VOCABULARY)
DENSE = LAYERS * (grouped_query() + gated(TOKENS, FEED)) + HEADROW


def gpt2() -> Architecture:
    width, heads = 768, 12
    return Architecture(
        name="GPT-2",
        shows="Conv1D: a linear layer with its weight the other way round",
        build=lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_layer=LAYERS, n_embd=width, n_head=heads, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * encoder_layer(BATCH, LENGTH, width, 4 * width) + linear(TOKENS, width, VOCABULARY),
    )


def gpt_neox() -> Architecture:
    width, heads, feed, rotary = 768, 12, 3072, 0.25
    return Architecture(
        name="GPT-NeoX",
        shows="fused q, k, v; a quarter of each head rotated",
        build=lambda: hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                num_hidden_layers=LAYERS,
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=feed,
                vocab_size=VOCABULARY,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary},
                **SPECIAL,
            )
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * encoder_layer(BATCH, LENGTH, width, feed) + linear(TOKENS, width, VOCABULARY),
    )


def llama() -> Architecture:
    return Architecture(
        name="Llama",
        shows="grouped-query attention, gated feed-forward",
        build=lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
        args=(tokens(BATCH, LENGTH),),
        hand=DENSE,
    )


def mistral() -> Architecture:
    return Architecture(
        name="Mistral",
        shows="a sliding window of 8: attention is counted full",
        build=lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=8)),
        args=(tokens(BATCH, LENGTH),),
        hand=DENSE,
    )


def gemma2() -> Architecture:
    head = 96
    return Architecture(
        name="Gemma 2",
        shows="head width that is not width / heads, capped logits, alternating windows",
        build=lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=head, sliding_window=8)),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * (grouped_query(head) + gated(TOKENS, FEED)) + HEADROW,
    )


def qwen2() -> Architecture:
    return Architecture(
        name="Qwen2",
        shows="biases on q, k, v",
        build=lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
        args=(tokens(BATCH, LENGTH),),
        hand=DENSE,
    )


def mixtral() -> Architecture:
    experts, chosen = 8, 2
    routed = linear(TOKENS, WIDTH, experts) + gated(TOKENS * chosen, FEED)
    return Architecture(
        name="Mixtral",
        shows="mixture of experts: each token through 2 of 8, whichever they are",
        build=lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=experts, num_experts_per_tok=chosen)),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * (grouped_query() + routed) + HEADROW,
    )


def qwen2_moe() -> Architecture:
    experts, chosen, feed, shared = 6, 3, 96, 160
    routed = linear(TOKENS, WIDTH, experts) + gated(TOKENS * chosen, feed) + gated(TOKENS, shared) + linear(TOKENS, WIDTH, 1)
    return Architecture(
        name="Qwen2-MoE",
        shows="a shared expert with a gate beside the routed ones",
        build=lambda: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **SIZES,
                num_experts=experts,
                num_experts_per_tok=chosen,
                moe_intermediate_size=feed,
                shared_expert_intermediate_size=shared,
            )
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * (grouped_query() + routed) + HEADROW,
    )


def deepseek_v3() -> Architecture:
    width, heads, feed, expert = 256, 4, 512, 64
    experts, chosen, q_rank, kv_rank, rotated, plain, value = 8, 2, 96, 64, 16, 32, 24
    compressed = linear(TOKENS, width, q_rank, heads * (plain + rotated)) + linear(TOKENS, width, kv_rank + rotated)
    expanded = linear(TOKENS, kv_rank, heads * (plain + value)) + linear(TOKENS, heads * value, width)
    scores = attention(BATCH, LENGTH, LENGTH, heads * (plain + rotated + value)) / 2
    routed = linear(TOKENS, width, experts) + gated(TOKENS * chosen, expert, width) + gated(TOKENS, expert, width)
    return Architecture(
        name="DeepSeek-V3",
        shows="latent attention, values narrower than keys; first layer dense, then experts in groups",
        build=lambda: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                num_hidden_layers=2,
                first_k_dense_replace=1,
                vocab_size=VOCABULARY,
                hidden_size=width,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                intermediate_size=feed,
                moe_intermediate_size=expert,
                n_routed_experts=experts,
                num_experts_per_tok=chosen,
                n_shared_experts=1,
                n_group=2,
                topk_group=1,
                q_lora_rank=q_rank,
                kv_lora_rank=kv_rank,
                qk_rope_head_dim=rotated,
                qk_nope_head_dim=plain,
                v_head_dim=value,
                **SPECIAL,
            )
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=2 * (compressed + expanded + scores) + gated(TOKENS, feed, width) + routed + linear(TOKENS, width, VOCABULARY),
    )


def mamba() -> Architecture:
    width, state, taps, rank = 256, 16, 4, 16
    inner = 2 * width
    block = (
        linear(TOKENS, width, 2 * inner)
        + conv(BATCH * (LENGTH + taps - 1), inner, inner, taps, groups=inner)  # causal: padded on both sides, then cut
        + linear(TOKENS, inner, rank + 2 * state)
        + linear(TOKENS, rank, inner)
        + 2.0 * TOKENS * inner * state  # C · h; the recurrence itself is element-wise
        + linear(TOKENS, inner, width)
    )
    return Architecture(
        name="Mamba",
        shows="a scan over time by matrix-vector products; depthwise causal convolution",
        build=lambda: hf.MambaForCausalLM(
            hf.MambaConfig(
                num_hidden_layers=LAYERS,
                hidden_size=width,
                state_size=state,
                conv_kernel=taps,
                time_step_rank=rank,
                expand=2,
                vocab_size=VOCABULARY,
                **SPECIAL,
            )
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * block + linear(TOKENS, width, VOCABULARY),
    )


ROWS = (gpt2, gpt_neox, llama, mistral, gemma2, qwen2, mixtral, qwen2_moe, deepseek_v3, mamba)
