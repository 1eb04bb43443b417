"""Text encoders."""

from __future__ import annotations

import math

import transformers as hf

from . import Architecture, tokens
from .arithmetic import attention, encoder_layer, linear

BATCH, LENGTH = 3, 40
LAYERS, WIDTH, HEADS, FEED, VOCABULARY = 2, 768, 12, 3072, 997
SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FEED,
    "vocab_size": VOCABULARY,
}
TOKENS = BATCH * LENGTH
STACK = LAYERS * encoder_layer(BATCH, LENGTH, WIDTH, FEED)


def bert() -> Architecture:
    return Architecture(
        name="BERT",
        shows="pooler over the first token alone",
        build=lambda: hf.BertModel(hf.BertConfig(**SIZES)),
        args=(tokens(BATCH, LENGTH),),
        hand=STACK + linear(BATCH, WIDTH, WIDTH),
    )


def roberta() -> Architecture:
    return Architecture(
        name="RoBERTa, masked language model",
        shows="a vocabulary's projection for every token",
        build=lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)),
        args=(tokens(BATCH, LENGTH),),
        hand=STACK + linear(TOKENS, WIDTH, WIDTH, VOCABULARY),
    )


def distilbert() -> Architecture:
    return Architecture(
        name="DistilBERT",
        shows="fewer layers, no pooler",
        build=lambda: hf.DistilBertModel(
            hf.DistilBertConfig(n_layers=LAYERS, dim=WIDTH, n_heads=HEADS, hidden_dim=FEED, vocab_size=VOCABULARY)
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=STACK,
    )


def albert() -> Architecture:
    layers, embedding = 5, 128
    return Architecture(
        name="ALBERT",
        shows="one layer's weights run five times; factorised embedding",
        build=lambda: hf.AlbertModel(hf.AlbertConfig(**{**SIZES, "num_hidden_layers": layers}, embedding_size=embedding)),
        args=(tokens(BATCH, LENGTH),),
        hand=linear(TOKENS, embedding, WIDTH) + layers * encoder_layer(BATCH, LENGTH, WIDTH, FEED) + linear(BATCH, WIDTH, WIDTH),
    )


def electra() -> Architecture:
    width, embedding, heads, feed = 256, 128, 4, 1024
    return Architecture(
        name="ELECTRA",
        shows="embedding narrower than the layers",
        build=lambda: hf.ElectraModel(
            hf.ElectraConfig(
                num_hidden_layers=LAYERS, hidden_size=width, embedding_size=embedding, num_attention_heads=heads, intermediate_size=feed
            )
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=linear(TOKENS, embedding, width) + LAYERS * encoder_layer(BATCH, LENGTH, width, feed),
    )


def deberta() -> Architecture:
    buckets = 16
    relative = 2 * buckets  # distances, both ways
    # The table of distances goes through the layer's own query and key matrices; every token meets every distance from both sides.
    disentangled = 2 * linear(relative, WIDTH, WIDTH) + 2 * linear(TOKENS, WIDTH, relative)
    return Architecture(
        name="DeBERTa-v2",
        shows="disentangled attention: content to position and back",
        build=lambda: hf.DebertaV2Model(
            hf.DebertaV2Config(
                **SIZES,
                relative_attention=True,
                position_buckets=buckets,
                max_position_embeddings=64,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
            )
        ),
        args=(tokens(BATCH, LENGTH),),
        hand=STACK + LAYERS * disentangled,
    )


def xlnet() -> Architecture:
    width, heads, feed = 256, 4, 1024
    # Transformer-XL's relative attention: positions -T..T are projected for each sample, and scored beside the content.
    positions = linear(BATCH * 2 * LENGTH, width, width) + attention(BATCH, LENGTH, 2 * LENGTH, width) / 2
    return Architecture(
        name="XLNet",
        shows="relative positions by einsum",
        build=lambda: hf.XLNetModel(hf.XLNetConfig(d_model=width, n_layer=LAYERS, n_head=heads, d_inner=feed, vocab_size=VOCABULARY)),
        args=(tokens(BATCH, LENGTH),),
        hand=LAYERS * (encoder_layer(BATCH, LENGTH, width, feed) + positions),
    )


def fnet() -> Architecture:
    width, feed = 256, 1024
    points = LENGTH * width
    mixing = BATCH * 5.0 * points * math.log2(points)  # a complex transform over tokens and features: FFTW's 5·n·log2(n)
    return Architecture(
        name="FNet",
        shows="Fourier transforms in the place of attention",
        build=lambda: hf.FNetModel(
            hf.FNetConfig(hidden_size=width, num_hidden_layers=LAYERS, intermediate_size=feed, vocab_size=VOCABULARY)
        ),
        args=(tokens(BATCH, LENGTH),),
        # The input of a layer is real, but is made complex before its transform.
        hand=linear(TOKENS, width, width) + LAYERS * (mixing + linear(TOKENS, width, feed, width)) + linear(BATCH, width, width),
    )


ROWS = (bert, roberta, distilbert, albert, electra, deberta, xlnet, fnet)
