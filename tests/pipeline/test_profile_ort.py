"""ONNX Runtime on a CPU, where torch.profiler sees nothing of it: the profile is there all the same, through its own profiler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.core.result import Status
from gpuopt.core.spec import BackendSpec
from gpuopt.pipeline import jobs


def test_a_module_through_onnx_runtime_is_profiled_by_its_own_modules(local: Any, tools: Any, models: Any) -> None:
    candidate = replace(tools.candidate(models("net"), N=4), backend=BackendSpec(name="ort"))
    (run,) = jobs.profile(tools.job("profile", candidate)).runs
    assert run.status is Status.OK, run.reason
    rows = {row.name: row for row in run.modules}
    assert rows["first"].time_ns and rows["last"].time_ns and rows["first"].flops == 2 * 4 * 16 * 24
    assert run.flop_coverage == 1.0 and all(point.module != "?" and point.flops is not None for point in run.roofline)
    points = {point.module: point for point in run.roofline if point.flops}
    assert set(points) == {"first", "last"} and all(point.name.startswith("onnx.") for point in points.values())
    assert run.waterfall is not None
    assert sum(part.ms for part in run.waterfall.parts) == pytest.approx(run.waterfall.wall_ms)


def test_an_onnx_file_is_profiled_by_the_modules_it_was_exported_from(local: Any, tools: Any, models: Any, tmp_path: Path) -> None:
    jobs.convert(tools.job("convert", tools.candidate(models("net"), N=4), output=str(tmp_path / "net.onnx")))
    candidate = replace(tools.candidate(str(tmp_path / "net.onnx")), backend=BackendSpec(name="ort"), dims={})
    (run,) = jobs.profile(tools.job("profile", candidate)).runs
    assert run.status is Status.OK, run.reason
    assert {row.name for row in run.modules if row.time_ns} >= {"first", "last"}
    assert run.flop_coverage == 1.0 and all(point.module != "?" and point.flops is not None for point in run.roofline)
