"""When streaming is the wrong tool, the plan says so, and its numbers are right."""

import re

import pytest

from gpuopt.core import units
from gpuopt.core.streaming import Anatomy, Calibration, Place, StreamSpec, Unit
from gpuopt.streaming.advice import tokens_in_flight
from gpuopt.streaming.planner import plan

GB = 10**9
SIZE = 436_207_616


def blocks(num=32, dtype="bfloat16", itemsize=2):
    def unit(index):
        place = Place(name=f"l.{index}.w", dtype=dtype, shape=(SIZE // itemsize,), stride=(1,), offset=0, num_bytes=SIZE)
        return Unit(name=f"l.{index}", ring="l", order=index, num_bytes=SIZE, places=(place,))

    return Anatomy(units=tuple(unit(i) for i in range(num)), fixed={"head": 2 * GB})


def advice(anatomy=None, share=0.5, compute_ms=0.5, workload="decode N=1 S=1 past=512", spec=None, **changes):
    anatomy = anatomy or blocks()
    known = {"device": "d", "link_bytes_per_s": 55e9, "pageable_bytes_per_s": 9e9, "workload": workload}
    calibration = Calibration(**{**known, "compute_ms": {u.name: compute_ms for u in anatomy.units}, **changes})
    found = plan(anatomy, spec or StreamSpec(budget_share=share), calibration, available_host_bytes=None)
    return found, "\n".join(found.advice)


def test_decode_at_batch_one_is_said_to_be_bound_by_the_link_with_its_tokens_a_second():
    found, said = advice()
    assert "bound by the link" in said and f"{found.link_ms / found.compute_ms:.1f} times" in said
    rate = float(re.search(r"([\d.]+) tokens/s", said)[1])
    assert rate == pytest.approx(1e3 / found.predicted_ms, rel=1e-3)


def test_below_three_times_the_compute_nothing_is_called_bound_by_the_link():
    found, said = advice(compute_ms=2.5)
    assert 1 < found.link_ms / found.compute_ms < 3 and "bound by the link" not in said


def test_the_tokens_that_would_balance_a_prefill_do_balance_it():
    found, said = advice(compute_ms=1.0, workload="prefill N=1 S=512")
    tokens = units_of(re.search(r"about ([\d.]+ ?k?) tokens", said)[1])
    assert 32 * 1.0 * tokens / 512 == pytest.approx(found.link_ms, rel=0.01)


def test_of_a_decode_the_balance_comes_from_the_rate_of_products_and_without_one_nothing_is_guessed():
    found, said = advice(flops_per_s=600e12)
    tokens = units_of(re.search(r"about ([\d.]+ ?k?) tokens", said)[1])
    elements = 32 * SIZE / 2
    assert tokens * 2 * elements / 600e12 * 1e3 == pytest.approx(found.link_ms, rel=0.01)
    # f F / B, the rule of thumb: half of a bf16 model over 55 GB/s at 600 TFLOP/s.
    assert tokens == pytest.approx(found.streamed_bytes / (32 * SIZE) * 600e12 / 55e9, rel=0.01)
    assert "balance" not in advice()[1]


def units_of(text):
    number, _, suffix = text.partition(" ")
    return float(number) * (1000 if suffix == "k" else 1)


@pytest.mark.parametrize(("share", "words"), [(0.75, "in fp8"), (0.5, "in int4"), (0.25, "even in int4")])
def test_the_format_that_would_fit_is_the_first_that_does(share, words):
    assert words in advice(share=share)[1]


def test_weights_that_are_small_already_are_not_quantised_again():
    assert "fp8" not in advice(blocks(dtype="float8_e4m3fn", itemsize=1), share=0.75)[1]
    assert "int4" not in advice(blocks(dtype="int8", itemsize=1))[1]


def test_so_many_devices_hold_everything_and_one_fewer_does_not():
    found, said = advice(activation_bytes=GB, spec=StreamSpec(budget_bytes=9 * GB))
    count = int(re.search(r"(\d+) devices with this budget", said)[1])
    whole = found.ledger.fixed + 32 * SIZE
    each = found.budget_bytes / 1.05 - GB
    assert count * each >= whole > (count - 1) * each


def test_copies_that_hide_behind_compute_need_no_larger_budget():
    found, said = advice(compute_ms=20, workload="prefill N=1 S=16384")
    assert found.stall_ms < 0.02 * found.compute_ms and "a larger budget gains nothing" in said and "bound by the link" not in said


def test_what_waits_outside_locked_memory_is_counted():
    found, said = advice(spec=StreamSpec(budget_share=0.3, pin_limit_bytes=5 * GB))
    count = sum(1 for home in found.homes.values() if home == "pageable")
    assert f"{count} of {len(found.homes)} streamed units wait in memory that is not locked, at 9 GB/s" in said
    assert "a rate that was not measured" in advice(spec=StreamSpec(budget_share=0.3, pin_limit_bytes=5 * GB, disk="d"))[1]


def test_without_measured_compute_the_plan_says_what_it_does_not_know():
    assert "no unit's compute was measured" in advice(compute_ms=0.0)[1]


@pytest.mark.parametrize(
    ("workload", "tokens"),
    [("decode N=1 S=1 past=512", 1), ("prefill N=2 S=4096", 8192), ("decode N=64", 64), ("", None), ("vectors", None), ("NS=3", None)],
)
def test_a_workload_names_its_tokens(workload, tokens):
    assert tokens_in_flight(workload) == tokens


def test_figures_are_said_in_units_that_read_back():
    _, said = advice()
    assert units.parse_bytes(re.search(r"bound by the link: ([\d.]+ GiB)", said)[1]) > 0


def test_where_queueing_takes_longer_than_computing_the_host_is_named():
    anatomy = blocks()
    host = {unit.name: 0.5 for unit in anatomy.units}
    fast = {"host_ms": host, "link_bytes_per_s": 1e12}
    found, said = advice(anatomy, share=0.85, compute_ms=0.15, **fast)
    assert found.compute_ms == pytest.approx(16.0) and "C is the host's: to queue a forward takes 16" in said
    assert "the host's" not in advice(anatomy, share=0.85, compute_ms=0.5, **fast)[1]
    assert "the host's" not in advice(anatomy, share=0.85, compute_ms=0.15, host_ms=host)[1], "hidden behind the link"
