"""Tiny models of each kind that generates, and a CUDA graph made of ATen ops: what is recorded runs again on the same tensors, and Python does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from gpuopt.generation.launching import Launch, Launcher


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    )


def mistral() -> Any:
    """A window shorter than its prompts."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            sliding_window=6,
            tie_word_embeddings=False,
        )
    )


def gemma() -> Any:
    """Layers of two kinds."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            sliding_window=6,
            tie_word_embeddings=False,
        )
    )


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=61,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def whisper() -> Any:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=61,
            num_mel_bins=8,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            d_model=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=20,
            max_target_positions=40,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    )


MAKES: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "mistral": mistral, "gemma": gemma, "t5": t5, "whisper": whisper}


@pytest.fixture
def make() -> Callable[[str], Any]:
    def made(name: str) -> Any:
        torch.manual_seed(3)
        module = MAKES[name]().eval().requires_grad_(False)
        # As they are initialised, such models say one token again and again, whatever they look at.
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        return module

    return made


def text(*, batch: int = 1, length: int = 13, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))}


def audio(batch: int = 1) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(0))}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.ops.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, recorded in self.ops:
                found = func(*args, **kwargs)
                if not func._schema.is_mutable:
                    for mine, new in zip(_tensors(recorded), _tensors(found), strict=True):
                        mine.copy_(new)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, torch.Tensor)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launcher], Launcher]:
    """A launcher on a CPU that records all the same."""

    def record(self: Launcher, launch: Launch, before: Launch) -> Launch:
        with torch.no_grad():
            for _ in range(3):
                before()
                launch()
            before()
            tape = _Tape()
            with tape:
                launch()
        self.graphs += 1
        return tape.replay

    monkeypatch.setattr(Launcher, "_record", record)

    def recording(launcher: Launcher) -> Launcher:
        launcher.is_recording = True
        return launcher

    return recording
