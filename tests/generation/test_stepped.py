"""A loop of our own against transformers' generate(): the same tokens, for every kind of model, with padding, ends, recordings and other lengths."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.generation import WAYS, attending
from gpuopt.generation.shipped import Shipped
from gpuopt.generation.stepped import Stepped, bucket_of
from gpuopt.generation.subject import Prompt, Subject, subject
from gpuopt.models import llama_8b_tiny, t5_large_tiny
from gpuopt.programs.ops import attend_one

_spec = importlib.util.spec_from_file_location("generation_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
text, audio = _shared.text, _shared.audio

STATIC = WAYS["eager", "static"]
COMPILED = WAYS["inductor", None]
TEXTS = ("gpt2", "mistral", "gemma", "t5")


def stepped(found: Subject, prompt: Prompt, *, new_tokens: int = 20, stop: bool = False, way: Any = STATIC) -> Stepped:
    ids = prompt[found.main_input]
    return Stepped(
        found, way, batch=ids.shape[0], prompt_tokens=found.length(prompt), new_tokens=new_tokens, stop_at_eos=stop, device="cpu"
    )


def eager(found: Subject, prompt: Prompt, *, new_tokens: int = 20, stop: bool = False) -> torch.Tensor:
    return Shipped(found, new_tokens=new_tokens, stop_at_eos=stop)(prompt)


@pytest.mark.parametrize("name", [*TEXTS, "whisper"])
def test_tokens_are_those_of_generate(make: Callable[[str], Any], name: str) -> None:
    found = subject(make(name))
    prompt = audio(2) if name == "whisper" else text(batch=2)
    expected = eager(found, prompt)
    assert expected.shape == (2, 20)
    assert expected.unique().numel() > 2, "a model that repeats one token would pass whatever the mask"
    assert torch.equal(stepped(found, prompt)(prompt), expected)


@pytest.mark.parametrize("name", TEXTS)
def test_padding_changes_nothing(make: Callable[[str], Any], name: str) -> None:
    found = subject(make(name))
    prompt = text(batch=2)
    mask = torch.ones_like(prompt["input_ids"])
    mask[1, (slice(-4, None) if found.is_crossed else slice(4))] = 0
    prompt["attention_mask"] = mask
    together = stepped(found, prompt)(prompt)
    assert torch.equal(together, eager(found, prompt))
    alone = {"input_ids": prompt["input_ids"][1:, :-4] if found.is_crossed else prompt["input_ids"][1:, 4:]}
    assert torch.equal(together[1:], eager(found, alone))


@pytest.mark.parametrize("name", [*TEXTS, "whisper"])
def test_a_recorded_step_needs_no_python(make: Callable[[str], Any], name: str, recorded: Callable[[Any], Any]) -> None:
    found = subject(make(name))
    prompts = [audio(1), {"input_features": audio(1)["input_features"] * 2}] if name == "whisper" else [text(seed=i) for i in range(2)]
    loop = stepped(found, prompts[0], new_tokens=10)
    recorded(loop.launcher)
    for prompt in (*prompts, prompts[0]):
        assert torch.equal(loop(prompt), eager(found, prompt, new_tokens=10))
    assert loop.launcher.graphs == 2, "one for the prompt, one for a step"


@pytest.mark.parametrize("build", [llama_8b_tiny, t5_large_tiny])
def test_no_length_within_a_bucket_compiles_again(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, options=None, **more: plain(run, backend="eager", **more))
    found = subject(build())
    first = text(length=30)
    loop = stepped(found, first, new_tokens=6, way=COMPILED)
    assert torch.equal(loop(first), eager(found, first, new_tokens=6))
    made = counters["stats"]["unique_graphs"]
    for length in (29, 17, 32):
        prompt = text(length=length)
        assert torch.equal(loop(prompt), eager(found, prompt, new_tokens=6))
    assert counters["stats"]["unique_graphs"] == made
    prompt = text(length=9)
    assert torch.equal(loop(prompt), eager(found, prompt, new_tokens=6))
    assert counters["stats"]["unique_graphs"] == made + 1, "another bucket is another graph of the prompt, and the same of a step"


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_it_ends_where_generate_ends(make: Callable[[str], Any], name: str) -> None:
    module = make(name)
    prompt = text(batch=2)
    free = eager(subject(module), prompt)
    ends = [int(free[0, 4]), int(free[1, 11])]
    module.generation_config.eos_token_id = ends
    found = subject(module)
    expected = eager(found, prompt, stop=True)
    assert expected.shape[1] < 20
    got = stepped(found, prompt, stop=True)(prompt)
    assert torch.equal(got, expected)
    assert torch.equal(stepped(found, prompt)(prompt), free), "without --stop it makes all its tokens"


def test_an_end_that_comes_late_is_seen_between_looks(make: Callable[[str], Any]) -> None:
    module = make("gpt2")
    prompt = text()
    free = eager(subject(module), prompt, new_tokens=40)
    late = next(int(t) for i, t in enumerate(free[0]) if i >= 3 and int(t) not in free[0, :i].tolist())
    module.generation_config.eos_token_id = late
    found = subject(module)
    assert torch.equal(stepped(found, prompt, new_tokens=40, stop=True)(prompt), eager(found, prompt, new_tokens=40, stop=True))


def test_a_prompt_that_does_not_fit_is_refused(make: Callable[[str], Any]) -> None:
    found = subject(make("gpt2"))
    loop = stepped(found, text(length=13), new_tokens=4)
    with pytest.raises(UsageError, match="17 tokens does not fit the cache"):
        loop(text(length=17))
    with pytest.raises(UsageError, match="2 prompts for a loop of 1"):
        loop(text(batch=2))
    with pytest.raises(UsageError, match="64 positions"):
        stepped(found, text(length=60), new_tokens=20)


def test_one_token_and_the_last_position_work(make: Callable[[str], Any]) -> None:
    found = subject(make("gpt2"))
    prompt = text(length=44)
    assert torch.equal(stepped(found, prompt, new_tokens=20)(prompt), eager(found, prompt, new_tokens=20))
    assert torch.equal(stepped(found, prompt, new_tokens=1)(prompt), eager(found, prompt, new_tokens=1))


def test_sampling_settings_are_put_aside_and_said(make: Callable[[str], Any]) -> None:
    module = make("gpt2")
    module.generation_config.do_sample = True
    module.generation_config.temperature = 2.0
    module.generation_config.repetition_penalty = 1.5
    kept = module.generation_config
    found = subject(module)
    assert any("do_sample=True" in note for note in found.notes)
    assert any("repetition_penalty" in note for note in found.notes)
    prompt = text()
    assert torch.equal(eager(found, prompt), eager(found, prompt))
    assert torch.equal(stepped(found, prompt)(prompt), eager(found, prompt))
    assert module.generation_config is kept


def test_what_does_not_generate_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="Linear does not generate"):
        subject(torch.nn.Linear(2, 2))


def test_layers_without_keys_of_all_tokens_are_unsupported(make: Callable[[str], Any]) -> None:
    module = make("gpt2")
    module.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(Unsupported, match="linear_attention"):
        stepped(subject(module), text())


def test_other_inputs_are_unsupported(make: Callable[[str], Any]) -> None:
    with pytest.raises(Unsupported, match="pixel_values"):
        subject(make("gpt2")).prompt({**text(), "pixel_values": torch.zeros(1)})


def test_buckets_are_powers_of_two_within_the_positions() -> None:
    assert [bucket_of(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert bucket_of(33, 48) == 48
    assert bucket_of(5, 8) == 8


def test_graphs_want_a_gpu(make: Callable[[str], Any]) -> None:
    with pytest.raises(Unsupported, match="NVIDIA GPU"):
        stepped(subject(make("gpt2")), text(), way=WAYS["cudagraphs", None])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*TEXTS, "whisper"])
@pytest.mark.parametrize("key", [("cudagraphs", None), ("inductor", None), ("inductor", "reduce-overhead"), ("inductor", "tuned")])
def test_graphs_give_the_tokens_of_generate(make: Callable[[str], Any], name: str, key: tuple[str, str | None]) -> None:
    module = make(name).cuda()
    found = subject(module)
    for seed in range(2):
        prompt = {n: t.cuda() for n, t in (audio(2) if name == "whisper" else text(batch=2, seed=seed)).items()}
        if not seed:
            loop = Stepped(found, WAYS[key], batch=2, prompt_tokens=found.length(prompt), new_tokens=20, stop_at_eos=False, device="cuda:0")
        assert torch.equal(loop(prompt), eager(found, prompt))


def test_a_compiler_takes_attention_in_one_launch_whole(make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the kernel: its definition runs in its place."""
    found = subject(make("mistral"))
    asked: list[tuple[int, ...]] = []

    def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
        asked.append(tuple(query.shape))
        return query.shape[2] == 1

    monkeypatch.setattr(attend_one, "takes", takes)
    monkeypatch.setattr(Stepped, "_attending", lambda self: attending.in_place(self.subject.module, launched=True))
    prompt = text(batch=1)
    loop = stepped(found, prompt, new_tokens=6, way=COMPILED)
    assert torch.equal(loop(prompt), eager(found, prompt, new_tokens=6))
    assert any(shape[2] == 1 for shape in asked), "a step's attention was offered to the kernel"


