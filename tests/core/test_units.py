"""Text with units and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core import units
from gpuopt.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10ms", 0.01),
        ("1.5s", 1.5),
        ("2", 2.0),
        ("2min", 120.0),
        ("10m", 600.0),
        ("250 us", 250e-6),
        ("3µs", 3e-6),
        ("5ns", 5e-9),
        ("1h", 3600.0),
        ("1e-3s", 1e-3),
        (" 7 MS ", 7e-3),
    ],
)
def test_seconds_are_parsed(text: str, seconds: float) -> None:
    assert units.parse_seconds(text) == pytest.approx(seconds)


def test_a_bare_number_takes_the_callers_unit() -> None:
    assert units.parse_seconds("10", default="ms") == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 << 30), ("8GB", 8 * 10**9), ("512 MB", 512 * 10**6), ("1024", 1024), ("1.5KiB", 1536), ("8gib", 8 << 30), ("0B", 0)],
)
def test_bytes_are_parsed(text: str, num_bytes: int) -> None:
    assert units.parse_bytes(text) == num_bytes


def test_a_share_of_memory_needs_a_total() -> None:
    assert units.parse_bytes("50%", total=80 << 30) == 40 << 30
    with pytest.raises(UsageError):
        units.parse_bytes("50%")


@pytest.mark.parametrize(
    ("text", "flops"), [("300TFLOP/s", 3e14), ("300 Tflops", 3e14), ("1.2P", 1.2e15), ("5e12", 5e12), ("80 GFLOPs", 8e10)]
)
def test_flops_are_parsed(text: str, flops: float) -> None:
    assert units.parse_flops(text) == pytest.approx(flops)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("150%", 1.5), ("0", 0.0), ("100 %", 1.0)])
def test_shares_are_parsed(text: str, share: float) -> None:
    assert units.parse_fraction(text) == pytest.approx(share)


def test_a_share_that_could_be_percent_or_times_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        units.parse_fraction("5")
    assert caught.value.fix == "write 5%"


@pytest.mark.parametrize("text", ["", "ms", "-5ms", "5 parsecs", "nan", "inf", "1e999s", "5 5ms", "5m s", "0x10", "１０ parsecs"])
@pytest.mark.parametrize("parse", [units.parse_seconds, units.parse_bytes, units.parse_flops, units.parse_fraction])
def test_nonsense_is_a_usage_error_with_an_example(text: str, parse: object) -> None:
    if text == "5m s" and parse is units.parse_flops:
        return
    with pytest.raises(UsageError) as caught:
        parse(text)  # type: ignore[operator]
    assert caught.value.fix.startswith("write ")


@given(st.floats(1e-9, 119.0))
def test_a_printed_time_reads_back_to_four_digits(seconds: float) -> None:
    assert math.isclose(units.parse_seconds(units.format_seconds(seconds)), seconds, rel_tol=6e-4)


@given(st.integers(1, 1 << 55))
def test_a_printed_size_reads_back_to_four_digits(num_bytes: int) -> None:
    assert math.isclose(units.parse_bytes(units.format_bytes(num_bytes)), num_bytes, rel_tol=6e-4, abs_tol=1)  # whole bytes


@given(st.floats(1.0, 1e17))
def test_a_printed_rate_reads_back_to_four_digits(rate: float) -> None:
    assert math.isclose(units.parse_flops(units.format_flops_per_s(rate)), rate, rel_tol=6e-4)


@given(st.floats(1e-6, 10.0))
def test_a_printed_share_reads_back_to_four_digits(share: float) -> None:
    assert math.isclose(units.parse_fraction(units.format_fraction(share)), share, rel_tol=6e-4)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (units.format_seconds(0.0123449), "12.34 ms"),
        (units.format_seconds(0.99996), "1 s"),
        (units.format_seconds(0), "0 ns"),
        (units.format_seconds(3.2e-10), "0.32 ns"),
        (units.format_seconds(600), "10 min"),
        (units.format_bytes(1610612736), "1.5 GiB"),
        (units.format_bytes(1023), "1023 B"),
        (units.format_bytes_per_s(4.8e12), "4.8 TB/s"),
        (units.format_flops(1.56e10), "15.6 GFLOP"),
        (units.format_flops_per_s(9.89e14), "989 TFLOP/s"),
        (units.format_flops_per_s(1.979e15), "1979 TFLOP/s"),
        (units.format_count(44549160), "44.55 M"),
        (units.format_count(7), "7"),
        (units.format_fraction(0.0512), "5.12%"),
        (units.format_fraction(-0.5), "-50%"),
    ],
)
def test_figures_are_printed_with_four_digits(shown: str, text: str) -> None:
    assert shown == text
