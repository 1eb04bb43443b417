"""Tiny transformers of many kinds, their inputs, and what a rewrite does to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils import _pytree as pytree

from gpuopt.converters import apply
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec, Transforms
from gpuopt.programs.export import export

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
IMAGE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 99, (2, length))


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def _whisper() -> Any:
    config = hf.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=8, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    return hf.WhisperModel(config), {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": ids(5)}


def _clip() -> Any:
    text = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 16}
    config = hf.CLIPConfig(text_config=text, vision_config={**IMAGE, "projection_dim": 16}, projection_dim=16)
    return hf.CLIPModel(config), {"input_ids": ids(), "pixel_values": images()}


def _t5() -> Any:
    config = hf.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        use_cache=False,
    )
    return hf.T5Model(config), {"input_ids": ids(), "decoder_input_ids": ids(5)}


def _swin() -> Any:
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
    return hf.SwinModel(config), {"pixel_values": images()}


def _gpt2(**more: Any) -> Any:
    return hf.GPT2Model(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, **more)), {"input_ids": ids()}


ZOO = {
    "bert": lambda: (hf.BertModel(hf.BertConfig(**TEXT)), {"input_ids": ids()}),
    "bert-decoder": lambda: (hf.BertModel(hf.BertConfig(**TEXT, is_decoder=True, use_cache=False)), {"input_ids": ids()}),
    "roberta": lambda: (hf.RobertaModel(hf.RobertaConfig(**TEXT, max_position_embeddings=40)), {"input_ids": ids()}),
    "distilbert": lambda: (hf.DistilBertModel(hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)), {"input_ids": ids()}),
    "vit": lambda: (hf.ViTModel(hf.ViTConfig(**IMAGE)), {"pixel_values": images()}),
    "clip": _clip,
    "gpt2": _gpt2,
    "gpt2-no-cache": lambda: _gpt2(use_cache=False),
    "llama": lambda: (hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), {"input_ids": ids()}),
    "llama-no-cache": lambda: (hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, use_cache=False)), {"input_ids": ids()}),
    "qwen2": lambda: (hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, use_cache=False)), {"input_ids": ids()}),
    "qwen2-window": lambda: (
        hf.Qwen2Model(hf.Qwen2Config(**DECODER, use_cache=False, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
        {"input_ids": ids()},
    ),
    "t5": _t5,
    "whisper": _whisper,
    "swin": _swin,
}  # fmt: skip


def built(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """An fp64 model in eval mode, far from its tidy initial weights, and its inputs."""
    torch.manual_seed(0)
    module, given = ZOO[name]()
    module = module.double().eval()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.2)
    return module, {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


def as_inputs(given: dict[str, torch.Tensor]) -> Inputs:
    specs = tuple(TensorSpec(name=k, dtype=str(v.dtype).removeprefix("torch."), shape=tuple(v.shape)) for k, v in given.items())
    return Inputs(kwargs=given, specs=specs)


def rewritten(module: Any, given: dict[str, torch.Tensor] | None, *texts: str) -> Any:
    """The changed copy; the module itself is left as it was."""
    model = Model(form="module", name="m", module=module, dtype="float64")
    changed = apply(model, None, Transforms(rewrites=texts), as_inputs(given) if given is not None else None)
    assert changed.module is not module
    return changed


def outputs(module: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            t.clone() for t in pytree.tree_leaves(tuple(module(**copy.deepcopy(given), return_dict=False))) if isinstance(t, torch.Tensor)
        ]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(left, right))


class First(torch.nn.Module):
    """A model's first output alone: a cache among the others cannot be exported."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.module(**given, return_dict=False)[0]
        return found


def exported_ops(module: Any, given: dict[str, torch.Tensor]) -> list[str]:
    return [str(node.target) for node in export(First(module), as_inputs(given)).graph.nodes if node.op == "call_function"]


def compiled(module: Any) -> Any:
    """As one graph, traced and functionalised as Inductor's is, run op by op."""
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def stacks_a_mask(ops: list[str]) -> bool:
    """Whether a graph compares positions with each other, or fills a mask: what every builder of transformers does."""
    return any(op.startswith(("aten.le.Tensor", "aten.ge.Scalar", "aten.new_ones", "aten.logical_not", "aten.masked_fill")) for op in ops)


class Tools:
    """What tests of this folder share, as one fixture: a conftest cannot be imported."""

    zoo = tuple(ZOO)
    built, rewritten, outputs, same, as_inputs = map(staticmethod, (built, rewritten, outputs, same, as_inputs))
    exported_ops, compiled, stacks_a_mask = map(staticmethod, (exported_ops, compiled, stacks_a_mask))


@pytest.fixture
def zoo() -> type[Tools]:
    return Tools


@pytest.fixture(params=sorted(ZOO))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
