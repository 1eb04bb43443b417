"""Generation: how many tokens are asked for, and what came of it: tokens a second beside the bound that reading the weights sets."""

from __future__ import annotations

from dataclasses import dataclass

PLACED = "the weights are on the device"
"""A child says so in its progress: host memory is free for the next one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSpec:
    """What is generated, greedily, from each prompt."""

    new_tokens: int
    """After the prompt; with `stop_at_eos` at most as many."""
    stop_at_eos: bool = False
    """False times as many tokens for every way to run the model, whatever random weights make of the end token."""
    backends_named: bool = False
    """Somebody said how; else the ways that suit the device are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBound:
    """What the bytes and products of one decode step allow at a larger batch."""

    batch: int
    tokens_per_s: float
    """Of all sequences together: batch / max(bytes / bandwidth, FLOPs / peak)."""
    limit: str
    """`memory` or `compute`."""
    memory_bytes: float
    """Weights, and keys and values of all sequences at their full length."""
    fits: bool | None = None
    """Into the device's memory; None where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One way to generate: its tokens, its times and its bound."""

    kind: str
    """`decoder-only` or `encoder-decoder`."""
    way: str
    """`generate() as shipped`, or how a step runs with a static cache."""
    batch: int
    prompt_tokens: int | None
    """None where the prompt is no text: audio, an image."""
    new_tokens: int
    """A sequence, in the timed calls."""
    bucket: int | None = None
    """Length the prompt is padded to; None where it is not."""
    cache_tokens: int | None = None
    """Length of the static cache; None for a cache that grows."""
    prefill_ms: float | None = None
    """Median, from the call to the first token; the first token is made in it."""
    decode_ms: tuple[float, ...] = ()
    """Each token after the first, in order, of all passes in which tokens were timed one by one."""
    ms_per_token: float | None = None
    """Median of `decode_ms`: one step, which makes a token for every sequence of the batch."""
    tokens_per_s: float | None = None
    """Decoding alone: batch / ms_per_token."""
    tokens_per_s_overall: float | None = None
    """Of whole calls, prefill included: batch x new_tokens / median call."""
    weight_bytes: float | None = None
    """Read in one decode step: each tensor once, of an embedding the rows looked up."""
    kv_bytes: float | None = None
    """Keys and values read in the mean decode step, all sequences together, at the length they have then."""
    step_flops: float | None = None
    """Of the weights' products in one step, all sequences together: 2 a weight and sequence."""
    bound_tokens_per_s: float | None = None
    """batch / (weight and KV bytes / bandwidth)."""
    ceiling: str = ""
    """Which bandwidth that is."""
    pct_of_bound: float | None = None
    larger_batches: tuple[BatchBound, ...] = ()
    """What a server that decodes many requests together could reach with the same bytes: bounds, not measurements."""
    lengths: tuple[int, ...] = ()
    """Other prompt lengths tried after warm-up."""
    recompiles: int | None = None
    """Graphs compiled or recorded again at those lengths; 0 is right. None where nothing is compiled."""
    graphs: int = 0
    """CUDA graphs recorded."""
    equal: bool | None = None
    """Same tokens as eager `generate()` of the same dtype; None where nobody compared."""
    first_mismatch: int | None = None
    """Position of the first other token among the new ones, from 0."""
    steps_checked: int | None = None
    """Steps compared with eager's prefix given, after tokens differed: batch x new_tokens."""
    steps_agreeing: int | None = None
    """Of those, with eager's token; the others are ties within rounding, or the run has failed."""
    gap: float | None = None
    """Largest lead of eager's token over the other, in eager's logits, at a step that disagrees."""
    gap_allowed: float | None = None
    """What rounding explains: see generation/judge.py."""
    reason: str = ""
    """Why tokens differ, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBuilt:
    """What a child says of a way to generate before it is timed."""

    generated: Generated
    passed: bool | None
    """By the gate; None where nobody compared."""
    compile_s: float
    """To its first answer: compiling, recording, and one whole generation."""
    cold_start_s: float
    held_bytes: float
    """Of all parameters."""
    kv_bytes_a_sequence: float | None = None
    full_kv_bytes_a_sequence: float | None = None
    """At its last token."""
    call_s: float | None = None
    """A whole generation when everything was built, not timed with care: who is much slower than the others is not timed in turns with them."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimes:
    """Read off the timed calls themselves."""

    prefill_ns: tuple[int, ...]
    """Of each call, to its first token."""
    decode_ns: tuple[int, ...]
    """Of each token after the first, in order, of all calls."""
