"""Predicted beside measured, rehearsed on a CPU: the pairs are pairs, their rules find the one and not the other, and the file and the page say what happened."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpuopt import converters
from gpuopt.core import codec
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.result import Status
from gpuopt.core.spec import Precision
from gpuopt.devices import info, null
from gpuopt.doctor import diagnose, recast
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import rules
from gpuopt.pipeline import environment, facts
from gpuopt.pipeline.asked import describe_transforms, own_precision
from gpuopt.pipeline.isolate import ChildFailed
from gpuopt.profiling import count

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # recipes are no part of the package

from recipes.predictions import run, table  # noqa: E402
from recipes.predictions.defects import DEFECTS, HELD_OUT, SEEN, TABLE, Defect, Side  # noqa: E402
from recipes.predictions.desk import Desk, Live, model_of  # noqa: E402
from recipes.predictions.rows import Fired, Predictions, Row, Timed, Told, judged, score  # noqa: E402

FAKE_GPU = replace(info.describe("cpu"), id="cuda:0", name="a GPU", kind="cuda", ceilings=null.CEILINGS)
EAGER = [
    d
    for d in DEFECTS.values()
    if d.name
    not in (
        "gelu-by-hand",
        "bert-compiled-mask",
        "bert-small-kernels",
        "bert-launch-bound",
        "steps-launch-bound",
        "resnet50-launch-bound",
        "gpt2-gelu-by-hand",
    )
]
COUNTED = ("bert-no-tf32", "resnet-no-tf32", "resnet-no-half", "bert-no-half", "resnet-nchw", "bert-odd-vocabulary", "bert-odd-inner-width")
"""Pairs whose rules look at counted products and weights: what a GPU would have taken for those can be made up."""


def ids(defect: Defect) -> str:
    return defect.name


def test_there_are_enough_pairs_of_enough_kinds_and_each_names_a_rule_that_prices() -> None:
    assert len(DEFECTS) == len(TABLE) + len(HELD_OUT) + len(SEEN) >= 40 and len(HELD_OUT) >= 12
    assert len({d.code for d in TABLE}) >= 15
    assert {d.code for d in TABLE} <= set(rules())


@pytest.mark.parametrize("defect", EAGER, ids=ids)
def test_both_sides_compute_the_same(defect: Defect) -> None:
    first, second = (outputs(make(True)) for make in (defect.bad, defect.fixed))
    assert first.shape == second.shape
    assert ((first - second).square().mean() / first.square().mean()).sqrt() < defect.same_within


@pytest.mark.parametrize("defect", [d for d in TABLE if d.on_cpu], ids=ids)
def test_a_rule_that_can_tell_on_a_cpu_speaks_on_the_bad_side_alone(defect: Defect) -> None:
    desk = Desk(small=True)
    timed = desk.time(defect.name, "cpu")
    told = desk.explain(defect.name, info.describe("cpu"))
    row = judged(run._empty(defect.name), timed, told, seconds=0.0)
    assert row.fired and not row.fired_on_fixed
    assert row.num_pairs >= 6 and row.bad_ms and row.fixed_ms
    assert not [f for f in (*told.bad, *told.fixed) if "this rule failed" in f.message]


@pytest.mark.parametrize("name", COUNTED)
def test_a_rule_that_looks_at_products_speaks_on_the_bad_side_alone(name: str) -> None:
    codes = [{f.code for f in diagnose.diagnose(as_if_on_a_gpu(make(True)))} for make in (DEFECTS[name].bad, DEFECTS[name].fixed)]
    assert DEFECTS[name].code in codes[0] and DEFECTS[name].code not in codes[1]


def test_two_pairs_go_through_children_into_the_file_and_onto_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rehearsal.json"
    assert run.main(["--device", "cpu", "--small", "--only", "GPU109,bert-weight-norm", "--output", str(output)]) == 0
    found = codec.read_json(Predictions, output)
    assert found.small and found.device.kind == "cpu" and [row.code for row in found.rows] == ["GPU309", "GPU109"]
    assert all(row.status == "measured" and row.fired and not row.fired_on_fixed and row.findings for row in found.rows)
    assert all(row.predicted_high_ms is not None and row.in_range is not None and row.miss is not None for row in found.rows)
    assert str(tmp_path) not in output.read_text()
    assert "2 measured gains" in capsys.readouterr().out
    assert "rehearsal" in table.render(found) and "| GPU309 |" not in table.render(found)
    page = table.render(replace(found, small=False), {"GPU109": "two cores"})
    assert page.count("| GPU309 |") == page.count("| GPU109 |") == 1


def test_a_pair_without_its_hardware_is_a_row_with_the_reason(tmp_path: Path) -> None:
    child = Scripted({"bert-no-tf32": ChildFailed(Status.UNSUPPORTED, "tf32 cannot run on /opt/some/where/cpu.py")})
    found = run.run(["bert-no-tf32", "bert-item"], device="cpu", output=tmp_path / "x.json", say=quiet, child=child.start)
    assert [(row.status, row.reason) for row in found.rows] == [("unsupported", "tf32 cannot run on cpu.py"), ("measured", "")]
    assert child.starts == 1


def test_a_crash_loses_one_row_and_what_was_timed_beside_it_is_timed_again(tmp_path: Path) -> None:
    names = ["bert-no-tf32", "bert-item", "bert-padding"]
    child = Scripted({"bert-item": ChildFailed(Status.CRASH, "SIGSEGV")}, deadly={"bert-item"})
    said: list[str] = []
    found = run.run(names, device="cpu", output=tmp_path / "x.json", say=said.append, child=child.start)
    assert {row.name: row.status for row in found.rows} == {"bert-no-tf32": "measured", "bert-item": "crash", "bert-padding": "measured"}
    assert child.starts == 2 and child.timed == ["bert-no-tf32", "bert-item", "bert-no-tf32", "bert-padding"]
    assert codec.read_json(Predictions, tmp_path / "x.json") == found


def test_a_crash_while_tracing_keeps_the_times(tmp_path: Path) -> None:
    child = Scripted({}, explain={"bert-item": ChildFailed(Status.CRASH, "CUPTI")}, deadly={"bert-item"})
    found = run.run(["bert-item", "bert-padding"], device="cpu", output=tmp_path / "x.json", say=quiet, child=child.start)
    assert {row.name: (row.status, row.gain_ms) for row in found.rows} == {"bert-item": ("crash", 4.0), "bert-padding": ("measured", 4.0)}


def test_children_after_the_first_build_the_same_models_and_do_not_measure_the_ceilings_again(tmp_path: Path) -> None:
    names = [name for name in DEFECTS][: run.PER_CHILD + 1]
    child = Scripted({})
    run.run(names, device="cpu", output=tmp_path / "x.json", say=quiet, child=child.start)
    assert child.surveys == [(False, True), (False, False)]
    rehearsed = Scripted({})
    run.run(names, device="cpu", small=True, output=tmp_path / "y.json", say=quiet, child=rehearsed.start)
    assert rehearsed.surveys == [(True, False), (True, False)]


def test_held_out_pairs_are_marked_and_scored_apart(tmp_path: Path) -> None:
    child = Scripted({})
    found = run.run(["bert-item", "vit-item"], device="cpu", output=tmp_path / "x.json", say=quiet, child=child.start)
    assert {row.name: row.held_out for row in found.rows} == {"bert-item": False, "vit-item": True}
    assert "held out: 1 of 1" in run.summary(found)
    page = table.render(found)
    assert page.index("## Held out") > page.index("GPU104") and page.count("| GPU104 |") == 2


def test_what_does_not_fit_the_budget_is_skipped_and_said(tmp_path: Path) -> None:
    child = Scripted({})
    found = run.run(["bert-item", "bert-padding"], device="cpu", output=tmp_path / "x.json", budget_s=2.0, say=quiet, child=child.start)
    assert [row.status for row in found.rows] == ["skipped", "measured"] or [row.status for row in found.rows] == ["measured", "skipped"]


def test_rows_of_other_pairs_are_kept_on_request_and_never_from_another_machine(tmp_path: Path) -> None:
    output, child = tmp_path / "x.json", Scripted({})
    run.run(["bert-item"], device="cpu", output=output, say=quiet, child=child.start)
    again = run.run(["bert-padding"], device="cpu", output=output, keep=True, say=quiet, child=child.start)
    assert {row.name for row in again.rows} == {"bert-item", "bert-padding"}
    output.write_text(codec.to_json(replace(again, device=replace(again.device, name="another"))))
    with pytest.raises(UsageError, match="another machine"):
        run.run(["bert-item"], device="cpu", output=output, keep=True, say=quiet, child=child.start)


def test_each_side_is_timed_with_its_own_switches_whichever_was_built_last() -> None:
    seen: list[tuple[bool, bool]] = []

    def block(spec: Any) -> Any:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return SimpleNamespace(samples=None)

    session: Any = SimpleNamespace(block=block)
    for precision in (Precision.FP32, Precision.TF32, Precision.FP32):
        Desk(small=True)._block(
            Live(session, precision, Inputs()),
        )
    assert seen == [(False, False), (True, True), (False, False)]


def test_a_name_that_no_pair_has_is_refused() -> None:
    assert run.main(["--only", "GPU999"]) == 2
    assert run.chosen("GPU404, bert-item") == ["bert-launch-bound", "bert-item", "steps-launch-bound", "resnet50-launch-bound"]


def test_findings_of_one_rule_add_up_and_the_ends_of_the_range_belong_to_it() -> None:
    told = Told(bad=(fired("GPU104", 1.0, 2.0), fired("GPU104", 2.0, 3.0), fired("GPU105", 9.0, 9.0), fired("GPU104", None, None)))
    row = judged(run._empty("bert-item"), Timed(bad_ms=20.0, fixed_ms=15.0, gain_ms=5.0), told, seconds=1.0)
    assert (row.predicted_low_ms, row.predicted_high_ms, row.in_range, row.miss) == (3.0, 5.0, True, 0.25)
    assert judged(row, Timed(bad_ms=20.0, fixed_ms=14.9, gain_ms=5.1), told, seconds=1.0).in_range is False


def test_silence_is_a_miss_without_limit() -> None:
    good = replace(run._empty("bert-item"), in_range=True, miss=0.1, fired=True)
    silent = run._empty("bert-padding")
    skipped = replace(run._empty("bert-sync"), status="skipped")
    assert score([good, good, silent, skipped]).share == pytest.approx(2 / 3)
    assert score([good, good, silent]).median_miss == 0.1
    assert score([good, silent, silent]).median_miss is None and not score([good, silent, silent]).passed
    assert score([good] * 4 + [silent]).passed
    assert score([]).share is None


def test_the_page_explains_misses_and_refuses_explanations_of_nothing() -> None:
    rows = (
        replace(run._empty("bert-item"), bad_ms=9.0, fixed_ms=5.0, gain_ms=4.0, predicted_low_ms=1.0, predicted_high_ms=2.0, in_range=False, miss=1.67, fired=True),
        replace(run._empty("bert-sync"), status="crash", reason="a | b"),
    )  # fmt: skip
    page = table.render(predictions(rows), {"bert-item": "launches are not priced", "GPU105": "nobody asked"})
    assert "| GPU104 |" in page and "| no | 167% | launches are not priced |" in page and "0 of 1" in page
    assert "crash: a / b" in page and "nobody asked" not in page
    with pytest.raises(UsageError, match="GPU999"):
        table.render(predictions(rows), {"GPU999": "?"})


def test_the_page_in_the_tree_is_made_from_the_files_in_the_tree() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page()
    assert table.RESULT.exists() or table.NOTHING in table.page()


def test_every_field_is_in_the_description_of_the_file() -> None:
    text = run.__doc__ or ""
    missing = [name for name in (*Row.__dataclass_fields__, *Predictions.__dataclass_fields__) if name not in text]
    assert missing == ["schema_version"]


# -- what the tests are made of -----------------------------------------------------------------------------------------------------


def outputs(side: Side) -> torch.Tensor:
    """The first floating output, on the CPU, in the precision asked for."""
    model, inputs = model_of(side, "x")
    precision = side.precision or own_precision(model)
    module = converters.apply(model, precision, side.transforms, inputs).module
    dtype = getattr(torch, precision.dtype)
    given = {k: v.to(dtype) if v.is_floating_point() else v.clone() for k, v in inputs.kwargs.items()}
    with torch.inference_mode():
        found: Any = module(**given)
    first = found if isinstance(found, torch.Tensor) else next(iter(found.values()))
    return first.double()


def as_if_on_a_gpu(side: Side) -> Evidence:
    """Counted on the CPU; products take twice their floor, products of odd sizes four times."""
    model, inputs = model_of(side, "x")
    precision = side.precision or own_precision(model)
    changed = converters.apply(model, precision, side.transforms, inputs)
    given = inputs.map(lambda t: t.to(getattr(torch, precision.dtype)) if t.is_floating_point() else t)
    counted = count.count(changed.module, given, tf32=precision is Precision.TF32)

    def taken(record: Any) -> float:
        # So small a model is bound by launches: made long enough that shares of a ceiling mean something.
        floor = (record.flops or 0.0) / 1e9 * 1e6 + (record.bytes or 0.0) / 1e9
        odd = any(int(n) % 8 for shape in record.shapes.split(", ") for n in shape.split("x") if n.isdigit() and int(n) > 2)
        return floor * (4.0 if odd and record.flops else 2.0)

    records = tuple(replace(r, time_ns=taken(r)) for r in counted.records)
    return Evidence(
        device=FAKE_GPU,
        model="x",
        module=model.module,
        inputs=inputs,
        precision=precision.value,
        transforms=describe_transforms(side.transforms),
        flags={"matmul_tf32": precision is Precision.TF32, "cudnn_tf32": precision is Precision.TF32},
        wall_ms=recast.total_ms(records) * 1.02,
        records=records,
        count=counted,
    )


class Scripted:
    """Children that answer at once, or as the script says."""

    def __init__(
        self, failing: dict[str, ChildFailed], *, explain: dict[str, ChildFailed] | None = None, deadly: set[str] = frozenset()
    ) -> None:  # type: ignore[assignment]
        self.failing, self.explaining, self.deadly = failing, explain or {}, deadly
        self.starts, self.timed, self.alive = 0, [], True
        self.surveys: list[tuple[bool, bool]] = []
        """(small, ceilings) of each."""

    def start(self) -> Any:
        self.starts, self.alive = self.starts + 1, True
        return self

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, verb: str, result: type, *, timeout_s: float, name: str = "", **more: Any) -> Any:
        assert self.alive
        if verb == "survey":
            self.surveys.append((more["small"], more["ceilings"]))
            return facts.Survey(environment=environment.describe(), device=info.describe("cpu"))
        if verb == "time":
            self.timed.append(name)
        failure = (self.failing if verb == "time" else self.explaining).get(name)
        if failure is not None:
            self.alive = name not in self.deadly
            raise failure
        if verb == "time":
            return Timed(bad_ms=10.0, fixed_ms=6.0, gain_ms=4.0, num_pairs=6)
        return Told(bad=(fired(DEFECTS[name].code, 3.0, 5.0),))


def fired(code: str, low: float | None, high: float | None) -> Fired:
    return Fired(code=code, rule="r", severity="warning", message="m", low_ms=low, high_ms=high)


def predictions(rows: tuple[Row, ...]) -> Predictions:
    return Predictions(
        command="python -m recipes.predictions.run",
        small=False,
        device=info.describe("cpu"),
        environment=environment.describe(),
        seconds=1.0,
        rows=rows,
    )


def quiet(text: str) -> None:
    """Nobody reads it."""
