"""ONNX files of small real models, exported once a run: what the ONNX backends are tested on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec

BATCH, RANGE = 3, (1, 16)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A module, the file exported from it, and inputs for both."""

    module: Any
    model: Model
    inputs: Inputs

    def reference(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        """The module's own outputs in fp64 (integers stay integers)."""
        wide = (inputs or self.inputs).map(lambda t: t.double() if t.is_floating_point() else t)
        with torch.no_grad():
            out = self.module.double()(*wide.args, **wide.kwargs)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    def at(self, batch: int) -> Inputs:
        """The same inputs with another batch."""
        return Inputs(
            args=tuple(_resized(t, batch) for t in self.inputs.args),
            kwargs={k: _resized(t, batch) for k, t in self.inputs.kwargs.items()},
            specs=self.inputs.specs,
            dims={**self.inputs.dims, "N": batch},
        )


def _resized(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return tensor.repeat(-(-batch // tensor.shape[0]), *[1] * (tensor.dim() - 1))[:batch].contiguous()


def export(module: torch.nn.Module, inputs: Inputs, path: Path, dynamic: bool = True) -> Exported:
    """torch.onnx.export with the batch free, quietly."""
    import copy

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dim = torch.export.Dim("N", min=RANGE[0], max=RANGE[1])
    axes = [{0: dim} if s.shape and s.shape[0] == "N" else {} for s in inputs.specs]
    module = module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, inputs.args, str(path), kwargs=dict(inputs.kwargs), dynamo=True, verbose=False, external_data=False, dynamic_shapes=tuple(axes) if dynamic else None
        )  # fmt: skip
    signature = inputs.specs if dynamic else tuple(s.bind(dict(inputs.dims)) for s in inputs.specs)
    return Exported(module=copy.deepcopy(module), model=Model(form="onnx", name=path.stem, path=path, signature=signature), inputs=inputs)


class Logits(torch.nn.Module):
    """A transformers model that returns plain tensors."""

    def __init__(self, model: Any, *keys: str) -> None:
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, *args: Any) -> Any:
        out = self.model(*args)
        found = tuple(out[k] for k in self.keys)
        return found if len(found) > 1 else found[0]


def _resnet() -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", num_labels=8)
    return Logits(ResNetForImageClassification(config), "logits")


class Bert(torch.nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(
            BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32)
        )  # fmt: skip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return out.last_hidden_state, out.pooler_output


def resnet_inputs(dtype: torch.dtype) -> Inputs:
    """[N,3,32,32]"""
    torch.manual_seed(1)
    spec = TensorSpec(name="pixels", dtype=str(dtype).removeprefix("torch."), shape=("N", 3, 32, 32))
    return Inputs(args=(torch.randn(BATCH, 3, 32, 32).to(dtype),), specs=(spec,), dims={"N": BATCH})


def bert_inputs() -> Inputs:
    """Token ids and a ragged mask, [N,16]."""
    torch.manual_seed(1)
    mask = torch.ones(BATCH, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    specs = tuple(TensorSpec(name=n, dtype="int64", shape=("N", 16)) for n in ("input_ids", "attention_mask"))
    return Inputs(kwargs={"input_ids": torch.randint(0, 100, (BATCH, 16)), "attention_mask": mask}, specs=specs, dims={"N": BATCH})


class Images(torch.nn.Module):
    """The ResNet under an input name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _resnet()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.net(pixels)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Exported]:
    """`exported("resnet" | "bert", dtype)`: the file, made on first use."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, torch.dtype], Exported] = {}

    def get(name: str, dtype: torch.dtype) -> Exported:
        if (name, dtype) not in made:
            torch.manual_seed(0)
            module = (Images() if name == "resnet" else Bert()).to(dtype)
            inputs = resnet_inputs(dtype) if name == "resnet" else bert_inputs()
            made[name, dtype] = export(module, inputs, folder / f"{name}-{str(dtype).removeprefix('torch.')}.onnx")
        return made[name, dtype]

    return get


@pytest.fixture
def export_module(tmp_path: Path) -> Callable[..., Exported]:
    """`export_module(module, inputs)`: a file of any small module."""

    def make(module: torch.nn.Module, inputs: Inputs, dynamic: bool = True) -> Exported:
        return export(module, inputs, tmp_path / "model.onnx", dynamic)

    return make
