"""What the loop over tokens keeps, all of it on the device: the token, where it goes, what came out. A step changes it in place and returns nothing."""

from __future__ import annotations

import torch

MOST_PARTS = 512
SMALLEST_SPLIT = 8192
"""Values of a row that one block of threads reads in a few microseconds."""


class Loop:
    """Buffers of one batch. Every step writes into the same memory, so that a CUDA graph of one step is one of all."""

    def __init__(self, *, batch: int, cache_tokens: int, new_tokens: int, eos: tuple[int, ...], pad: int, device: str) -> None:
        def whole(*shape: int) -> torch.Tensor:
            return self._kept(torch.zeros(shape, dtype=torch.int64, device=device))

        self.token = whole(batch, 1)
        """Goes into the next step."""
        self.index = whole(1)
        """Where its keys and values go in the cache."""
        self.positions = whole(batch, 1)
        """Its position among the tokens that are not padding."""
        self.count = whole(1)
        """New tokens so far."""
        self.out = whole(batch, new_tokens)
        self.forced = whole(batch, new_tokens)
        """Somebody else's tokens, fed instead of its own where `forcing` says so; `out` has its own all the same."""
        self.forcing = self._kept(torch.zeros(1, dtype=torch.bool, device=device))
        self.finished = self._kept(torch.zeros(batch, dtype=torch.bool, device=device))
        self.allowed = self._kept(torch.zeros(batch, cache_tokens, dtype=torch.bool, device=device))
        """Positions of the cache that hold no padding."""
        self.slots = self._kept(torch.arange(cache_tokens, device=device))
        self.eos = self._kept(torch.tensor(eos, dtype=torch.int64, device=device)) if eos else None
        self.pad = pad

    def restart(self) -> None:
        """Before the first token of a prompt."""
        self.count.zero_()
        self.index.zero_()
        self.positions.zero_()
        self.finished.zero_()

    def take(self, logits: torch.Tensor) -> None:
        """[batch, vocabulary] -> the token of this step. In float32 as generate() has it, so that ties fall alike."""
        chosen = largest(logits.float())
        if self.eos is not None:
            chosen = torch.where(self.finished, self.pad, chosen)
            self.finished.logical_or_((chosen[:, None] == self.eos).any(dim=-1))
        self.out.index_copy_(1, self.count, chosen[:, None])
        fed = torch.where(self.forcing, self.forced.index_select(1, self.count), chosen[:, None])
        self.token.copy_(fed)
        self.count.add_(1)

    def advance(self) -> None:
        """After a step's token went into the cache."""
        self.index.add_(1)
        self.positions.add_(1)

    @staticmethod
    def _kept(tensor: torch.Tensor) -> torch.Tensor:
        """At this address for good: without being told, torch's own CUDA graphs refuse what they write in place."""
        torch._dynamo.mark_static_address(tensor)
        return tensor


def largest(values: torch.Tensor) -> torch.Tensor:
    """[batch, n] -> the place of each row's largest value [batch], the first of several; in two steps where n divides: a compiler gives one argmax one block of threads,
    which reads a vocabulary of 128,256 alone while all other multiprocessors wait (torch/_inductor/ir.py, num_splits)."""
    batch, n = values.shape
    parts = next((p for p in range(MOST_PARTS, 1, -1) if n % p == 0), 1)
    if n < SMALLEST_SPLIT or parts == 1:
        return values.argmax(dim=-1)
    rows = values.view(batch, parts, n // parts)
    best, places = rows.amax(-1), rows.argmax(-1)
    part = best.argmax(-1, keepdim=True)
    return (part * (n // parts) + places.gather(1, part))[:, 0]