@pytest.mark.gpu
def test_the_matrix_vector_kernel_gives_the_tokens_of_plain_graphs() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256)
    module = LlamaForCausalLM(config).eval().to("cuda", torch.float16)
    found = subject(module)
    prompt = {"input_ids": torch.randint(0, 2048, (1, 20), device="cuda")}
    plain, ours = (
        Stepped(found, WAYS[key], batch=1, prompt_tokens=20, new_tokens=24, stop_at_eos=False, device="cuda:0")
        for key in (("cudagraphs", None), ("inductor", "gemv"))
    )
    tokens = plain(prompt)
    assert (ours.forced(prompt, tokens) == tokens).sum() >= tokens.numel() - 1, (
        "after the same tokens, only a tie within rounding may differ"
    )
    assert ours.launcher.notes == ["15 products a step run in 9 launches of gpuopt's matrix-vector kernel"]


@pytest.mark.gpu
def test_a_step_with_nothing_for_the_kernel_is_refused() -> None:
    found = subject(llama_8b_tiny().cuda())
    loop = Stepped(found, WAYS["inductor", "gemv"], batch=1, prompt_tokens=9, new_tokens=4, stop_at_eos=False, device="cuda:0")
    with pytest.raises(Unsupported, match="no product of a step"):
        loop({"input_ids": torch.randint(0, 90, (1, 9), device="cuda")})


def test_the_matrix_vector_kernel_wants_a_gpu(make: Callable[[str], Any]) -> None:
    with pytest.raises(Unsupported, match="NVIDIA GPU"):
        stepped(subject(make("gpt2")), text(), way=WAYS["inductor", "gemv"])
