"""Flattening is complete and in order; errors agree with fp64 arithmetic done by hand."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.accuracy import compare
from gpuopt.core import codec

T = torch.tensor


def names(outputs: Any) -> list[str]:
    return [name for name, _ in compare.flatten(outputs)]


@dataclasses.dataclass
class Held:
    logits: Any
    hidden: Any = None


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (T(1.0), ["output"]),
        ((T(1.0), T(2.0)), ["0", "1"]),
        ([T(1.0), (T(2.0), [T(3.0)])], ["0", "1.0", "1.1.0"]),
        ({"b": T(1.0), "a": {"c": T(2.0)}}, ["b", "a.c"]),
        (Held(logits=T(1.0), hidden=(T(1.0), None)), ["logits", "hidden.0"]),
        (Point(T(1.0), T(2.0)), ["x", "y"]),
        ((None, "text", T(1.0), b"raw"), ["2"]),
        (3.5, ["output"]),
        ({"loss": 2, "done": True}, ["loss", "done"]),
        ((), []),
        (object(), []),
        (None, []),
    ],
)
def test_outputs_of_any_nesting_get_dotted_names_in_order(outputs: Any, expected: list[str]) -> None:
    assert names(outputs) == expected


def test_numbers_keep_their_kind() -> None:
    found = dict(compare.flatten({"f": 2.5, "i": 3, "b": True, "n": numpy.float32(1.5)}))
    assert [found[k].dtype for k in "fib"] == [torch.float32, torch.int64, torch.bool]
    assert float(found["n"]) == 1.5


def test_an_object_that_holds_itself_ends() -> None:
    loop: list[Any] = [T(1.0)]
    loop.append(loop)
    assert names(loop) == ["0"]


def test_the_same_tensor_twice_is_two_outputs() -> None:
    x = T(1.0)
    assert names((x, x, [x])) == ["0", "1", "2.0"]


def test_transformers_outputs_and_caches_are_flattened_by_layer() -> None:
    transformers = pytest.importorskip("transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.full((1, 1, 2, 3), float(layer)), torch.ones(1, 1, 2, 3), layer)
    value = outputs.CausalLMOutputWithPast(logits=torch.ones(1, 2), past_key_values=cache)
    found = compare.flatten(value)
    assert [n for n, _ in found] == [
        "logits",
        "past_key_values.0.keys",
        "past_key_values.0.values",
        "past_key_values.1.keys",
        "past_key_values.1.values",
    ]
    assert float(found[3][1].mean()) == 1.0
    both = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    assert names({"past_key_values": both})[0] == "past_key_values.self_attention_cache.0.keys"


def row(reference: torch.Tensor, candidate: torch.Tensor, twin: torch.Tensor | None = None) -> Any:
    (found,) = compare.compare([("y", reference)], [("y", candidate)], [("y", twin)] if twin is not None else None)
    codec.to_json(found)  # nothing in it is NaN or Inf
    return found


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(0, 2**31))
def test_errors_agree_with_numpy_in_fp64(values: list[float], seed: int) -> None:
    reference = numpy.array(values)
    noise = numpy.random.default_rng(seed).normal(0, 1, len(values))
    candidate = reference + noise
    found = row(torch.from_numpy(reference), torch.from_numpy(candidate))
    error = candidate - reference
    assert math.isclose(found.rmse, math.sqrt((error**2).mean()), rel_tol=1e-9)
    assert math.isclose(found.rms_reference, math.sqrt((reference**2).mean()), rel_tol=1e-9)
    assert math.isclose(found.max_abs, abs(error).max(), rel_tol=1e-9)
    if found.rms_reference > 1e-100:
        assert math.isclose(found.relative_rmse, found.rmse / found.rms_reference, rel_tol=1e-12)
        assert math.isclose(found.snr_db, -20 * math.log10(found.relative_rmse), rel_tol=1e-6, abs_tol=1e-9)
        expected = (reference * candidate).sum() / math.sqrt((reference**2).sum() * (candidate**2).sum())
        assert math.isclose(found.cosine, expected, abs_tol=1e-9)


def test_sums_over_several_chunks_are_the_sums_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 11, 13, dtype=torch.float64, generator=generator)
    candidate = (reference + 0.01 * torch.randn(7, 11, 13, dtype=torch.float64, generator=generator)).to(torch.bfloat16)
    whole = row(reference, candidate)
    monkeypatch.setattr(compare, "CHUNK", 10)
    parts = row(reference, candidate)
    assert parts.rmse == pytest.approx(whole.rmse, rel=1e-12)
    assert (parts.max_abs, parts.num_nonfinite) == (whole.max_abs, whole.num_nonfinite)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_values_whose_squares_leave_fp64_are_measured_all_the_same(scale: float) -> None:
    reference = T([1.0, 2.0, -3.0], dtype=torch.float64) * scale
    found = row(reference, reference * 1.01)
    assert found.relative_rmse == pytest.approx(0.01)


def test_a_transposed_or_strided_output_is_compared_by_its_values() -> None:
    reference = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    assert row(reference, reference.t().contiguous().t().float()).rmse == 0
    assert row(reference[:, ::2], reference.float()[:, ::2]).rmse == 0


def test_complex_outputs_are_compared_as_pairs_of_reals() -> None:
    reference = T([1 + 1j, 2 - 1j], dtype=torch.complex128)
    assert row(reference, (reference + 0.1).to(torch.complex64)).rmse == pytest.approx(0.1 / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_outputs_are_compared_too(shape: tuple[int, ...]) -> None:
    found = row(torch.ones(shape, dtype=torch.float64), torch.ones(shape))
    assert found.passed and found.rmse == 0 and found.shape == shape


def test_a_zero_reference_has_no_relative_error() -> None:
    found = row(torch.zeros(4, dtype=torch.float64), torch.ones(4))
    assert (found.relative_rmse, found.snr_db, found.cosine, found.rmse) == (None, None, None, 1.0)


@pytest.mark.parametrize(
    ("reference", "candidate", "word"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "shape"),
        (torch.ones(2, 3), torch.ones(1, 2, 3), "shape"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), "dtype"),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32), "dtype"),
        (torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.uint8), "dtype"),
        (T([1, 2, 3]), T([1, 2, 4]), "1 of 3"),
        (T([True, False]), T([False, True]), "2 of 2"),
    ],
)
def test_what_must_be_equal_and_is_not_fails_with_the_reason(reference: torch.Tensor, candidate: torch.Tensor, word: str) -> None:
    found = row(reference, candidate)
    assert not found.passed and word in found.reason


def test_equal_integers_pass_and_count_no_mismatch() -> None:
    found = row(T([1, 2]), T([1, 2]))
    assert found.passed and found.exact_mismatches == 0 and found.rmse is None


def test_another_float_type_than_eager_gives_is_a_failure() -> None:
    reference = torch.ones(4, dtype=torch.float64)
    assert row(reference, reference.half(), reference.half()).passed
    found = row(reference, reference.float(), reference.half())
    assert not found.passed and "float32 where eager gives float16" in found.reason


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("reference", "candidate", "passed"),
    [
        ([1.0, nan, 2.0], [1.0, nan, 2.0], True),
        ([1.0, inf, -inf], [1.0, inf, -inf], True),
        ([1.0, 2.0], [1.0, nan], False),
        ([1.0, nan], [1.0, 2.0], False),
        ([1.0, inf], [1.0, -inf], False),
        ([1.0, inf], [1.0, nan], False),
        ([nan, 1.0], [1.0, nan], False),
    ],
)
def test_nan_and_inf_must_be_where_and_what_they_are_in_the_reference(reference: list[float], candidate: list[float], passed: bool) -> None:
    found = row(T(reference, dtype=torch.float64), T(candidate))
    assert found.passed is passed
    assert found.num_nonfinite == sum(not math.isfinite(x) for x in candidate)
    assert found.num_nonfinite_reference == sum(not math.isfinite(x) for x in reference)
    assert found.rmse == 0


def test_a_dtype_too_narrow_for_the_model_is_said_so() -> None:
    reference = T([1e6, 1.0], dtype=torch.float64)
    found = row(reference, reference.half(), reference.half())
    assert not found.passed and "too narrow" in found.reason


def test_the_twin_is_measured_against_the_same_reference() -> None:
    reference = torch.zeros(4, dtype=torch.float64) + 1
    found = row(reference, torch.full((4,), 1.3), torch.full((4,), 1.1))
    assert found.twin_rmse == pytest.approx(0.1, rel=1e-6)
    assert found.ratio == pytest.approx(3.0, rel=1e-5)


A, B = torch.full((2,), 1.0), torch.full((2,), 2.0)


def test_outputs_pair_by_name_where_names_agree_and_by_order_where_they_do_not() -> None:
    reference = [("a", A.double()), ("b", B.double())]
    assert all(r.rmse == 0 for r in compare.compare(reference, [("b", B), ("a", A)]))
    assert all(r.rmse == 0 for r in compare.compare(reference, [("onnx::1", A), ("onnx::2", B)]))
    swapped = compare.compare(reference, [("onnx::1", B), ("onnx::2", A)])
    assert [r.rmse for r in swapped] == [1.0, 1.0]
    assert [r.name for r in swapped] == ["a", "b"]


def test_a_missing_or_additional_output_is_a_failure_that_names_it() -> None:
    reference = [("a", A), ("b", B)]
    (lost,) = compare.compare(reference, [("a", A)])
    assert not lost.passed and lost.name == "b" and "missing" in lost.reason
    (extra,) = compare.compare([("a", A)], reference)
    assert not extra.passed and "only in the candidate" in extra.reason
    assert all(not r.passed for r in compare.compare(reference, []))


def test_identical_means_bits() -> None:
    x = T([1.0, nan, -0.0])
    assert compare.identical([("y", x)], [("y", x.clone())])
    assert not compare.identical([("y", x)], [("y", T([1.0, nan, 0.0]))])
    assert not compare.identical([("y", x)], [("z", x)])
    assert not compare.identical([("y", x)], [("y", x.double())])
    assert compare.identical([("y", T([1 + 2j]))], [("y", T([1 + 2j]))])
    assert compare.identical([("y", T(1)), ("z", torch.ones(0))], [("y", T(1)), ("z", torch.ones(0))])
    assert compare.identical([("y", torch.ones(2, 3, dtype=torch.bool).t())], [("y", torch.ones(3, 2, dtype=torch.bool))])


def test_spread_is_the_rms_difference_of_two_calls() -> None:
    first = [("a", A), ("i", T([1]))]
    assert compare.spread(first, [("a", A + 0.5), ("i", T([1]))]) == {"a": pytest.approx(0.5)}
