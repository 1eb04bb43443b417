"""Subject -> tokens, by a loop of its own: prompts in buckets, a static cache, one launch a token, and nothing asked of the device until the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gpuopt.core.errors import UsageError
from gpuopt.generation import Way, attending
from gpuopt.generation.launching import Launch, Launcher
from gpuopt.generation.loop import Loop
from gpuopt.generation.programs import Crossed, Decoder, Filling
from gpuopt.generation.subject import Prompt, Subject

SMALLEST_BUCKET = 16
ALIGNED = 64
"""The cache's length is a multiple of it: fast attention kernels want masks whose rows start at 16 bytes."""
EOS_EVERY = 16
"""Steps between two looks at whether all sequences have ended: each look waits for the device."""


class Stepped:
    """Greedy tokens for prompts of one batch size, up to one length."""

    def __init__(
        self, subject: Subject, way: Way, *, batch: int, prompt_tokens: int | None, new_tokens: int, stop_at_eos: bool, device: str
    ) -> None:
        """`prompt_tokens`: the longest prompt there will be; its bucket is the largest. None for a prompt that is no text.

        Raises Unsupported for models without keys and values of all tokens, UsageError where the model has fewer positions.
        """
        subject.require_positions(prompt_tokens, new_tokens)
        self.subject, self.new_tokens = subject, new_tokens
        self.room = bucket_of(prompt_tokens, subject.positions) if prompt_tokens is not None else None
        own = new_tokens + (0 if subject.is_crossed else self.room or 0)
        self.cache_tokens = -(-own // ALIGNED) * ALIGNED
        self.loop = Loop(
            batch=batch,
            cache_tokens=self.cache_tokens,
            new_tokens=new_tokens,
            eos=subject.eos if stop_at_eos else (),
            pad=subject.pad,
            device=device,
        )
        self.program = (
            Crossed(subject, self.loop, batch=batch, room=self.room, device=device)
            if subject.is_crossed
            else Decoder(subject, self.loop, batch=batch, device=device)
        )
        self.launcher = Launcher(way, device)
        self._fillings: dict[int, tuple[Filling, Launch]] = {}
        self._step: Launch | None = None

    def __call__(self, prompt: Prompt, mark: Callable[[], None] | None = None) -> torch.Tensor:
        """New tokens [batch, at most new_tokens], int64. `mark` is called after the prompt, and after every step.

        Raises UsageError for a prompt that is longer than the cache was made for, or of another batch.
        """
        loop = self.loop
        with torch.no_grad(), self._attending():
            self._fill(prompt)
            if mark is not None:
                mark()
            step = self._stepping() if self.new_tokens > 1 else None
            for number in range(1, self.new_tokens):
                if loop.eos is not None and number % EOS_EVERY == 0 and bool(loop.finished.all()):
                    break
                assert step is not None
                step()
                if mark is not None:
                    mark()
            return self._ended(loop.out.clone())

    def forced(self, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
        """Its own choice at every step after the same tokens as somebody else's: [batch, new_tokens]. The same launches as a call's."""
        self.loop.forced.zero_()
        self.loop.forced[:, : tokens.shape[1]].copy_(tokens)
        self.loop.forcing.fill_(True)
        try:
            return self(prompt)
        finally:
            self.loop.forcing.fill_(False)

    def step_once(self, prompt: Prompt) -> Callable[[], Any]:
        """Fills the cache; what is returned runs one step in plain PyTorch, for those who want to look at its ops."""
        with torch.no_grad():
            self._fill(prompt)
        self.program.resume()
        return self.program.step

    def kv_bytes(self, prompt_tokens: int | None) -> float:
        """Keys and values read in the mean step of one sequence."""
        return self.program.kv_bytes(prompt_tokens or 0, self.new_tokens)

    def full_kv_bytes(self, prompt_tokens: int | None) -> float:
        """Keys and values of one sequence at its end."""
        return self.program.kv_bytes(prompt_tokens or 0, 2 * self.new_tokens)

    def bucket(self, prompt: Prompt) -> int | None:
        """Length this prompt is padded to. Raises UsageError for one that does not fit."""
        given = prompt[self.subject.main_input]
        batch = self.loop.token.shape[0]
        if given.shape[0] != batch:
            raise UsageError(f"{given.shape[0]} prompts for a loop of {batch}", fix=f"give {batch} prompts, or build for {given.shape[0]}")
        if self.room is None:
            return None
        num = given.shape[1]
        if not 1 <= num <= self.room:
            raise UsageError(
                f"a prompt of {num} tokens does not fit the cache: it was made for prompts of 1 to {self.room}",
                fix="build for the longest prompt there will be",
            )
        return bucket_of(num, self.subject.positions)

    def close(self) -> None:
        """Give device memory back."""
        self.launcher.close()
        self._fillings.clear()
        self._step = None

    def _attending(self) -> AbstractContextManager[None]:
        """Without a compiler the kernels that come with torch are the better ones."""
        way = self.launcher.way
        return attending.in_place(self.subject.module, launched=way.own_rows) if way.compiles else nullcontext()

    def _fill(self, prompt: Prompt) -> None:
        bucket = self.bucket(prompt)
        if (bucket or 0) not in self._fillings:
            self._fillings[bucket or 0] = self._made(prompt, bucket)
        filling, launch = self._fillings[bucket or 0]
        filling.load(prompt)
        self.program.restart()
        launch()
        self.program.resume()

    def _made(self, prompt: Prompt, bucket: int | None) -> tuple[Filling, Launch]:
        program = self.program
        if bucket is None:
            assert isinstance(program, Crossed)
            filling = program.filling_like(prompt)
        else:
            filling = program.filling(bucket)
        filling.load(prompt)
        # Once as it is: buffers of the cache are made at the first call, and must be there before anything is traced.
        program.restart()
        filling.run()
        return filling, self.launcher.ready(filling.run, before=program.restart, tuned=False)

    def _stepping(self) -> Launch:
        """The step, made after the first prompt is in the cache; that prompt's state is put back afterwards."""
        if self._step is None:
            loop = self.loop
            state = (loop.token, loop.index, loop.positions, loop.count, loop.finished, loop.out)
            kept = [buffer.clone() for buffer in state]

            def put_back() -> None:
                for buffer, value in zip(state, kept, strict=True):
                    buffer.copy_(value)

            self._step = self.launcher.ready(self.program.step, before=put_back, tuned=True)
            put_back()
        return self._step

    def _ended(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cut where the last sequence ended, as generate() does."""
        if self.loop.eos is None:
            return tokens
        num = int(self.loop.count)
        tokens = tokens[:, :num]
        is_end = (tokens[:, :, None] == self.loop.eos).any(-1)
        if not bool(is_end.any(-1).all()):
            return tokens
        return tokens[:, : int(is_end.long().argmax(-1).max()) + 1]


def bucket_of(length: int, positions: int | None = None) -> int:
    """The power of two from `length` up, not beyond the model's positions."""
    bucket = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return bucket if positions is None else max(length, min(bucket, positions))
