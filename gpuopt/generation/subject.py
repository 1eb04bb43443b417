"""A transformers model -> what generating with it needs to know: its special tokens, its inputs, its limits; and its generate() settings, made greedy."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from gpuopt.core.errors import Unsupported, UsageError

Prompt = Mapping[str, torch.Tensor]
"""Name -> tensor: the main input, [batch, length] for text, and `attention_mask` where one is given."""

_OURS = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "use_cache",
        "cache_implementation",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "max_length",
        "max_new_tokens",
        "output_attentions",
        "output_hidden_states",
        "return_dict_in_generate",
        "do_sample",
        "num_beams",
        "temperature",
        "top_k",
        "top_p",
        "lang_to_id",
        "task_to_id",
        "alignment_heads",
        "is_multilingual",
        "no_timestamps_token_id",
        "prev_sot_token_id",
    }
)
"""Settings of generate() that greedy decoding keeps, or that say nothing without sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that generates, looked at once."""

    module: Any
    kind: str
    """`decoder-only` or `encoder-decoder`."""
    main_input: str
    """`input_ids`, or what an encoder of something else takes: `input_features`."""
    eos: tuple[int, ...]
    pad: int
    start: int | None
    """First token of an encoder-decoder's answer."""
    positions: int | None
    """Tokens it has positions for, prompt and answer together; None where there is no such limit."""
    layer_kinds: tuple[str, ...]
    """`full_attention` and `sliding_attention`, in order, each once."""
    window: int | None
    accepts: frozenset[str]
    """Parameters of its forward."""
    notes: tuple[str, ...] = ()

    @property
    def is_crossed(self) -> bool:
        """Whether an encoder reads the prompt."""
        return self.kind == "encoder-decoder"

    @property
    def reads_text(self) -> bool:
        """Whether the prompt is token ids, which may be padded."""
        return self.main_input == "input_ids"

    def prompt(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Of a forward's inputs, those that a generation starts from. Raises Unsupported for others than text or one main input and its mask."""
        kept = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and not n.startswith("decoder_") and n != "labels"}
        if self.main_input not in kept:
            raise UsageError(f"generating needs the input {self.main_input}", fix=f"--input '{self.main_input}:int64[N,S]'")
        others = sorted(set(kept) - {self.main_input, "attention_mask"})
        if others:
            raise Unsupported(
                f"generation starts from {self.main_input} and attention_mask, not from {', '.join(others)}",
                fix="leave the other inputs away",
            )
        return kept

    def length(self, prompt: Prompt) -> int | None:
        """Tokens of a text; None for anything else."""
        return prompt[self.main_input].shape[1] if self.reads_text else None

    def shortened(self, prompt: Prompt, longest: int | None) -> dict[str, torch.Tensor]:
        """A text of at most `longest` tokens, the first ones; None leaves it."""
        return {n: t if longest is None else t[:, :longest].contiguous() for n, t in prompt.items()}

    def fitting(self, new_tokens: int) -> int | None:
        """The longest prompt with an answer of `new_tokens`, which may be none at all; None where there is no limit."""
        if self.positions is None:
            return None
        return self.positions if self.is_crossed else self.positions - new_tokens

    def require_positions(self, prompt: int | None, new_tokens: int) -> None:
        """Raises UsageError where prompt and answer together are longer than the model's positions."""
        if self.positions is None:
            return
        longest = new_tokens if self.is_crossed else (prompt or 0) + new_tokens
        if longest > self.positions or (prompt or 0) > self.positions:
            what = f"{new_tokens} new tokens" if self.is_crossed else f"a prompt of {prompt} and {new_tokens} new tokens"
            left = self.positions - (0 if self.is_crossed else prompt or 0)
            fix = f"--generate {left}, or a smaller --dim S=…" if 0 < left < new_tokens else "a smaller --dim S=…"
            raise UsageError(f"{what} do not fit the model's {self.positions} positions", fix=fix)

    def config(self, new_tokens: int, *, stop_at_eos: bool, **more: Any) -> GenerationConfig:
        """Greedy decoding, and nothing else that generate() can do."""
        own = getattr(self.module, "generation_config", None)
        return GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            bos_token_id=getattr(own, "bos_token_id", None),
            eos_token_id=list(self.eos) if stop_at_eos and self.eos else None,
            pad_token_id=self.pad,
            decoder_start_token_id=self.start,
            **more,
        )


