"""torch.nn's own recurrent layers and Transformer: fused ops that other counters see as nothing."""

from __future__ import annotations

import torch
from torch import nn

from . import Architecture, floats, tokens
from .arithmetic import attention, decoder_layer, encoder_layer, linear


def recurrent(steps: int, n_in: int, hidden: int, gates: int) -> float:
    """One layer, one direction: each step multiplies its input and its state by a matrix a gate."""
    return gates * (linear(steps, n_in, hidden) + linear(steps, hidden, hidden))


class Tagger(nn.Module):
    """Tokens -> a label each, by a bidirectional LSTM."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, labels)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, labels]."""
        head: torch.Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return head


def lstm() -> Architecture:
    batch, length, width, hidden, labels = 3, 21, 96, 160, 17
    steps = batch * length
    layers = recurrent(steps, width, hidden, 4) + recurrent(steps, 2 * hidden, hidden, 4)
    return Architecture(
        name="LSTM tagger",
        shows="two bidirectional LSTM layers",
        build=lambda: Tagger(997, width, hidden, 2, labels),
        args=(tokens(batch, length),),
        hand=2 * layers + linear(steps, 2 * hidden, labels),
    )


class Translator(nn.Module):
    """Bahdanau's shape: a GRU reads, a GRU writes step by step, looking back by dot products."""

    def __init__(self, width: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.reader = nn.GRU(width, hidden, batch_first=True)
        self.writer = nn.GRUCell(width + hidden, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[B, S], [B, T] -> [B, T, vocabulary]."""
        seen, state = self.reader(self.source(source))
        state = state[0]
        states = []
        for word in self.target(target).unbind(1):
            weights = torch.softmax(torch.einsum("bsh,bh->bs", seen, state), -1)
            context = torch.bmm(weights[:, None], seen)[:, 0]
            state = self.writer(torch.cat([word, context], -1), state)
            states.append(state)
        head: torch.Tensor = self.head(torch.stack(states, 1))
        return head


def gru() -> Architecture:
    batch, source, target, width, hidden, vocabulary = 2, 19, 7, 64, 128, 311
    looks = attention(batch, target, source, hidden)
    return Architecture(
        name="GRU encoder-decoder",
        shows="one kernel over time, cells step by step, attention by einsum and bmm",
        build=lambda: Translator(width, hidden, vocabulary),
        args=(tokens(batch, source), tokens(batch, target)),
        hand=recurrent(batch * source, width, hidden, 3)
        + recurrent(batch * target, width + hidden, hidden, 3)
        + looks
        + linear(batch * target, hidden, vocabulary),
    )


def transformer_encoder() -> Architecture:
    batch, length, width, heads, feed, layers = 3, 40, 256, 4, 1024, 3
    return Architecture(
        name="nn.TransformerEncoder",
        shows="PyTorch's fast path: one op for a whole layer",
        build=lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, feed, batch_first=True), layers, enable_nested_tensor=False
        ),
        args=(floats(batch, length, width),),
        hand=layers * encoder_layer(batch, length, width, feed),
    )


def transformer() -> Architecture:
    batch, source, target, width, heads, feed, layers = 3, 40, 13, 256, 4, 1024, 2
    return Architecture(
        name="nn.Transformer",
        shows="packed projections, self and cross",
        build=lambda: nn.Transformer(width, heads, layers, layers, feed, batch_first=True),
        args=(floats(batch, source, width), floats(batch, target, width)),
        hand=layers * (encoder_layer(batch, source, width, feed) + decoder_layer(batch, target, source, width, feed)),
    )


ROWS = (lstm, gru, transformer_encoder, transformer)
