"""The search for what has to stay in fp32, against models whose answer is known: sums of errors, overflows, and verdicts without any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.pipeline.sensitive import Found, Outcome, Unit, search


def leaves(*names: str, weight: float = 0.1) -> tuple[Unit, ...]:
    return tuple(Unit(name=name, weight=weight) for name in names)


def layered(blocks: int, parts: int) -> tuple[Unit, ...]:
    return tuple(
        Unit(name=f"layer.{b}", weight=1.0 * parts, children=tuple(Unit(name=f"layer.{b}.{p}", weight=1.0) for p in range(parts)))
        for b in range(blocks)
    )


def covered(name: str, kept: tuple[str, ...]) -> bool:
    return any(name == k or name.startswith(f"{k}.") for k in kept)


class Model:
    """Errors of single parts add up to the model's own; the limit is 1."""

    def __init__(self, errors: dict[str, float], limit: float = 1.0) -> None:
        self.errors, self.limit = errors, limit
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, kept: tuple[str, ...]) -> Outcome:
        self.asked.append(kept)
        error = sum(value for name, value in self.errors.items() if not covered(name, kept)) / self.limit
        return Outcome(passed=error <= 1, error=error)


def needed(found: Found, verdict: Callable[[tuple[str, ...]], Outcome]) -> None:
    """The definition of minimal: it passes, and without any one of it, it does not."""
    assert found.kept is not None and verdict(found.kept).passed
    for name in found.kept:
        assert not verdict(tuple(k for k in found.kept if k != name)).passed, f"{name} is not needed"


def test_a_precision_that_passes_keeps_nothing_and_takes_one_evaluation() -> None:
    found = search(layered(12, 4), Model({"layer.0.0": 0.5}))
    assert (found.kept, found.evaluations, found.is_minimal) == ((), 1, True)
    assert found.ranking == ()


def test_one_bad_part_of_many_layers_is_the_answer_and_no_more() -> None:
    model = Model({f"layer.{b}.{p}": 0.001 for b in range(24) for p in range(8)} | {"layer.17.3": 40.0})
    found = search(layered(24, 8), model, budget=64)
    assert found.kept == ("layer.17.3",)
    assert found.is_minimal and "no smaller set" in found.note
    assert found.ranking[0].module == "layer.17"
    assert found.evaluations == len(model.asked) == len(set(model.asked)) <= 64


def test_several_bad_parts_are_found_across_layers() -> None:
    bad = {"layer.2.1": 5.0, "layer.7.0": 3.0, "layer.7.3": 3.0}
    model = Model({f"layer.{b}.{p}": 0.001 for b in range(10) for p in range(4)} | bad)
    found = search(layered(10, 4), model, budget=80)
    assert found.kept == ("layer.2.1", "layer.7.0", "layer.7.3")
    needed(found, model)


def test_error_that_lies_between_the_parts_keeps_the_block_whole() -> None:
    """Attention scores are computed in the block's own forward: keeping its projections alone does not help."""

    def verdict(kept: tuple[str, ...]) -> Outcome:
        passed = "layer.3" in kept
        return Outcome(passed=passed, error=0.1 if passed else 9.0)

    found = search(layered(8, 4), verdict)
    assert found.kept == ("layer.3",) and found.is_minimal


def test_what_no_set_of_modules_can_mend_is_said() -> None:
    found = search(layered(4, 2), lambda kept: Outcome(passed=False, error=3.0))
    assert found.kept is None and found.outcome is None and not found.is_minimal
    assert "even with every module kept" in found.note


