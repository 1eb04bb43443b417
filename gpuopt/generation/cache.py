"""Keys and values -> buffers of fixed length, written at a position that is a tensor: no step has another shape, and none asks the device where it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache


@dataclass(slots=True)
class Room:
    """What all layers of a cache share. transformers' own StaticCache counts in each layer: a launch more for every one of them, each step."""

    index: torch.Tensor
    """int64 [1]: where the next token's keys and values go."""
    length: int | None
    """Positions there are; None takes as many as the first keys have."""


class SelfLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of the tokens so far, [batch, heads, length, width]. One token is written at `room.index`; several are a prompt, and start at 0."""

    is_sliding = False
    is_compileable = True

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The first keys say how many heads there are, how wide, in which dtype and where."""
        length = self.room.length or key_states.shape[2]
        self.keys, self.values = (_buffer(states, length) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt attends to itself alone: its own keys are returned, not the whole buffer with what a mask would have to hide."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num = key_states.shape[2]
        if num > 1:
            self.keys[:, :, :num].copy_(key_states)
            self.values[:, :, :num].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.room.index, key_states)
        self.values.index_copy_(2, self.room.index, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Asked only where no mask was passed; masks.py always passes one."""
        return self.get_max_length(), 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """A tensor of no dimensions, from which models make their positions."""
        return self.room.index.view(())

    def get_max_length(self) -> int:
        return self.room.length or 0

    get_max_cache_shape = get_max_length  # its name in some versions of transformers


class CrossLayer(SelfLayer):
    """Keys and values of the encoder's output: written once a prompt, read in every step."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num = key_states.shape[2]
        self.keys[:, :, :num].copy_(key_states)
        self.values[:, :, :num].copy_(value_states)
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0


def decoder_cache(room: Room) -> Cache:
    """For a decoder-only model; layers are made as the first call reaches them."""
    return Cache(layer_class_to_replicate=partial(SelfLayer, room))


def crossed_cache(room: Room, source: Room) -> EncoderDecoderCache:
    """For a decoder that also looks at an encoder's output."""
    return EncoderDecoderCache(decoder_cache(room), Cache(layer_class_to_replicate=partial(CrossLayer, source)))


def bytes_per_token(cache: Cache) -> float:
    """Of keys and values, a position and sequence, over all layers of one cache."""
    return float(sum(_row(layer.keys) + _row(layer.values) for layer in cache.layers))


def _row(buffer: torch.Tensor) -> int:
    return buffer.shape[1] * buffer.shape[3] * buffer.element_size()


def _buffer(states: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros, not what memory held: a masked position still enters a product, and 0 x NaN is NaN."""
    buffer = torch.zeros((*states.shape[:2], length, states.shape[3]), dtype=states.dtype, device=states.device)
    torch._dynamo.mark_static_address(buffer)
    return buffer