def subject(module: Any) -> Subject:
    """Raises Unsupported for what does not generate, or not with keys and values that a static cache could hold."""
    config = getattr(module, "config", None)
    if not isinstance(module, GenerationMixin) or config is None or not module.can_generate():
        raise Unsupported(
            f"{type(module).__name__} does not generate: it is no transformers model with a language-model head",
            fix="name a …ForCausalLM or …ForConditionalGeneration, or leave --generate away",
        )
    is_crossed = bool(getattr(config, "is_encoder_decoder", False))
    text = config.get_text_config(decoder=True)
    own = getattr(module, "generation_config", None)
    eos = _ids(own, text, "eos_token_id")
    pads = _ids(own, text, "pad_token_id")
    starts = (*_ids(own, text, "decoder_start_token_id"), *_ids(own, text, "bos_token_id"))
    if is_crossed and not starts:
        raise Unsupported("the configuration names no decoder_start_token_id", fix="set it in the model's configuration")
    kinds = tuple(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if not kinds:
        kinds = ("sliding_attention",) if window else ("full_attention",)
    return Subject(
        module=module,
        kind="encoder-decoder" if is_crossed else "decoder-only",
        main_input=str(module.main_input_name),
        eos=eos,
        pad=pads[0] if pads else eos[0] if eos else 0,
        start=starts[0] if is_crossed else None,
        positions=_positions(text, is_crossed=is_crossed),
        layer_kinds=kinds,
        window=window,
        accepts=frozenset(inspect.signature(module.forward).parameters),
        notes=_dropped(own),
    )


@contextmanager
def greedy(subject: Subject, config: GenerationConfig) -> Iterator[None]:
    """The model's own settings out of the way while generate() runs: what a passed configuration leaves open it fills from them."""
    kept = subject.module.generation_config
    subject.module.generation_config = config
    try:
        yield
    finally:
        subject.module.generation_config = kept


def generate(subject: Subject, prompt: Prompt, config: GenerationConfig) -> Any:
    """transformers' generate(), or the general one where a class has its own around it (Whisper cuts audio into windows)."""
    with greedy(subject, config), torch.no_grad():
        return GenerationMixin.generate(subject.module, **prompt, generation_config=config)


def _dropped(own: Any) -> tuple[str, ...]:
    if own is None:
        return ()
    notes = []
    if getattr(own, "do_sample", False):
        notes.append("its settings sample (do_sample=True): tokens are chosen greedily here, so that ways to run it can be compared")
    if (getattr(own, "num_beams", None) or 1) > 1:
        notes.append(f"its settings search {own.num_beams} beams: tokens are chosen greedily here")
    others = sorted(key for key in own.to_diff_dict() if key not in _OURS)
    if others:
        notes.append(f"settings of generate() left out on all sides: {', '.join(others)}")
    return tuple(notes)


def _ids(own: Any, config: Any, name: str) -> tuple[int, ...]:
    for holder in (own, config):
        value = getattr(holder, name, None)
        if value is not None:
            return tuple(int(v) for v in value) if isinstance(value, Sequence | torch.Tensor) else (int(value),)
    return ()


def _positions(config: Any, *, is_crossed: bool) -> int | None:
    names = ("max_target_positions", "max_position_embeddings") if is_crossed else ("max_position_embeddings", "n_positions")
    return next((int(v) for n in names if (v := getattr(config, n, None))), None)
