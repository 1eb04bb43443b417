"""Report + Gates -> verdicts, each with the figure and the limit; and what a report's exit code is. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gpuopt.core.result import GateResult, Report, Run, Status
from gpuopt.core.spec import Gates

EXIT_OF_STATUS = {
    Status.OK: 0,
    Status.ACCURACY_FAIL: 1,
    Status.NAN: 1,
    Status.COMPILE_ERROR: 1,
    Status.CRASH: 1,
    Status.BAD_INPUT: 3,
    Status.UNSUPPORTED: 4,
    Status.ENV_MISSING: 4,
    Status.OOM_DEVICE: 5,
    Status.OOM_HOST: 5,
    Status.TIMEOUT: 5,
    Status.DISK_FULL: 5,
    Status.SKIPPED: 5,
    Status.CANCELLED: 130,
    Status.BUG: 70,
}


def label(run: Run, *, where: bool = False) -> str:
    """What tells this run apart, for a line of text; `where` its device does."""
    dims = ",".join(f"{k}={v}" for k, v in run.dims.items())
    backend = run.backend + (f":{run.preset}" if run.preset else "")
    on = f"on {run.device}" if where and run.device else ""
    return " ".join(p for p in (run.model, backend, run.precision, dims, run.input_mode if run.input_mode != "device" else "", on) if p)


def judge(runs: Iterable[Run], gates: Gates) -> tuple[GateResult, ...]:
    """One result for each gate and run that ended ok; a gate whose figure is missing fails, with that as its figure."""
    found: list[GateResult] = []
    runs = list(runs)
    several = len({run.device for run in runs}) > 1
    for run in runs:
        if run.status is not Status.OK:
            continue
        name = label(run, where=several)
        if gates.min_tflops is not None:
            figure = run.tflops
            shown = "no FLOP count" if figure is None else f"{figure:.4g} TFLOP/s"
            found.append(
                GateResult(
                    name="min-tflops",
                    passed=figure is not None and figure >= gates.min_tflops,
                    figure=shown,
                    limit=f">= {gates.min_tflops:g} TFLOP/s",
                    run=name,
                )
            )
        if gates.max_latency_ms is not None:
            median = run.latency_ms.median if run.latency_ms else None
            found.append(
                GateResult(
                    name="max-latency",
                    passed=median is not None and median <= gates.max_latency_ms,
                    figure="not timed" if median is None else f"{median:.4g} ms",
                    limit=f"<= {gates.max_latency_ms:g} ms",
                    run=name,
                )
            )
        if gates.max_error is not None:
            error = run.accuracy.relative_rmse if run.accuracy else None
            found.append(
                GateResult(
                    name="max-error",
                    passed=error is not None and error <= gates.max_error,
                    figure="not verified" if error is None else f"{error:.3g} relative RMSE",
                    limit=f"<= {gates.max_error:g}",
                    run=name,
                )
            )
    return tuple(found)


def exit_code(report: Report, *, strict: bool = False) -> int:
    """0 when something came of it and no gate was missed; else who must act (README.md lists them)."""
    if any(run.status is Status.BUG for run in report.runs):
        return 70
    if any(not gate.passed for gate in report.gates):
        return 1
    failed = [run for run in report.runs if run.status is not Status.OK]
    if not failed:
        return 0
    if report.verb == "doctor" and any(finding.severity == "error" for finding in report.findings):
        return 1  # whatever broke the model, the doctor found it: a verdict with its evidence
    if len(failed) < len(report.runs):
        return 1 if strict else 0
    codes = {EXIT_OF_STATUS[run.status] for run in failed}
    return codes.pop() if len(codes) == 1 else 1
