"""Linear layer -> GELU, as one op that cuBLASLt runs as one product with the activation in its epilogue.

The epilogue is the tanh form. Where the model's own GELU is the erf form this is an approximation, at most 4.8e-4 an element; where it is the tanh form, none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from gpuopt.converters.blocks import DROPOUTS, Block, blocks
from gpuopt.core.errors import Unsupported
from gpuopt.core.live import Inputs
from gpuopt.programs.ops.linear_gelu import linear_gelu

WHAT = "linear layer + GELU as one product, the tanh form of GELU in its epilogue"
APPROXIMATE = True
SETTINGS: tuple[str, ...] = ("tanh",)
NEEDS_SETTING = True

_OF_TRANSFORMERS = {
    "GELUActivation": "erf",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}
"""Classes of transformers.activations -> their form; tanh is written out in some of them."""
_NONE = "no linear layer is read by a GELU alone in a forward that FX can follow"


class LinearGELU(nn.Module):
    """A linear layer's weights and the GELU after it. [..., K] -> [..., N]."""

    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        if linear.bias is not None:
            self.bias = linear.bias
        else:
            self.register_buffer("bias", linear.weight.new_zeros(linear.out_features).detach())
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return linear_gelu(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


def applies(module: nn.Module) -> str | None:
    """None where a linear layer would be fused with its GELU; else why not."""
    if not any(type(part) is nn.Linear for part in module.modules()):
        return "there is no linear layer"
    for block in blocks(module, nn.Linear, _is_leaf):
        if next(_matches(block, DROPOUTS), None) is not None:
            return None
    return _NONE


def apply(module: nn.Module, setting: str | None, inputs: Inputs | None) -> str:
    """Fuse in place; returns how many layers and which forms of GELU they had. Raises Unsupported where nothing fuses."""
    forms: Counter[str] = Counter()
    for block in blocks(module, nn.Linear, _is_leaf):
        found = list(_matches(block))
        forms.update(form for _, _, form in found)
        if any([_fuse(block, linear, gelu) for linear, gelu, _ in found]):
            block.rewrite()
    if not forms:
        raise Unsupported(f"nothing to fuse: {_NONE}", fix="leave --rewrite gelu_epilogue out")
    erf, tanh = forms["erf"], forms["tanh"]
    exact = (
        f"{tanh} of them had the tanh form before"
        if tanh
        else "each had the erf form before: an approximation of at most 4.8e-4 an element"
    )
    return f"{erf + tanh} linear layers fused with their GELU, tanh form; {exact}"


def _matches(block: Block, through: tuple[type[nn.Module], ...] = ()) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    """(linear layer, GELU, its form)."""
    taken: set[fx.Node] = set()
    for node in block.graph.nodes:
        form = _gelu_form(block, node)
        if form is None or not node.args:
            continue
        linear = block.source(node.args[0], through)
        layer = block.layer(linear)
        if type(layer) is nn.Linear and len(linear.args) == 1 and block.is_own(linear) and linear not in taken:
            taken.add(linear)
            yield linear, node, form


def _gelu_form(block: Block, node: fx.Node) -> str | None:
    """`erf` or `tanh`; None for anything else."""
    layer: Any = block.layer(node)
    if type(layer) is nn.GELU:
        return "tanh" if layer.approximate == "tanh" else "erf"
    if layer is not None:
        return _form_of(layer)
    if node.op == "call_function" and node.target is F.gelu:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "erf", "tanh": "tanh"}.get(str(approximate))
    return None


def _form_of(module: nn.Module) -> str | None:
    cls = type(module)
    return _OF_TRANSFORMERS.get(cls.__name__) if cls.__module__ == "transformers.activations" else None


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, LinearGELU) or _form_of(module) is not None


def _fuse(block: Block, linear: fx.Node, gelu: fx.Node) -> bool:
    """Exchange the modules; True where the block's forward has to follow its graph from now on."""
    path = str(linear.target)
    layer = block.module.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    block.module.set_submodule(path, LinearGELU(layer))
    if block.is_own(gelu):
        block.module.set_submodule(str(gelu.target), nn.Identity())
    else:
        gelu.replace_all_uses_with(gelu.args[0])  # type: ignore[arg-type]  # a matched GELU's first argument is a node
        block.graph.erase_node(gelu)
        return True
    return False
