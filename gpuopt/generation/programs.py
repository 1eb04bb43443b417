"""Subject + Loop + cache -> the two things that run: a prompt of one bucket, and one step. Functions of buffers: no arguments, nothing returned, no shape that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from gpuopt.generation import masks
from gpuopt.generation.cache import Room, bytes_per_token, crossed_cache, decoder_cache
from gpuopt.generation.loop import Loop
from gpuopt.generation.subject import Prompt, Subject

Launch = Callable[[], None]


class Filling(Protocol):
    """A prompt's buffers and what runs on them."""

    def load(self, prompt: Prompt) -> None:
        """Copy a prompt in; it may be shorter than the bucket."""

    def run(self) -> None:
        """Prompt -> cache and first token."""


class Text:
    """Token ids of at most `bucket`, padded at the end: what comes behind a token, causal attention never sees, and a decoded token overwrites it in the cache."""

    def __init__(self, *, batch: int, bucket: int, main_input: str, device: str) -> None:
        self.main_input, self.bucket = main_input, bucket
        self.ids = Loop._kept(torch.zeros(batch, bucket, dtype=torch.int64, device=device))
        self.given = Loop._kept(torch.zeros(batch, bucket, dtype=torch.bool, device=device))
        self.length = Loop._kept(torch.zeros(1, dtype=torch.int64, device=device))

    def load(self, prompt: Prompt) -> None:
        ids, mask = prompt[self.main_input], prompt.get("attention_mask")
        num = ids.shape[1]
        self.ids.zero_()
        self.given.zero_()
        self.ids[:, :num].copy_(ids)
        self.given[:, :num].copy_(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0)
        self.length.fill_(num)


class Decoder:
    """Decoder-only: the prompt goes through the same layers as the answer."""

    def __init__(self, subject: Subject, loop: Loop, *, batch: int, device: str) -> None:
        masks.require_known(subject)
        self.subject, self.loop, self.batch, self.device = subject, loop, batch, device
        self.dtype = subject.module.dtype
        self.cache = decoder_cache(Room(index=loop.index, length=loop.slots.shape[0]))

    def filling(self, bucket: int) -> Filling:
        """For prompts of at most `bucket` tokens."""
        return _DecoderFilling(self, bucket)

    def restart(self) -> None:
        """Nothing is known of a prompt outside the device."""

    def resume(self) -> None:
        """Nor of a step."""

    def step(self) -> None:
        """One token for every sequence."""
        loop = self.loop
        mask = masks.of_step(self.subject, loop.allowed, loop.slots, loop.index, self.dtype)
        logits = self.logits(loop.token, loop.positions, mask)
        loop.advance()
        loop.take(logits[:, -1])

    def logits(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, **more: Any) -> torch.Tensor:
        """[batch, length, vocabulary]."""
        if "position_ids" in self.subject.accepts:
            more["position_ids"] = positions
        found: torch.Tensor = self.subject.module(
            input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, **more
        ).logits
        return found

    def kv_bytes(self, prompt: int, new_tokens: int) -> float:
        """Read in the mean step, a sequence: a step reads all before it and its own."""
        return bytes_per_token(self.cache) * (prompt + new_tokens / 2)


class _DecoderFilling(Text):
    def __init__(self, owner: Decoder, bucket: int) -> None:
        super().__init__(batch=owner.batch, bucket=bucket, main_input=owner.subject.main_input, device=owner.device)
        self.owner = owner

    def run(self) -> None:
        owner, loop = self.owner, self.owner.loop
        loop.restart()
        positions = (self.given.long().cumsum(-1) - 1).clamp(min=0)
        last = self.length - 1
        mask = masks.of_prompt(owner.subject, self.given, owner.dtype)
        if "logits_to_keep" in owner.subject.accepts:  # the head's product for one position, not for all of them
            logits = owner.logits(self.ids, positions, mask, logits_to_keep=last)
        else:
            logits = owner.logits(self.ids, positions, mask).index_select(1, last)
        behind = loop.slots[: self.bucket] >= self.length
        loop.allowed.fill_(True)
        loop.allowed[:, : self.bucket].copy_(self.given | behind)
        loop.index.copy_(self.length)
        loop.positions.copy_(positions.index_select(1, last) + 1)
        loop.take(logits[:, -1])


