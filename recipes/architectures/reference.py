"""The project's reference models at their full size (`gpuopt.models` makes the same ones with weights)."""

from __future__ import annotations

import transformers as hf

from . import TORCHVISION, Architecture, convnets, floats, tokens
from .arithmetic import attention, encoder_layer, linear


def bert_large() -> Architecture:
    batch, length, layers, width, heads, feed = 8, 128, 24, 1024, 16, 4096
    return Architecture(
        name="BERT-large",
        shows="a reference model; batch 8 of 128 tokens",
        build=lambda: hf.BertModel(
            hf.BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=feed)
        ),
        args=(tokens(batch, length),),
        hand=layers * encoder_layer(batch, length, width, feed) + linear(batch, width, width),
    )


def resnet101() -> Architecture:
    depths = (3, 4, 23, 3)
    return Architecture(
        name="ResNet-101",
        shows="a reference model; one image",
        build=lambda: hf.ResNetForImageClassification(hf.ResNetConfig(depths=list(depths), num_labels=1000)),
        args=(floats(1, 3, 224, 224),),
        hand=convnets.resnet_stages(depths, 224, 224) + linear(1, 2048, 1000),
        published=2 * 7.801e9,
        source=TORCHVISION,
    )


def t5_large() -> Architecture:
    batch, source, target, layers, width, heads, feed, vocabulary = 1, 512, 64, 24, 1024, 16, 4096, 32128
    cross = 2 * linear(batch * target, width, width) + 2 * linear(batch * source, width, width) + attention(batch, target, source, width)
    return Architecture(
        name="T5-large",
        shows="a reference model; 512 tokens read, 64 written",
        build=lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=vocabulary, d_model=width, d_kv=64, d_ff=feed, num_layers=layers, num_heads=heads, decoder_start_token_id=0
            )
        ),
        args=(tokens(batch, source),),
        kwargs={"decoder_input_ids": tokens(batch, target)},
        hand=layers * (encoder_layer(batch, source, width, feed) + encoder_layer(batch, target, width, feed) + cross)
        + linear(batch * target, width, vocabulary),
    )


def llama_8b() -> Architecture:
    batch, length, layers, width, heads, kv_heads, feed, vocabulary = 1, 512, 32, 4096, 32, 8, 14336, 128256
    rows = batch * length
    layer = (
        2 * linear(rows, width, width)
        + 2 * linear(rows, width, kv_heads * (width // heads))
        + attention(batch, length, length, width)
        + 3 * linear(rows, width, feed)
    )
    return Architecture(
        name="Llama-3.1-8B",
        shows="a reference model; 512 tokens",
        build=lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=feed,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
            )
        ),
        args=(tokens(batch, length),),
        hand=layers * layer + linear(rows, width, vocabulary),
    )


ROWS = (bert_large, resnet101, t5_large, llama_8b)
