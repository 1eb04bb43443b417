"""Transformers folders without their weights: the same module as from_pretrained gives, from any layout, and no code but the library's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from gpuopt.core.errors import BadInput, GpuoptError, Unsupported, Untrusted, UsageError
from gpuopt.streaming import meta
from gpuopt.streaming.owned import Owned

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
IDS = torch.tensor([[5, 9, 40, 3, 22]])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    yield
    logger.setLevel(level)


def llama(**changes: Any) -> nn.Module:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "rope_parameters": rope, **changes})
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=60, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))


def saved(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize(
    ("build", "dtype", "is_empty"),
    [
        (lambda: llama(), torch.bfloat16, True),
        (lambda: llama(tie_word_embeddings=True), torch.float32, True),
        (gpt2, torch.float32, True),
        (t5, torch.float16, True),  # keeps `wo` in float32
        (mixtral, torch.bfloat16, False),  # experts lie apart in the file and together in the class
    ],
)
def test_it_is_the_module_that_from_pretrained_gives(
    tmp_path: Path, build: Callable[[], nn.Module], dtype: torch.dtype, is_empty: bool
) -> None:
    torch.manual_seed(0)
    folder = saved(build(), tmp_path, dtype, max_shard_size="20KB")
    reference = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0]).from_pretrained(
        folder, dtype="auto"
    )
    found = meta.empty(folder)
    assert found.fingerprint() == Owned(reference, free=False).fingerprint()
    assert isinstance(found, meta.Empty) == is_empty
    if isinstance(found, meta.Empty):
        assert all(parameter.is_meta for parameter in found.module.parameters())
        found.materialize()
    else:
        assert "laid out otherwise" in found.notes[0]
    for ours, theirs in (
        (found.module.named_parameters(), reference.named_parameters()),
        (found.module.named_buffers(), reference.named_buffers()),
    ):
        pairs = list(zip(ours, theirs, strict=True))
        assert all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if reference.config.is_encoder_decoder else {})
    with torch.no_grad():
        assert torch.equal(found.module(**inputs).logits, reference(**inputs).logits)
    assert not found.module.training and found.module.generation_config == reference.generation_config
    found.close()


def test_a_bare_model_is_filled_from_the_files_of_one_with_a_head_and_says_what_it_left(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    found = meta.empty(folder)
    assert isinstance(found, meta.Empty) and type(found.module).__name__ == "LlamaModel"
    assert "lm_head.weight" in found.notes[0]
    found.close()


def rewritten(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, Untrusted, "auto_map"),
        ({"_attn_implementation": "someone/kernel"}, Untrusted, "someone/kernel"),
        ({"text_config": {"attn_implementation": ["x"]}}, Untrusted, "attention kernel"),
        ({"use_kernels": True}, Untrusted, "kernels from a hub"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, Unsupported, "quantised"),
        ({"architectures": ["NoSuchModel"], "model_type": "nothing"}, BadInput, "cannot load"),
        ({"num_hidden_layers": 3}, BadInput, "lacks model.layers.2"),
        ({"hidden_size": 64}, BadInput, r"in the file, .* in the model"),
        ({"dtype": "float16"}, BadInput, "float32 in the file, float16 in the model"),
    ],
)
def test_a_configuration_that_runs_code_or_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[GpuoptError], said: str
) -> None:
    folder = saved(llama(), tmp_path)
    rewritten(folder, **changes)
    with pytest.raises(error, match=said):
        meta.empty(folder)


def test_a_damaged_configuration_and_a_folder_without_one_are_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config.json"):
        meta.empty(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="damaged"):
        meta.empty(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match="no object"):
        meta.empty(tmp_path)
