"""Figures as they are read: three digits, a unit, the right number of words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.doctor import words


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.0, "0 ms"), (0.00284, "2.84 µs"), (0.9999, "1 ms"), (1.0, "1 ms"), (13.87, "13.9 ms"), (804.0, "804 ms"), (999.97, "1 s"), (1234.0, "1.23 s"),
     (90_000.0, "90 s"), (120_000.0, "2 min"), (2e-7, "0.2 ns"), (-1.5, "-1.5 ms")],
)  # fmt: skip
def test_times_have_three_digits_and_the_unit_that_suits_them(milliseconds: float, text: str) -> None:
    assert words.ms(milliseconds) == text


@given(st.floats(1e-5, 1e8))
def test_no_time_is_written_with_an_exponent_or_off_by_more_than_its_rounding(milliseconds: float) -> None:
    number, unit = words.ms(milliseconds).split()
    scale = {"ns": 1e-6, "µs": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4}[unit]
    assert "e" not in number and float(number) * scale == pytest.approx(milliseconds, rel=6e-3, abs=5e-6 * 1e-2)


@pytest.mark.parametrize(
    ("part", "text"),
    [(0.0, "0%"), (0.0004, "<0.1%"), (0.0833, "8.3%"), (0.05, "5%"), (0.6216, "62%"), (0.0996, "10%"), (1.0, "100%"), (1.2, "100%")],
)
def test_shares_have_two_digits_and_end_at_a_whole(part: float, text: str) -> None:
    assert words.share(part) == text


def test_one_is_one_and_the_rest_are_many() -> None:
    assert (words.number(1, "layer"), words.number(2, "layer"), words.number(0, "layer")) == ("1 layer", "2 layers", "0 layers")
    assert (words.number(1.5, "copy", "copies"), words.number(4097, "kernel")) == ("1.5 copies", "4097 kernels")
    assert words.number(0.9997, "FLOP") == "1 FLOP"
    assert (words.times(1), words.times(24), words.times(0.5)) == ("once", "24 times", "0.5 times")


def test_names_are_cut_after_the_third() -> None:
    assert words.listed(["a", "", "c", "d", "e"]) == "a, the root, c and 2 more"
    assert words.listed(["a"]) == "a"
