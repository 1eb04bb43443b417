"""What is exported keeps its input names and its weights' names, and holds every size of its ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.programs.export import export


@dataclass
class Box:
    first: torch.Tensor


class Boxed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Box:
        return Box(x)


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None, *, scale: torch.Tensor | None = None) -> Any:
        y = self.inner(pixels)
        return {"y": y if scale is None else y * scale, "mask": mask}


def named(batch: int = 3) -> Inputs:
    specs = tuple(TensorSpec.parse(f"{name}:float32[N,4]") for name in ("pixels", "scale"))
    return Inputs(args=(torch.randn(batch, 4),), kwargs={"scale": torch.randn(batch, 4)}, specs=specs, dims={"N": batch})


def test_names_positions_and_keywords_are_kept() -> None:
    program = export(Named().eval(), named())
    assert program.graph_signature.user_inputs == ("pixels", "scale")
    assert set(program.module()(*named().args, **named().kwargs)) == {"y"}


def test_unnamed_and_repeated_inputs_get_names() -> None:
    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    specs = (TensorSpec.parse("float32[2]"), TensorSpec(name="class", dtype="float32", shape=(2,)))
    program = export(Two(), Inputs(args=(torch.ones(2), torch.ones(2)), specs=specs))
    assert program.graph_signature.user_inputs == ("input_0", "input_1")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_range_from_one_holds_whatever_batch_it_was_traced_with(batch: int) -> None:
    module = Named().eval()
    program = export(module, named(batch), {"N": (1, 16)})
    for n in (1, 2, 16):
        given = named(n)
        with torch.no_grad():
            assert torch.allclose(program.module()(*given.args, **given.kwargs)["y"], module(*given.args, **given.kwargs)["y"], atol=1e-6)


def test_an_exported_program_can_be_exported_again() -> None:
    module = Named().eval()
    first = torch.export.export(module, named().args, dict(named().kwargs))
    again = export(first.module(), named())
    given = named()
    with torch.no_grad():
        assert torch.allclose(again.module()(*given.args, **given.kwargs)["y"], module(*given.args, **given.kwargs)["y"], atol=1e-6)


def test_weights_keep_their_names_and_the_module_is_left_as_it_was() -> None:
    module = Named().eval()
    program = export(module, named(), {"N": (1, 16)})
    assert set(program.state_dict) == {"inner.weight", "inner.bias"} == set(module.state_dict())
    assert "forward" not in module.__dict__ and not module._forward_hooks


def test_a_forward_set_on_the_instance_is_used_and_put_back() -> None:
    module = Named().eval()
    module.forward = own = lambda pixels, scale: {"y": pixels - scale}  # type: ignore[method-assign,assignment,misc]
    program = export(module, named())
    given = named()
    assert torch.equal(program.module()(*given.args, **given.kwargs)["y"], given.args[0] - given.kwargs["scale"])
    assert module.forward is own


def test_a_forward_that_names_no_parameters_gets_the_names_of_the_specs() -> None:
    class Open(torch.nn.Module):
        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return args[0] * kwargs["scale"]

    program = export(Open(), named(), {"N": (1, 8)})
    assert program.graph_signature.user_inputs == ("pixels", "scale")
    given = named(5)
    assert torch.equal(program.module()(*given.args, **given.kwargs), given.args[0] * given.kwargs["scale"])


def test_a_hook_of_the_models_own_still_sees_its_own_output_class() -> None:
    module = Boxed()
    module.register_forward_hook(lambda _module, _args, out: Box(out.first + 1))
    given = Inputs(args=(torch.zeros(2),), specs=(TensorSpec.parse("x:float32[N]"),), dims={"N": 2})
    assert torch.equal(export(module, given).module()(torch.zeros(2))["first"], torch.ones(2))


def test_a_range_of_one_value_fixes_the_dimension_at_it() -> None:
    program = export(Named().eval(), named(3), {"N": (4, 4)})
    assert program.module()(*named(4).args, **named(4).kwargs)["y"].shape == (4, 4)
    with pytest.raises(AssertionError):
        program.module()(*named(3).args, **named(3).kwargs)
