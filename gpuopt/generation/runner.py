"""A way to generate -> a Runner: called like the model, it answers with tokens, and keeps the times of its parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gpuopt.core.binding import bind
from gpuopt.core.errors import Unsupported
from gpuopt.core.generation import TokenTimes
from gpuopt.core.result import PrecisionAudit
from gpuopt.generation import marks
from gpuopt.generation.subject import Prompt, Subject

KEPT = 32
"""Calls whose parts are kept, the last ones: those before them warmed up."""


class Generates(Protocol):
    """`Shipped` or `Stepped`."""

    def __call__(self, prompt: Prompt, mark: Callable[[], None] | None = None) -> torch.Tensor:
        """New tokens [batch, n]."""

    def close(self) -> None:
        """Give device memory back."""


class GenerationRunner:
    """`runner(*args, **kwargs)` takes what the model's forward takes and returns the new tokens [batch, n], int64."""

    def __init__(self, subject: Subject, way: Generates, names: Sequence[str], device: str, *, longest: int | None = None) -> None:
        """`longest`: tokens a prompt is cut to; None takes it as it is."""
        self.device, self._longest = device, longest
        self._subject, self._way, self._names = subject, way, tuple(names)
        self._seen: deque[marks.Marks] = deque(maxlen=KEPT)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = marks.for_device(self.device)
        prompt = self._subject.shortened(self._subject.prompt(bind(self._names, args, kwargs)), self._longest)
        found()
        tokens = self._way(prompt, found)
        self._seen.append(found)
        return tokens

    @property
    def module(self) -> Any:
        """What generates."""
        return self._subject.module

    def token_times(self) -> TokenTimes:
        """Of the last calls."""
        times = [found.times_ns() for found in self._seen]
        return TokenTimes(prefill_ns=tuple(t[0] for t in times if t), decode_ns=tuple(ns for t in times for ns in t[1:]))

    def audit(self) -> PrecisionAudit | None:
        """Not read back: tokens are what is verified."""
        return None

    def save(self, folder: Path) -> Mapping[str, str]:
        """Raises Unsupported: CUDA graphs and caches live in their process."""
        raise Unsupported("a loop over tokens lives in its process: there is nothing to ship", fix="gpuopt bench --generate measures it")

    def close(self) -> None:
        """Give device memory back. Harmless twice."""
        self._seen.clear()
        self._way.close()
