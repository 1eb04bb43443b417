"""Eager's answer is computed once a command: never another model's, never a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpuopt.generation.subject import Subject, subject
from gpuopt.models import llama_8b_tiny
from gpuopt.pipeline import commons, eagerly

PROMPT = {"input_ids": torch.arange(3, 12)[None]}


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> eagerly.Answer:
        self.calls += 1
        return torch.tensor([[self.calls, 2]]), torch.full((1, 2, 3), float(self.calls))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path.chmod(0o700)
    monkeypatch.setenv(commons.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def tiny() -> Subject:
    return subject(llama_8b_tiny())


def ask(found: Subject, compute: Counted, new_tokens: int = 2, prompt: dict[str, torch.Tensor] = PROMPT) -> int:
    tokens, logits = eagerly.shared(found, prompt, new_tokens, stop_at_eos=False, compute=compute)
    assert logits.dtype == torch.float32 and tokens.dtype == torch.int64
    assert int(tokens[0, 0]) == int(logits[0, 0, 0])
    return int(tokens[0, 0])


def test_the_second_who_asks_reads_it(folder: Path, tiny: Subject) -> None:
    compute = Counted()
    assert [ask(tiny, compute), ask(subject(llama_8b_tiny()), compute)] == [1, 1]
    assert ask(tiny, compute, new_tokens=3) == 2, "another number of tokens is another answer"
    assert ask(tiny, compute, prompt={"input_ids": torch.arange(4, 13)[None]}) == 3


def test_other_weights_have_another_answer(folder: Path, tiny: Subject) -> None:
    compute = Counted()
    other = llama_8b_tiny()
    other.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    assert [ask(tiny, compute), ask(subject(other), compute)] == [1, 2]


def test_a_damaged_answer_is_computed_again(folder: Path, tiny: Subject) -> None:
    compute = Counted()
    ask(tiny, compute)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    assert [ask(tiny, compute), ask(tiny, compute)] == [2, 2]


def test_without_a_folder_everybody_computes(monkeypatch: pytest.MonkeyPatch, tiny: Subject) -> None:
    monkeypatch.setenv(commons.VARIABLE, "")
    compute = Counted()
    assert [ask(tiny, compute), ask(tiny, compute)] == [1, 2]
