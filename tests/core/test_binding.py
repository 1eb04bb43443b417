"""Call arguments find the inputs of an artifact by name, else by order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core.binding import bind, letters
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec

A, B, C = (torch.zeros(n) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A, B, C), {}),
        ((A, B), {"c": C}),
        ((A,), {"c": C, "b": B}),
        ((), {"c": C, "a": A, "b": B}),
        (((A, [B]),), {"c": C}),
        ((A,), {"mask": B, "other": C}),
        (({"first": A, "second": B}, None, True), {"c": C, "use_cache": False}),
    ],
)
def test_names_bind_first_and_the_rest_in_order(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    found = bind(["a", "b", "c"], args, kwargs)
    assert list(found) == ["a", "b", "c"]
    assert (found["a"], found["b"], found["c"]) == (A, B, C) or [t.shape[0] for t in found.values()] == [1, 2, 3]


def test_a_keyword_no_input_has_is_no_other_inputs_value() -> None:
    with pytest.raises(UsageError, match="position_ids") as told:
        bind(["ids", "mask", "types"], (), {"ids": A, "position_ids": B, "types": C})
    assert "mask" in (told.value.fix or "")
    # An exporter that renamed every input leaves no name to go by: then the order stands.
    assert list(bind(["arg0", "arg1"], (), {"ids": A, "mask": B})) == ["arg0", "arg1"]


def test_too_many_and_too_few_are_named() -> None:
    with pytest.raises(UsageError, match="has 1 inputs \\(a\\), it was given 2"):
        bind(["a"], (A, B), {})
    with pytest.raises(UsageError, match="input 'b' was not given"):
        bind(["a", "b"], (A,), {})


@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 4))
def test_the_order_of_keywords_does_not_matter(order: list[str], positional: int) -> None:
    names = ["a", "b", "c", "d"]
    tensors = {name: torch.zeros(i) for i, name in enumerate(names)}
    kwargs = {name: tensors[name] for name in order if name in names[positional:]}
    found = bind(names, tuple(tensors[name] for name in names[:positional]), kwargs)
    assert all(found[name] is tensors[name] for name in names)


def test_letters_follow_the_tensors_and_not_the_names() -> None:
    specs = tuple(TensorSpec(name=n, dtype="float32", shape=(letter,)) for n, letter in (("x", "N"), ("y", "S")))
    inputs = Inputs(args=(A,), kwargs={"b": B}, specs=specs)
    assert letters(["b", "a"], inputs) == {"b": ("S",), "a": ("N",)}
