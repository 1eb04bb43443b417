"""Reference models as factories: `gpuopt.models:resnet101` and its like, built with transformers' own classes and random weights, no download.

Each factory takes nothing and returns an `nn.Module` in eval mode, the same weights every time; `factory.input_specs` says what `forward` takes.
Every large model has a `_tiny` sibling of the same classes for tests.

| factory | what it is |
|---|---|
| `resnet101` | ResNet-101, float32, 44.5 M parameters |
| `bert_large` | BERT-large, float32, 335 M parameters |
| `t5_large`, `t5_11b` | T5-large in float32, 738 M parameters; T5-11B in bf16, 22.6 GB |
| `llama_8b`, `llama_70b_half` | Llama-3.1-8B in bf16, 16.1 GB; 40 of the 80 layers of Llama-3.1-70B in bf16, 72.7 GB |

`factory.on_device("cuda:0")` builds the same module on a GPU without its weights ever being in the host's memory; the last four also have `laid()`: the module without its
weights, and what fills them one by one, in memory of the caller's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuopt.models.bert import bert_large, bert_large_tiny
    from gpuopt.models.llama import llama_8b, llama_8b_tiny, llama_70b_half, llama_70b_half_tiny
    from gpuopt.models.resnet import resnet101, resnet101_tiny
    from gpuopt.models.t5 import t5_11b, t5_11b_tiny, t5_large, t5_large_tiny

_HOMES = {
    "resnet101": "gpuopt.models.resnet",
    "resnet101_tiny": "gpuopt.models.resnet",
    "bert_large": "gpuopt.models.bert",
    "bert_large_tiny": "gpuopt.models.bert",
    "t5_large": "gpuopt.models.t5",
    "t5_large_tiny": "gpuopt.models.t5",
    "llama_8b": "gpuopt.models.llama",
    "llama_8b_tiny": "gpuopt.models.llama",
    "llama_70b_half": "gpuopt.models.llama",
    "llama_70b_half_tiny": "gpuopt.models.llama",
    "t5_11b": "gpuopt.models.t5",
    "t5_11b_tiny": "gpuopt.models.t5",
}

__all__ = [
    "bert_large",
    "bert_large_tiny",
    "llama_8b",
    "llama_8b_tiny",
    "llama_70b_half",
    "llama_70b_half_tiny",
    "resnet101",
    "resnet101_tiny",
    "t5_11b",
    "t5_11b_tiny",
    "t5_large",
    "t5_large_tiny",
]


def __getattr__(name: str) -> Any:
    """The factory, imported on first use: naming a model must not import transformers. Raises Unavailable where transformers is missing."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'gpuopt.models' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    try:
        return getattr(importlib.import_module(home), name)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "gpuopt"):
            raise
        from gpuopt.core.errors import Unavailable

        raise Unavailable(f"the reference models need the package {missing!r}: {error}", fix="pip install 'gpuopt[hf]'") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