class Crossed:
    """Encoder-decoder: the prompt goes through the encoder, and the decoder looks at what comes out of it."""

    def __init__(self, subject: Subject, loop: Loop, *, batch: int, room: int | None, device: str) -> None:
        """`room`: longest prompt in tokens; None for what is no text, whose length never changes."""
        masks.require_known(subject)
        self.subject, self.loop, self.batch, self.device, self.room = subject, loop, batch, device, room
        self.dtype = subject.module.dtype
        self.cache = crossed_cache(Room(index=loop.index, length=loop.slots.shape[0]), Room(index=loop.index, length=room))
        # A decoder wants to be told of an encoder's output even where its layers find all they need of it in the cache.
        self.source = Loop._kept(torch.zeros(batch, room or 1, _width(subject), dtype=self.dtype, device=device))
        self.seen = Loop._kept(torch.zeros(batch, room, dtype=torch.bool, device=device)) if room else None

    def filling(self, bucket: int) -> Filling:
        """For prompts of at most `bucket` tokens."""
        return _CrossedText(self, bucket)

    def filling_like(self, prompt: Prompt) -> Filling:
        """For prompts of this very shape."""
        return _CrossedOther(self, prompt)

    def restart(self) -> None:
        """The keys of the last prompt no longer hold: before a run that Python takes part in."""
        for layer in self.cache.is_updated:
            self.cache.is_updated[layer] = False

    def resume(self) -> None:
        """They hold: before a step. A replayed prompt has filled them without Python's notice."""
        for layer in self.cache.is_updated:
            self.cache.is_updated[layer] = True

    def step(self) -> None:
        """One token for every sequence."""
        crossing = None if self.seen is None else masks.added(self.seen[:, None, None, :], self.dtype)
        self.decode(self.source, crossing)

    def decode(self, source: torch.Tensor, crossing: torch.Tensor | None) -> None:
        """The decoder's token, with the encoder's output or its keys."""
        loop, more = self.loop, {}
        if "decoder_position_ids" in self.subject.accepts:
            more["decoder_position_ids"] = loop.positions
        if crossing is not None:
            more["attention_mask"] = crossing
        logits = self.subject.module(
            encoder_outputs=(source,),
            decoder_input_ids=loop.token,
            decoder_attention_mask=masks.of_step(self.subject, loop.allowed, loop.slots, loop.index, self.dtype),
            past_key_values=self.cache,
            use_cache=True,
            **more,
        ).logits
        loop.advance()
        loop.take(logits[:, -1])

    def begin(self) -> None:
        """The first token of the answer, at the first place of the cache."""
        self.loop.restart()
        self.loop.allowed.fill_(True)
        assert self.subject.start is not None
        self.loop.token.fill_(self.subject.start)

    def kv_bytes(self, prompt: int, new_tokens: int) -> float:
        """Read in the mean step, a sequence: the answer so far, and all of the prompt."""
        source = prompt or self.cache.cross_attention_cache.layers[0].keys.shape[2]
        mine, theirs = (bytes_per_token(c) for c in (self.cache.self_attention_cache, self.cache.cross_attention_cache))
        return mine * new_tokens / 2 + theirs * source


class _CrossedText(Text):
    def __init__(self, owner: Crossed, bucket: int) -> None:
        super().__init__(batch=owner.batch, bucket=bucket, main_input=owner.subject.main_input, device=owner.device)
        self.owner = owner

    def run(self) -> None:
        owner = self.owner
        assert owner.seen is not None
        owner.begin()
        # Four dimensions, taken as they are: see masks.py. Padding has no row of its own to hide: what it computes nobody reads.
        mask = masks.added(self.given[:, None, None, :], owner.dtype)
        found = owner.subject.module.get_encoder()(input_ids=self.ids, attention_mask=mask.expand(-1, -1, self.bucket, -1))[0]
        owner.seen.zero_()
        owner.seen[:, : self.bucket].copy_(self.given)
        owner.decode(found, mask)


class _CrossedOther:
    def __init__(self, owner: Crossed, prompt: Prompt) -> None:
        self.owner = owner
        self.values = Loop._kept(torch.zeros_like(prompt[owner.subject.main_input]))

    def load(self, prompt: Prompt) -> None:
        self.values.copy_(prompt[self.owner.subject.main_input])

    def run(self) -> None:
        owner = self.owner
        owner.begin()
        found = owner.subject.module.get_encoder()(**{owner.subject.main_input: self.values})[0]
        owner.decode(found, None)


def _width(subject: Subject) -> int:
    config = subject.module.config
    return int(getattr(config, "d_model", None) or config.hidden_size)