class Overflow:
    """Modules in order of execution whose results, or whose outputs in the narrow type, are too large."""

    def __init__(self, inside: set[str], handed_on: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.inside, self.handed_on, self.asked = inside, handed_on, 0

    def __call__(self, kept: tuple[str, ...]) -> Outcome:
        self.asked += 1
        for name in sorted(self.inside | self.handed_on):
            if name in self.inside and not covered(name, kept):
                return Outcome(passed=False, culprit=name)
            # Kept by itself, its output is still handed on in the narrow type; only a module around it helps.
            if name in self.handed_on and not covered(name.rpartition(".")[0], kept):
                return Outcome(passed=False, culprit=name)
        return Outcome(passed=True, error=0.2)


def test_overflow_is_followed_without_ranking_anything() -> None:
    model = Overflow({"layer.4.1", "layer.9.2"})
    found = search(layered(100, 6), model, budget=64)
    assert found.kept == ("layer.4.1", "layer.9.2")
    assert found.is_minimal
    assert model.asked == found.evaluations <= 6
    assert {row.module for row in found.ranking} == {"layer.4.1", "layer.9.2"}
    assert all(row.error is None for row in found.ranking)


def test_an_output_too_large_for_the_narrow_type_keeps_the_module_around_it() -> None:
    found = search(layered(30, 5), Overflow(set(), {"layer.12.2"}), budget=64)
    assert found.kept == ("layer.12",)
    assert found.is_minimal


def test_an_overflow_of_the_model_itself_ends() -> None:
    found = search(leaves("a", "b"), Overflow(set(), {"a"}), budget=64)
    assert found.kept is None


def test_a_culprit_nobody_can_keep_is_looked_for_around_it() -> None:
    """The first Inf may come from a module inside one that is never called by itself."""
    model = Overflow({"layer.1.0.hidden.deep"})
    found = search(layered(8, 2), model)
    assert found.kept == ("layer.1.0",)


def test_overflow_and_error_together_keep_both() -> None:
    def verdict(kept: tuple[str, ...]) -> Outcome:
        if not covered("layer.1.1", kept):
            return Outcome(passed=False, culprit="layer.1.1")
        error = 5.0 if not covered("layer.6.0", kept) else 0.5
        return Outcome(passed=error <= 1, error=error)

    found = search(layered(8, 3), verdict)
    assert found.kept == ("layer.1.1", "layer.6.0")
    needed(found, verdict)


def test_the_budget_is_kept_and_what_is_known_is_handed_back() -> None:
    errors = {f"layer.{b}.{p}": 1.0 for b in range(8) for p in range(6)}
    for budget in range(1, 40):
        model = Model(errors, limit=3.0)
        found = search(layered(8, 6), model, budget=budget)
        assert len(model.asked) == found.evaluations <= budget
        if found.kept is None:
            assert "none of which passed" in found.note
        else:
            assert Model(errors, limit=3.0)(found.kept).passed
        if not found.is_minimal:
            assert f"{budget} evaluations" in found.note


def test_time_that_is_over_ends_it_like_the_budget() -> None:
    model = Model({"a": 3.0, "b": 3.0})
    found = search(leaves("a", "b"), model, stop=lambda: len(model.asked) >= 2)
    assert found.evaluations == 2 and not found.is_minimal


def test_many_flat_layers_are_bisected_where_ranking_them_all_costs_too_much() -> None:
    errors = {f"m{i}": 0.0 for i in range(300)} | {"m120": 9.0}
    found = search(leaves(*errors), Model(errors), budget=40)
    assert found.kept is not None and "m120" in found.kept
    assert found.evaluations <= 40


def test_a_wrapper_of_one_module_is_opened_before_anything_is_ranked() -> None:
    tree = (Unit(name="model", weight=10.0, children=tuple(Unit(name=f"model.{i}", weight=1.0) for i in range(10))),)
    found = search(tree, Model({"model.4": 4.0}))
    assert found.kept == ("model.4",)
    assert {row.module for row in found.ranking} == {f"model.{i}" for i in range(10)}


def test_a_search_without_a_budget_is_a_mistake() -> None:
    with pytest.raises(ValueError):
        search(leaves("a"), Model({}), budget=0)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.floats(0, 3), min_size=12, max_size=12))
def test_for_errors_that_add_up_the_answer_is_minimal(values: list[float]) -> None:
    tree = layered(4, 3)
    names = [child.name for unit in tree for child in unit.children]
    model = Model(dict(zip(names, values, strict=True)))
    found = search(tree, model, budget=400)
    assert found.is_minimal
    needed(found, Model(model.errors))


@settings(max_examples=120, deadline=None)
@given(st.sets(st.integers(0, 8), min_size=1, max_size=4), st.sets(st.integers(0, 8), min_size=1, max_size=4))
def test_where_either_of_two_sets_will_do_one_of_them_is_found(one: set[int], other: set[int]) -> None:
    tree = layered(3, 3)
    names = [child.name for unit in tree for child in unit.children]
    wanted = [{names[i] for i in one}, {names[i] for i in other}]

    def verdict(kept: tuple[str, ...]) -> Outcome:
        missing = min(sum(not covered(name, kept) for name in names_of) for names_of in wanted)
        return Outcome(passed=missing == 0, error=float(missing) + 1 if missing else 0.5)

    found = search(tree, verdict, budget=400)
    needed(found, verdict)
    assert set(found.kept or ()) in [w for w in wanted] or len(found.kept or ()) <= max(len(w) for w in wanted)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_verdicts_without_any_order_never_give_a_set_that_fails(data: st.DataObject) -> None:
    """Errors that cancel each other: keeping more may be worse. What is handed back was evaluated, and passed."""
    names = ["a", "b", "c", "d"]
    table = {frozenset(chosen): data.draw(st.booleans()) for count in range(5) for chosen in itertools.combinations(names, count)}
    found = search(leaves(*names), lambda kept: Outcome(passed=table[frozenset(kept)], error=None), budget=data.draw(st.integers(1, 20)))
    assert found.evaluations <= 20
    if found.kept is not None:
        assert table[frozenset(found.kept)]
        if found.is_minimal:
            assert all(not table[frozenset(found.kept) - {name}] for name in found.kept)
