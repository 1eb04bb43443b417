"""Where two curves cross, what is the cause, what memory allows: against curves whose answers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.core import stats
from gpuopt.core.result import Device, Run, Waterfall, WaterfallPart
from gpuopt.core.sweep import Versus
from gpuopt.pipeline import crossing

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CPU = Device(id="cpu", name="CPU", kind="cpu", memory_bytes=100, free_bytes=80)
GPU = Device(id="cuda:0", name="GPU", kind="cuda", memory_bytes=1000, free_bytes=1000)


def versus(batch: int, ratio: float, *, threshold: float = 0.02) -> Versus:
    verdict = "faster" if ratio > 1 + threshold else "slower" if ratio < 1 / (1 + threshold) else "same"
    return Versus(batch=batch, ratio=ratio, low=ratio, high=ratio, verdict=verdict)


def lines(first: tuple[float, float], second: tuple[float, float], batches: tuple[int, ...] = BATCHES) -> list[Versus]:
    """Two devices that take `fixed + each * batch` a call."""
    return [versus(n, (first[0] + first[1] * n) / (second[0] + second[1] * n)) for n in batches]


cost = st.floats(min_value=1e-3, max_value=1e3)


@given(fixed=cost, extra=cost, each=cost, less=st.floats(min_value=0.01, max_value=0.9), scale=st.floats(min_value=1e-3, max_value=1e3))
def test_the_crossover_is_bracketed_by_batches_of_either_winner_and_changes_with_nothing_but_the_ratio(
    fixed: float, extra: float, each: float, less: float, scale: float
) -> None:
    """A GPU that costs `extra` a call more and a share `less` of each sample crosses at extra / (each * (1 - less)), wherever that lies."""
    truth = extra / (each * (1 - less))
    points = lines((fixed, each), (fixed + extra, each * less))
    found = crossing.cross("cpu", "cuda:0", points)
    wins = [p.batch for p in points if p.verdict == "faster"]
    loses = [p.batch for p in points if p.verdict == "slower"]
    assert all(n > truth for n in wins) and all(n < truth for n in loses)
    if found.verdict == "crosses":
        assert found.between == (max(loses), min(wins)) and found.winner == "cuda:0"
        assert found.from_batch is not None and max(loses) < found.from_batch <= min(wins)
        assert found.interpolated == (found.from_batch not in BATCHES)
    else:
        assert not (wins and loses)
        assert found.verdict == {(True, False): "second", (False, True): "first"}.get((bool(wins), bool(loses)), found.verdict)
        assert found.from_batch is None
    scaled = crossing.cross("cpu", "cuda:0", lines((fixed * scale, each * scale), ((fixed + extra) * scale, each * less * scale)))
    if all(abs(math.log(p.ratio)) > 0.03 for p in points):  # what lies on the threshold may round to either side
        assert (scaled.verdict, scaled.between) == (found.verdict, found.between)


@given(extra=st.floats(min_value=0.5, max_value=100), less=st.floats(min_value=0.0, max_value=0.5))
def test_interpolation_between_powers_of_two_lands_near_the_truth(extra: float, less: float) -> None:
    truth = extra / (1 - less)
    found = crossing.cross("a", "b", lines((0.0, 1.0), (extra, less)))
    if found.verdict == "crosses":
        assert found.from_batch is not None
        assert truth / 1.35 - 1 <= found.from_batch <= truth * 1.35 + 1


@given(st.lists(st.floats(min_value=0.1, max_value=10), min_size=1, max_size=8), st.randoms())
def test_order_of_the_points_does_not_matter_and_swapping_the_devices_swaps_the_answer(ratios: list[float], random: object) -> None:
    points = [versus(2**i, r) for i, r in enumerate(ratios)]
    shuffled = list(points)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one = crossing.cross("a", "b", points)
    assert crossing.cross("a", "b", shuffled) == one
    other = crossing.cross("a", "b", [versus(p.batch, 1 / p.ratio) for p in points])
    flipped = {"first": "second", "second": "first"}.get(one.verdict, one.verdict)
    assert (other.verdict, other.between) == (flipped, one.between)
    assert {one.winner, other.winner} in ({None}, {"a", "b"})


def test_one_swap_back_is_no_single_crossover_and_undecided_batches_decide_nothing() -> None:
    assert crossing.cross("a", "b", [versus(1, 0.5), versus(2, 2.0), versus(4, 0.5)]).verdict == "several"
    assert crossing.cross("a", "b", []).verdict == "undecided"
    assert crossing.cross("a", "b", [versus(1, 1.0), versus(2, 1.001)]).verdict == "same"
    unclear = replace(versus(2, 1.4), verdict="inconclusive")
    assert crossing.cross("a", "b", [unclear]).verdict == "undecided"
    found = crossing.cross("a", "b", [versus(1, 0.5), unclear, versus(4, 2.0)])
    assert found.between == (1, 4) and found.from_batch == 2 and not found.interpolated


def test_between_neighbouring_batches_the_second_is_measured_and_not_interpolated() -> None:
    found = crossing.cross("a", "b", [versus(3, 0.9), versus(4, 1.5)])
    assert (found.from_batch, found.interpolated) == (4, False)


# --- causes


def run(device: str, batch: int, ms: float, **more: object) -> Run:
    """Six blocks of two calls each."""
    samples = tuple(round(ms * 1e6) + i for i in range(12))
    fields = {"model": "m", "backend": "eager", "precision": "fp32", "batch": batch, "dims": {"N": batch}, "device": device, **more}
    return Run(latency_ms=stats.summarize(samples), samples_ns=samples, block_sizes=(2,) * 6, samples_per_s=batch / ms * 1e3, **fields)  # type: ignore[arg-type]


def fall(wall: float, **parts: float) -> Waterfall:
    names = {"gaps": "launch gaps", "python": "python and framework", "copies": "host-to-device (pageable)", "compute": "other compute"}
    return Waterfall(wall_ms=wall, parts=tuple(WaterfallPart(name=names[k], ms=v) for k, v in parts.items()), unaccounted_ms=0.0)


def crossed(cpu_ms: float, gpu_ms: float, waterfall: Waterfall | None) -> object:
    runs = [run("cpu", 1, cpu_ms), run("cuda:0", 1, gpu_ms), run("cpu", 8, 8 * cpu_ms), run("cuda:0", 8, gpu_ms)]
    explained = {(*crossing.key(runs[1]), 1): crossing.shares(waterfall)} if waterfall is not None else {}
    (found,) = crossing.crossovers(runs, [CPU, GPU], explained)  # type: ignore[arg-type]
    assert found.verdict == "crosses"
    return found.cause


@pytest.mark.parametrize(
    ("waterfall", "kind", "share"),
    [
        (fall(2.0, gaps=1.8, compute=0.2), "launches", 0.9),
        (fall(2.0, gaps=0.2, python=1.5, compute=0.3), "waits", 0.85),
        (fall(2.0, gaps=0.1, copies=1.4, compute=0.5), "copies", 0.7),
        (fall(2.0, gaps=0.4, compute=1.6), "", 0.0),  # it would lose without them too
        (fall(2.0, compute=2.0), "", 0.0),
        (None, "", 0.0),
    ],
)
def test_a_cause_is_named_only_where_taking_it_away_would_make_the_loser_win(waterfall: Waterfall | None, kind: str, share: float) -> None:
    cause = crossed(1.0, 2.0, waterfall)
    assert (getattr(cause, "kind", ""), getattr(cause, "share", 0.0)) == (kind, pytest.approx(share))
    if kind:
        assert cause.device == "cuda:0" and cause.without_ms < cause.other_ms  # type: ignore[attr-defined]


def test_a_cause_is_that_of_the_candidate_with_the_same_options_and_no_others() -> None:
    runs = [
        run(device, n, ms, backend="ort", options={"threads": threads})
        for threads in (1, 2)
        for device, n, ms in (("cpu", 1, 1.0), ("cuda:0", 1, 2.0), ("cpu", 8, 8.0), ("cuda:0", 8, 2.0))
    ]
    seen = next(r for r in runs if r.device == "cuda:0" and r.options == {"threads": 1})
    explained = {(*crossing.key(seen), 1): crossing.shares(fall(2.0, gaps=1.8, compute=0.2))}
    causes = [row.cause for row in crossing.crossovers(runs, [CPU, GPU], explained) if not row.what.startswith("fastest")]  # type: ignore[arg-type]
    assert [cause.kind if cause else "" for cause in causes] == ["launches", ""]


def test_precisions_are_compared_alike_and_the_fastest_of_each_is_told_apart() -> None:
    runs = [
        *(run("cpu", n, n * 1.0) for n in (1, 8)),
        *(run("cpu", n, n * 5.0, precision="fp16") for n in (1, 8)),
        *(run("cuda:0", n, 3.0) for n in (1, 8)),
        *(run("cuda:0", n, 2.0, precision="fp16") for n in (1, 8)),
    ]
    found = {row.what: row for row in crossing.crossovers(runs, [CPU, GPU], {})}
    assert set(found) == {"eager fp32", "eager fp16", "fastest of each: eager fp32 against eager fp16"}
    assert found["eager fp16"].verdict == "second" and found["eager fp32"].verdict == "crosses"
    assert found["fastest of each: eager fp32 against eager fp16"].points[0].ratio == pytest.approx(0.5, rel=1e-3)


def test_runs_that_were_not_interleaved_are_not_compared() -> None:
    alone = replace(run("cuda:0", 1, 1.0), block_sizes=(6, 6))
    assert crossing.crossovers([run("cpu", 1, 2.0), alone], [CPU, GPU], {}) == ()


# --- memory


@given(
    fixed=st.integers(0, 900),
    each=st.integers(1, 50),
    batches=st.lists(st.sampled_from(BATCHES), min_size=2, max_size=8, unique=True),
)
def test_the_memory_of_a_model_is_its_weights_and_so_much_a_sample(fixed: int, each: int, batches: list[int]) -> None:
    found = crossing.memory([(n, fixed + each * n) for n in batches], GPU)
    assert found is not None and found.limit_bytes == 950 and found.largest_batch is not None
    assert found.bytes_per_sample == pytest.approx(each) and found.misfit == pytest.approx(0.0, abs=1e-6)
    exact = max(0, (950 - fixed) // each)
    assert abs(found.largest_batch - exact) <= 1  # a division that comes out even may round down
    assert found.fixed_bytes + found.bytes_per_sample * found.largest_batch <= 950 * (1 + 1e-9) or found.largest_batch == 0


def test_small_batches_in_an_allocators_smallest_blocks_do_not_bend_the_fit() -> None:
    found = crossing.memory([(n, max(520, 500 + 5 * n)) for n in (1, 2, 4, 8, 16, 32)], GPU)
    assert found is not None and found.bytes_per_sample == pytest.approx(5) and found.batches == (8, 16, 32)


def test_without_growth_or_a_limit_no_batch_is_called_the_largest() -> None:
    flat = crossing.memory([(1, 500), (64, 500)], GPU)
    assert flat is not None and flat.largest_batch is None and "grow" in flat.note
    unknown = crossing.memory([(1, 500), (64, 900)], replace(GPU, free_bytes=None, memory_bytes=None))
    assert unknown is not None and unknown.largest_batch is None and unknown.note
    assert crossing.memory([(4, 500)], GPU) is None
