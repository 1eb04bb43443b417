"""What was seen of a program -> tables; hostile and half-empty tables included."""

from __future__ import annotations

from typing import Any

import pytest

from gpuopt.core.result import SCHEMA_VERSION, Environment, Report, Run, Status
from gpuopt.reports import console, html, markdown
from gpuopt.reports.content import program

SCRIPT: dict[str, Any] = {
    "modules": [
        {
            "name": "model", "module_class": "Net", "num_calls": 12, "wall_s": 0.5, "line": "infer.py:42", "device": "cuda:0", "inputs": ["x:float32[1,8]"],
            "typical_s": 0.04, "period_s": 0.06, "first_s": 0.2,
        }
    ],
    "loads": [{"line": "infer.py:34", "what": "load_state_dict", "count": 96, "seconds": 2.0, "bytes": 1e9}],
    "syncs": [{"line": f"infer.py:{n}", "what": "Tensor.item", "count": n, "seconds": n / 1e3} for n in range(40)],
    "copies": [], "wall_s": 4.5, "overhead_s": 0.5, "tracing_s": 1.0,
}  # fmt: skip


def report(**tables: Any) -> Report:
    run = Run(model="model", backend="script", notes=("seen once",))
    environment = Environment(gpuopt="1", python="3", platform="x")
    return Report(
        schema_version=SCHEMA_VERSION,
        command="gpuopt profile -- python infer.py",
        verb="profile",
        environment=environment,
        runs=(run,),
        tables=tables,
    )


def test_models_loads_and_waits_are_tables_with_their_source_lines() -> None:
    text = console.text(report(script=SCRIPT, exit={"code": 0}), width=140)
    assert "Models it calls" in text and "infer.py:42" in text and "60.0 ms" in text
    assert "Weights it loads and moves" in text and "infer.py:34" in text and "954 MiB" in text
    assert "Where it waits for the device" in text and "25 more in --json" in text
    assert "infer.py:39" in text and "infer.py:1 " not in text, "the longest first"
    assert "Where it copies" not in text and "Exit" not in text
    assert "it ran for 3.00 s besides the 1.50 s that observing took: its models 500 ms, loading and moving weights 2.00 s" in text
    assert "built, not timed" not in text and "seen once" in text


@pytest.mark.parametrize("render", [console.text, markdown.render, html.render])
@pytest.mark.parametrize(
    "tables",
    [
        {"script": {}},
        {"script": {"modules": None, "loads": [3, None, {"line": None, "seconds": "x", "bytes": True}], "wall_s": None}},
        {"kernels": []},
        {"kernels": [{"kernel": "<script>alert(1)</script>", "count": 3, "time_ms": 1.0, "pct": 250.0}, {}]},
        {"exit": {"code": 1}},
    ],
)
def test_half_of_a_table_is_shown_as_far_as_it_goes(render: Any, tables: dict[str, Any]) -> None:
    text = str(render(report(**tables)))
    assert "<script>alert(1)</script>" not in text or render is console.text


def test_a_crashed_program_is_no_good_news() -> None:
    crashed = Report(
        schema_version=SCHEMA_VERSION, command="", verb="profile", environment=Environment(gpuopt="1", python="3", platform="x"),
        runs=(Run(model="m", backend="script", status=Status.CRASH, reason="exited with 1", notes=("seen once",)),), tables={"script": SCRIPT},
    )  # fmt: skip
    assert program.notes(crashed) == []
    assert "exited with 1" in console.text(crashed, width=140)


def test_how_often_a_kernel_ran_is_a_count() -> None:
    shown = program.build(
        "kernels", [{"short": "k", "count": 24.0, "time_ms": 1.0, "pct": 90.0}, {"short": "j", "count": 1.5, "time_ms": 0.1, "pct": 10.0}]
    )
    assert shown is not None
    assert [row[1].text for row in shown[0].rows] == ["24", "1.50"]
