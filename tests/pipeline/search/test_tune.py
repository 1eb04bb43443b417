"""What the space holds for which facts: masked attention for FlexAttention, unfilled multiprocessors for streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuopt.core.result import Count, OpRecord, RooflinePoint
from gpuopt.core.spec import BackendSpec, Candidate, ModelRef
from gpuopt.pipeline.search import explaining, tune

BASE = Candidate(model=ModelRef(text="m.py"), device="cuda:0", dims={"N": 4})
FACTS = tune.Facts(wall_ms=5.0, on_gpu=True, batch=4)


def options(facts: tune.Facts, **how: Any) -> set[tuple[str, str]]:
    """(backend, the options that are no plain preset)."""
    return {(str(c.backend), ",".join(c.backend.options)) for c in tune.space(BASE, facts, **how)}


@pytest.mark.parametrize(("share", "is_there"), [(0.0, False), (0.04, False), (0.05, True), (0.6, True)])
def test_flex_is_tried_where_attention_with_a_mask_is_a_large_share(share: float, is_there: bool) -> None:
    found = options(replace(FACTS, masked_attention=share))
    assert (("inductor:graphed", "flex") in found) == is_there
    assert all("inductor" in backend for backend, option in found if option == "flex")


@pytest.mark.parametrize(
    ("unfilled", "batch", "is_there"), [(0.0, 4, False), (0.19, 4, False), (0.2, 4, True), (0.9, 1, False), (0.9, 3, False), (0.9, 2, True)]
)
def test_streams_are_tried_where_blocks_are_few_and_the_batch_divides(unfilled: float, batch: int, is_there: bool) -> None:
    found = options(replace(FACTS, unfilled=unfilled, batch=batch))
    assert (("inductor:graphed", "streams") in found) == (("cudagraphs", "streams") in found) == is_there


def test_neither_is_tried_on_a_cpu() -> None:
    found = options(replace(FACTS, on_gpu=False, masked_attention=1.0, unfilled=1.0))
    assert not {option for _, option in found} & {"flex", "streams"}


def test_flex_is_not_combined_with_a_kernel_that_is_named() -> None:
    known = replace(FACTS, masked_attention=0.5, rewrites={"no_mask": "", "attention:math": "", "attention:cudnn": ""})
    flexed = [c for c in tune.space(BASE, known) if c.backend.options.get("flex")]
    assert flexed and not any(text.startswith("attention") for c in flexed for text in c.transforms.rewrites)


def test_named_outright_both_are_in_the_space_whatever_the_trace_says() -> None:
    found = options(FACTS, backends=("inductor:graphed,flex=true", "cudagraphs:streams=4"))
    assert ("inductor:graphed", "flex") in found and ("cudagraphs", "streams") in found


def test_what_an_option_does_is_not_held_against_the_preset_without_it() -> None:
    plain, flexed = (replace(BASE, backend=BackendSpec.parse(f"inductor:graphed{more}")) for more in ("", ",flex=true"))
    assert not set(tune.causes(flexed, FACTS.own)[:2]) & set(tune.causes(plain, FACTS.own)[:2])
    assert tune.way_of(flexed).backend.endswith("flex=true") and tune.way_of(plain).backend == "inductor:graphed"


def record(op: str, shapes: str, flops: float) -> OpRecord:
    return OpRecord(op=op, module="m", shapes=shapes, flops=flops)


def point(name: str, time_ns: float) -> RooflinePoint:
    return RooflinePoint(name=name, module="m", dtype=None, count=1, time_ns=time_ns, flops=None, bytes=None, intensity=None, bound="unknown", pct_of_ceiling=None, ceiling="")  # fmt: skip


QKV = "2x4x64x32, 2x4x64x32, 2x4x64x32"


def count(attention: OpRecord) -> Count:
    records = (attention, record("aten.mm", "64x64, 64x64", 90.0))
    return Count(records=records, flops=sum(r.flops or 0.0 for r in records), flops_by_dtype={}, bytes=0.0, coverage=1.0)


def test_attention_counts_by_its_time_or_where_it_fell_to_products_by_its_flops() -> None:
    masked = count(record("aten._scaled_dot_product_flash_attention_for_cpu", f"{QKV}, 1x1x64x64", 10.0))
    plain = count(record("aten._scaled_dot_product_flash_attention_for_cpu", QKV, 10.0))
    assert explaining._masked_attention(masked, None) == pytest.approx(0.1)
    assert explaining._masked_attention(plain, None) == 0.0 and explaining._masked_attention(None, None) == 0.0

    class Traced:
        roofline = (point("aten._scaled_dot_product_efficient_attention", 40.0), point("aten.mm", 60.0))

    traced: Any = Traced()
    assert explaining._masked_attention(masked, traced) == pytest.approx(0.4)
    assert explaining._masked_attention(plain, traced) == 0.0
