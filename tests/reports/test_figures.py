"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.reports import figures as f


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 ms"),
        (0.00085, "850 ns"),
        (0.85, "850 µs"),
        (0.9997, "1.00 ms"),
        (12.857, "12.9 ms"),
        (999.6, "1.00 s"),
        (2100, "2.10 s"),
        (125_000, "2 min 5 s"),
        (None, "—"),
    ],
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert f.ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(15.6e9, "15.6 GFLOP"), (999.7e9, "1.00 TFLOP"), (744e3, "744 kFLOP"), (12, "12.0 FLOP"), (0, "0 FLOP"), (None, "—")],
)
def test_flops(value: float | None, text: str) -> None:
    assert f.si(value, "FLOP") == text


@pytest.mark.parametrize(
    ("value", "text"), [(41.4, "41%"), (4.14, "4.1%"), (9.96, "10%"), (0.03, "<0.1%"), (0, "0%"), (105, "105%"), (None, "—")]
)
def test_percent(value: float | None, text: str) -> None:
    assert f.percent(value) == text


@pytest.mark.parametrize(("value", "text"), [(1.0, "100%"), (0.9999, "99.9%"), (0.996, "99.6%"), (0.5, "50%")])
def test_only_all_is_a_hundred_percent(value: float, text: str) -> None:
    assert f.share(value) == text


@pytest.mark.parametrize(
    ("values", "title", "first"),
    [([311.0, 0.5], "TFLOP/s", "311"), ([0.0514, 0.02], "GFLOP/s", "51.4"), ([0.000514], "MFLOP/s", "514"), ([None], "TFLOP/s", None)],
)
def test_a_column_of_rates_has_one_unit_in_which_its_largest_is_readable(values: list[float | None], title: str, first: str | None) -> None:
    found, scale = f.tflops_column(values)
    assert found == title
    assert first is None or f.digits((values[0] or 0.0) * scale) == first


@given(st.floats(1e-9, 1e9))
def test_three_digits_are_within_half_a_percent_and_never_an_exponent(value: float) -> None:
    text = f.digits(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.0051)


@given(st.floats(1e-6, 1e7), st.floats(1e-6, 1e7))
def test_times_print_in_an_order_that_agrees(a: float, b: float) -> None:
    scales = {"ns": 1e-6, "µs": 1e-3, "ms": 1.0, "s": 1e3}

    def read(text: str) -> float:
        words = text.split()
        if "min" in words:
            return float(words[0]) * 60e3 + float(words[2]) * 1e3
        return float(words[0]) * scales[words[1]]

    low, high = sorted((a, b))
    assert read(f.ms(low)) <= read(f.ms(high)) * (1 + 1e-12)


@given(st.text())
def test_clean_text_is_one_line_without_controls_and_cleaning_again_changes_nothing(text: str) -> None:
    shown = f.clean(text)
    assert "\n" not in shown
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x202E for c in shown)
    assert f.clean(shown) == shown
