"""Subject -> tokens, by transformers' own generate() with a cache that grows: the baseline, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpuopt.generation.subject import Prompt, Subject, generate


class Shipped:
    """Greedy tokens as `model.generate()` gives them."""

    def __init__(self, subject: Subject, *, new_tokens: int, stop_at_eos: bool) -> None:
        self.subject, self.new_tokens, self.stop_at_eos = subject, new_tokens, stop_at_eos
        self._config = subject.config(new_tokens, stop_at_eos=stop_at_eos)

    def __call__(self, prompt: Prompt, mark: Callable[[], None] | None = None) -> torch.Tensor:
        """New tokens [batch, at most new_tokens], int64. `mark` is called before each forward but the first, and at the end."""
        if mark is None:
            return self._new(prompt, generate(self.subject, prompt, self._config))
        seen = 0

        def between(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen > 1:
                mark()

        hook = self.subject.module.register_forward_pre_hook(between)
        try:
            tokens = self._new(prompt, generate(self.subject, prompt, self._config))
        finally:
            hook.remove()
        mark()
        return tokens

    def explained(self, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [batch, n], and the logits float32 [batch, n, vocabulary] they were chosen by."""
        config = self.subject.config(self.new_tokens, stop_at_eos=self.stop_at_eos, return_dict_in_generate=True, output_logits=True)
        found = generate(self.subject, prompt, config)
        return self._new(prompt, found.sequences), torch.stack([step.float() for step in found.logits], dim=1)

    def close(self) -> None:
        """Holds nothing."""

    def _new(self, prompt: Prompt, sequences: torch.Tensor) -> torch.Tensor:
        skipped = 1 if self.subject.is_crossed else prompt[self.subject.main_input].shape[1]
        return sequences[:, skipped:]
