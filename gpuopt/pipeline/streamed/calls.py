"""A loaded model and its inputs -> the call that is streamed, a forward or a whole generation, and what of it is timed. Imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from gpuopt.accuracy import compare
from gpuopt.core.live import Inputs
from gpuopt.core.streaming import Anatomy
from gpuopt.pipeline.streamed.facts import Answer, Timed
from gpuopt.timing import clocks

WARM_TOKENS = 4
BRIEF_TOKENS = 12


class Simulated(Protocol):
    """The part of a simulated engine that tells the time."""

    forwards: list[Any]

    @property
    def elapsed_ms(self) -> float:
        """The clock of what is computed."""


@dataclass(slots=True)
class Work:
    """A module and one call of it."""

    module: Any
    inputs: Inputs
    """On the device."""
    device: str
    """`cpu` where the device is on paper."""
    new_tokens: int | None = None
    _subject: Any = field(default=None, repr=False)
    _generator: Any = field(default=None, repr=False)

    @property
    def has_inputs(self) -> bool:
        """Whether it can be called at all."""
        return bool(self.inputs.args or self.inputs.kwargs)

    @property
    def tokens(self) -> int:
        """Rows of the products in a timed forward: batch x positions, and one position while generating."""
        batch = self.inputs.dims.get("N", 1)
        return batch if self.new_tokens else batch * self.inputs.dims.get("S", 1)

    @property
    def words(self) -> str:
        """`prefill N=1 S=512`, `decode N=1 past=128..160`, `forward N=8`."""
        if not self.has_inputs:
            return "unknown: planned as one row a product"
        dims = " ".join(f"{k}={v}" for k, v in self.inputs.dims.items())
        if self.new_tokens:
            length = self.inputs.dims.get("S", 1)
            return f"decode N={self.inputs.dims.get('N', 1)} past={length}..{length + self.new_tokens - 1}"
        kind = "forward" if "S" not in self.inputs.dims else "decode" if self.inputs.dims["S"] == 1 else "prefill"
        return f"{kind} {dims}".strip()

    def forward(self) -> Any:
        """One forward on the inputs."""
        with torch.inference_mode():
            return self.module(*self.inputs.args, **self.inputs.kwargs)

    def generated(self, mark: Callable[[], None] | None = None) -> torch.Tensor:
        """New tokens [batch, n], greedy. `mark` is called before each forward but the first, and at the end. Raises Unsupported for what does not generate."""
        if self._generator is None:
            from gpuopt.generation.shipped import Shipped
            from gpuopt.generation.subject import subject

            assert self.new_tokens is not None
            self._subject = subject(self.module)
            self._generator = Shipped(self._subject, new_tokens=self.new_tokens, stop_at_eos=False)
        values = (*self.inputs.args, *self.inputs.kwargs.values())
        named = {spec.name: tensor for spec, tensor in zip(self.inputs.specs, values, strict=True)}
        with torch.inference_mode():
            tokens: torch.Tensor = self._generator(self._subject.prompt(named), mark)
        return tokens

    def of(self, tokens: int) -> Work:
        """The same call, generating so many tokens."""
        return replace(self, new_tokens=tokens, _generator=None)

    def warm(self) -> Any:
        """A call that nobody counts: a forward, or the first few tokens of a generation, which take all that it takes but the last of the cache."""
        if not self.new_tokens or self.new_tokens <= WARM_TOKENS:
            return self.call()
        return self.of(WARM_TOKENS).call()

    def brief(self) -> Any:
        """A call to time units in: a forward, or the first tokens of a generation."""
        return self.of(max(WARM_TOKENS, min(BRIEF_TOKENS, self.new_tokens))).call() if self.new_tokens else self.call()

    def call(self) -> Any:
        """What is timed: a forward, or a whole generation."""
        return self.generated() if self.new_tokens else self.forward()

    def answer(self) -> Answer:
        """A call, and what it gave."""
        outputs = self.call()
        tokens = tuple(int(t) for t in outputs[0].tolist()) if self.new_tokens else ()
        return Answer(digest=digest(outputs), tokens=tokens)


def digest(outputs: Any) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors: equal where `torch.equal` says so of each, NaN included."""
    found = hashlib.sha256()
    for name, tensor in compare.flatten(outputs):
        plain = tensor.detach().to("cpu").contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    return digest(one) == digest(other)


def timed(work: Work, count: int, engine: Simulated | None = None) -> Timed:
    """`count` calls, by the device's clock: forwards one by one, and while generating each forward after the prompt's.

    engine: of a device on paper, whose own clock tells the time.
    """
    if engine is not None:
        return _on_paper(work, count, engine)
    if work.new_tokens:
        from gpuopt.generation import marks

        samples: list[int] = []
        prompts: list[int] = []
        for _ in range(count):
            found = marks.for_device(work.device)
            found()
            work.generated(found)
            first, *rest = found.times_ns()
            prompts.append(first)
            samples += rest
        return Timed(samples_ns=tuple(samples), prompt_ns=tuple(prompts))
    clock = clocks.for_device(work.device)
    return Timed(samples_ns=clock.time_calls(work.forward, count)[0])


def _on_paper(work: Work, count: int, engine: Simulated) -> Timed:
    samples: list[int] = []
    prompts: list[int] = []
    stalls: list[int] = []
    for _ in range(count):
        before, began = len(engine.forwards), engine.elapsed_ms
        work.call()
        seen = engine.forwards[before:]
        if work.new_tokens:
            seen = seen[1:]
            # What is left of the call: the first forward, and an encoder that ran before it.
            prompts.append(round((engine.elapsed_ms - began - sum(f.ms for f in seen)) * 1e6))
        samples += [max(1, round(f.ms * 1e6)) for f in seen]
        stalls += [round(f.stall_ms * 1e6) for f in seen]
    return Timed(samples_ns=tuple(samples), prompt_ns=tuple(prompts), stall_ns=tuple(stalls))


def cache_bytes(module: Any, inputs: Inputs, new_tokens: int | None) -> int:
    """Keys and values at the last token, by the configuration; 0 where nothing is generated or the configuration does not say."""
    config = getattr(module, "config", None)
    if new_tokens is None or config is None:
        return 0
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = next((p.element_size() for p in module.parameters() if p.is_floating_point()), 2)
    length = inputs.dims.get("S", 1) + new_tokens
    return int(2 * layers * kv_heads * size * length * inputs.dims.get("N", 1) * width)


def rings_of(module: Any, anatomy: Anatomy, new_tokens: int | None) -> frozenset[str] | None:
    """Rings that run in a timed forward; None is all of them. An encoder runs once a prompt, not once a token."""
    rings = {unit.ring for unit in anatomy.units}
    crossed = new_tokens is not None and getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return frozenset(ring for ring in rings if "encoder" not in ring.split(".")) if crossed else None
