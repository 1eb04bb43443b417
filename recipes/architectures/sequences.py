"""Encoder-decoders and speech."""

from __future__ import annotations

import transformers as hf

from . import Architecture, floats, tokens
from .arithmetic import attention, conv, decoder_layer, encoder_layer, linear, out

BATCH, SOURCE, TARGET = 2, 40, 13
LAYERS, VOCABULARY = 2, 997


def t5() -> Architecture:
    width, inner, feed, heads = 512, 6 * 48, 1024, 6

    def attend(queries: int, keys: int) -> float:
        return 2 * linear(BATCH * queries, width, inner) + 2 * linear(BATCH * keys, width, inner) + attention(BATCH, queries, keys, inner)

    encoder = attend(SOURCE, SOURCE) + linear(BATCH * SOURCE, width, feed, width)
    decoder = attend(TARGET, TARGET) + attend(TARGET, SOURCE) + linear(BATCH * TARGET, width, feed, width)
    return Architecture(
        name="T5",
        shows="cross attention over the encoder's length; heads narrower than the width",
        build=lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=width,
                d_kv=inner // heads,
                num_heads=heads,
                d_ff=feed,
                num_layers=LAYERS,
                num_decoder_layers=LAYERS,
                vocab_size=VOCABULARY,
                decoder_start_token_id=0,
            )
        ),
        args=(tokens(BATCH, SOURCE),),
        kwargs={"decoder_input_ids": tokens(BATCH, TARGET)},
        hand=LAYERS * (encoder + decoder) + linear(BATCH * TARGET, width, VOCABULARY),
    )


def bart() -> Architecture:
    width, heads, feed = 768, 12, 3072
    return Architecture(
        name="BART",
        shows="encoder-decoder with the Transformer's own layers",
        build=lambda: hf.BartModel(
            hf.BartConfig(
                d_model=width,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=feed,
                decoder_ffn_dim=feed,
                vocab_size=VOCABULARY,
            )
        ),
        args=(tokens(BATCH, SOURCE),),
        kwargs={"decoder_input_ids": tokens(BATCH, TARGET)},
        hand=LAYERS * (encoder_layer(BATCH, SOURCE, width, feed) + decoder_layer(BATCH, TARGET, SOURCE, width, feed)),
    )


def whisper() -> Architecture:
    bands, frames, width, heads, feed = 80, 3000, 384, 6, 1536
    source = frames // 2
    front = conv(BATCH * frames, bands, width, 3) + conv(BATCH * source, width, width, 3)
    return Architecture(
        name="Whisper",
        shows="one-dimensional convolutions before an encoder-decoder",
        build=lambda: hf.WhisperModel(
            hf.WhisperConfig(
                num_mel_bins=bands,
                max_source_positions=source,
                d_model=width,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=feed,
                decoder_ffn_dim=feed,
            )
        ),
        args=(floats(BATCH, bands, frames),),
        kwargs={"decoder_input_ids": tokens(BATCH, TARGET)},
        hand=front + LAYERS * (encoder_layer(BATCH, source, width, feed) + decoder_layer(BATCH, TARGET, source, width, feed)),
    )


def wav2vec2() -> Architecture:
    samples, width, heads, feed, channels = 16000, 768, 12, 3072, 512
    kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
    taps, groups = 128, 16
    features, size, n_in = 0.0, samples, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        size = out(size, kernel, stride, 0)
        features += conv(BATCH * size, n_in, channels, kernel)
        n_in = channels
    positional = conv(BATCH * (size + 1), width, width, taps, groups)  # padded by half of an even kernel: one output more, then cut
    return Architecture(
        name="Wav2Vec2",
        shows="seven strided convolutions on the wave; a grouped one with 128 taps for positions",
        build=lambda: hf.Wav2Vec2Model(
            hf.Wav2Vec2Config(
                num_hidden_layers=LAYERS,
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=feed,
                conv_dim=(channels,) * 7,
                conv_kernel=kernels,
                conv_stride=strides,
                num_conv_pos_embeddings=taps,
                num_conv_pos_embedding_groups=groups,
            )
        ),
        args=(floats(BATCH, samples),),
        hand=features + linear(BATCH * size, channels, width) + positional + LAYERS * encoder_layer(BATCH, size, width, feed),
    )


ROWS = (t5, bart, whisper, wav2vec2)
