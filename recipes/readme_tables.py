"""recipes/*/h200.json -> the tables of README.md between their markers. `--check` says whether they are up to date.

Every figure in the README is made here from a report the tool wrote; none is typed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import Report, Run, Status

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MARK = re.compile(r"<!-- table:(?P<name>[\w-]+) -->\n.*?<!-- /table -->", re.DOTALL)
GENERATED = re.compile(r"<!-- generated:(?P<name>[\w-]+) -->\n.*?<!-- /generated -->", re.DOTALL)
SUMMARY = re.compile(r"<!-- summary -->\n.*?<!-- /summary -->", re.DOTALL)
WIDE = 1.1
SEARCH = re.compile(r"<!-- search:(?P<name>[\w-]+) -->\n.*?<!-- /search -->", re.DOTALL)


def table(name: str) -> str:
    """One recipe's runs as a markdown table, with the ceiling of the same run and the command that made the file."""
    path = ROOT / "recipes" / name / "h200.json"
    report = codec.read_json(Report, path)
    lines = [
        "| what | batch | ms (median) | samples/s | TFLOP/s | of measured | of sustained | of data sheet | against the first | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [row(run) for run in report.runs]
    assert report.device is not None
    notes = [f"{report.device.name}, driver {report.device.driver}, torch {report.environment.packages.get('torch')}."]
    for run in report.runs[:1]:
        quantities = sorted({run.precision or ""} | {r.precision or "" for r in report.runs})
        for quantity in quantities:
            ceiling = report.device.ceilings.find(quantity, "measured")
            if ceiling is not None:
                kept = report.device.ceilings.find(quantity, "sustained")
                told = f", {kept.value / 1e12:.0f} sustained between the runs" if kept else ""
                notes.append(f"Measured {quantity} ceiling of the same run: {ceiling.value / 1e12:.0f} TFLOP/s{told}.")
    notes.append(f"`{report.command}` wrote [`recipes/{name}/h200.json`](recipes/{name}/h200.json).")
    return "\n".join([*lines, "", " ".join(notes)])


def searched(name: str) -> str:
    """One search: what it chose and why, and the trials it measured."""
    report = codec.read_json(Report, ROOT / "recipes" / name / "h200.json")
    found = report.search
    assert found is not None and found.choice is not None and report.device is not None
    lines = [f"It chose **{found.choice.change or 'the input'}**: {found.choice.because}.", ""]
    lines += ["| tried | expected, ms | screened, ms | in pairs, ms | samples/s | outcome |", "|---|--:|--:|--:|--:|---|"]
    for trial in (t for t in found.trials if t.seconds is not None):
        cells = [f"{v:,.4g}" if v is not None else "" for v in (trial.predicted_ms, trial.screened_ms, trial.measured_ms)]
        rate = f"{trial.samples_per_s:,.0f}" if trial.samples_per_s else ""
        lines.append(f"| {trial.label} | {' | '.join(cells)} | {rate} | {trial.outcome} |")
    left = sum(t.seconds is None for t in found.trials)
    lines += [
        "",
        f"{left} more were planned and not tried: {found.stopped}. {report.device.name}, driver {report.device.driver}, "
        f"torch {report.environment.packages.get('torch')}. `{report.command}` wrote [`recipes/{name}/h200.json`](recipes/{name}/h200.json).",
    ]
    return "\n".join(lines)


def generated(name: str) -> str:
    """One recipe's ways to generate, with the bound they are held against."""
    report = codec.read_json(Report, ROOT / "recipes" / name / "h200.json")
    assert report.device is not None
    lines = [
        "| what | prefill, ms | a token, ms | tokens/s | of the bound | a whole call against the first | tokens |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    bounds = []
    for run in report.runs:
        what = " ".join([run.precision or "", run.backend + (f":{run.preset}" if run.preset else ""), *run.transforms])
        found = run.generated
        if run.status is not Status.OK or found is None or not found.tokens_per_s:
            lines.append(f"| {what} | {run.status}: {run.reason.replace('|', '/')[:120]} | | | | | |")
            continue
        ratio = run.relative.ratio if run.relative else 1.0
        same = "as eager's" if found.equal else f"a tie within rounding at {found.first_mismatch}"
        share = f"{found.pct_of_bound:.1f}%" if found.pct_of_bound else ""
        lines.append(
            f"| {what} | {found.prefill_ms:.4g} | {found.ms_per_token:.4g} | {found.tokens_per_s:.1f} | {share} | {ratio:.2f}x | {same} |"
        )
        if found.bound_tokens_per_s:
            bounds.append(
                f"The bound, {found.bound_tokens_per_s:.0f} tokens/s, reads {found.weight_bytes / 1e9:.1f} GB of weights a token at {found.ceiling}."
            )
    notes = [f"{report.device.name}, driver {report.device.driver}, torch {report.environment.packages.get('torch')}.", *bounds[:1]]
    notes.append(f"`{report.command}` wrote [`recipes/{name}/h200.json`](recipes/{name}/h200.json).")
    return "\n".join([*lines, "", " ".join(notes)])


CASES = (
    ("ResNet-101, 256 images", "resnet101_fast"),
    ("ResNet-101, one image", "resnet101_b1"),
    ("BERT-large, 64 x 512 tokens", "bert_large_fast"),
    ("the same in fp8", "bert_large_fp8"),
    ("BERT-large, one sentence of 128 tokens", "bert_large_b1"),
    ("Llama of the 8B class, decoding one sequence", "llama_8b_decode"),
    ("T5-large, generating from one prompt", "t5_large_generate"),
)
PLAIN = frozenset({"channels_last", "fold_batch_norm", "no_mask"})
"""Changes that others' settings are given too: without the last one, their compiled attention falls to fp32."""
PRESETS = frozenset({None, "", "default", "reduce-overhead", "max-autotune", "freezing", "nhwc"})
"""Of the libraries themselves."""


def summary() -> str:
    """The fastest verified run of each case, beside the fastest of others' settings in the same report, and the first row."""
    lines = [
        "| case | fastest | speed | of measured | over the fastest of eager, `torch.compile` and ONNX Runtime | over the first row |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for words, name in CASES:
        report = codec.read_json(Report, ROOT / "recipes" / name / "h200.json")
        timed = [run for run in report.runs if run.status is Status.OK and run.latency_ms is not None]
        best = min(timed, key=_ms)
        others = [run for run in timed if _is_others(run)]
        rival, first = min(others, key=_ms), timed[0]
        if best.generated is not None:
            speed, share = f"{best.generated.tokens_per_s:,.0f} tokens/s", best.generated.pct_of_bound
        else:
            speed, share = f"{best.samples_per_s:,.0f} a second, {best.tflops:,.0f} TFLOP/s", best.pct_of_measured
        if best.batch == 1 and best.generated is None:
            speed = f"{_ms(best):.3g} ms"
        over = f"{_ms(rival) / _ms(best):.2f}x `{_what(rival)}`"
        lines.append(f"| {words} | `{_what(best)}` | {speed} | {share:.0f}% | {over} | {_ms(first) / _ms(best):.1f}x `{_what(first)}` |")
    return "\n".join(
        [
            *lines,
            "",
            "Both sides of a ratio are medians of one report, those of the tables below. Generation: of the bound that reading the weights sets; others are generate() as it comes.",
        ]
    )


def _ms(run: Run) -> float:
    assert run.latency_ms is not None
    return run.latency_ms.median


def _is_others(run: Run) -> bool:
    if run.generated is not None:
        return run.backend == "eager" and not run.preset
    return run.preset in PRESETS and not run.options and PLAIN.issuperset(run.transforms)


def _what(run: Run) -> str:
    return " ".join([run.precision or "", run.backend + (f":{run.preset}" if run.preset else ""), *(f"{k}={v}" for k, v in sorted(run.options.items())), *run.transforms])  # fmt: skip


def row(run: Run) -> str:
    """One run; a run that has no times says why."""
    what = " ".join(
        [
            run.precision or "",
            run.backend + (f":{run.preset}" if run.preset else ""),
            *(f"{name}={value}" for name, value in sorted(run.options.items())),
            *run.transforms,
            *([f"{run.input_mode} inputs"] if run.input_mode != "device" else []),
        ]
    )
    if run.status is Status.OK and run.latency_ms is None:
        return f"| {what} | {run.batch} | built and verified; the command ended before it was timed | | | | | | | |"
    if run.status is not Status.OK or run.latency_ms is None:
        # A crash quotes the end of a log: its first two clauses are the answer, the rest stays in the report.
        reason = ": ".join(run.reason.split(": ")[:2]) if run.status is Status.CRASH else run.reason
        return f"| {what} | {run.batch} | {run.status}: {reason.replace('|', '/')[:120]} | | | | | | | |"
    relative = run.relative.ratio if run.relative else 1.0
    error = run.accuracy.relative_rmse if run.accuracy else None
    cells = [
        what,
        str(run.batch),
        f"{run.latency_ms.median:.4g}",
        f"{run.samples_per_s:,.0f}" if run.samples_per_s else "",
        f"{run.tflops:.1f}" if run.tflops else "",
        f"{run.pct_of_measured:.1f}%" if run.pct_of_measured else "",
        f"{run.pct_of_sustained:.1f}%" if run.pct_of_sustained else "",
        f"{run.pct_of_spec:.1f}%" if run.pct_of_spec else "",
        f"{relative:.2f}x{_spread(run)}",
        f"{error:.1e}" if error is not None else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(run: Run) -> str:
    """The interval of a ratio that is known to no better than a tenth."""
    found = run.relative
    if found is None or found.ci95_low is None or found.ci95_high is None or found.ci95_high <= WIDE * found.ci95_low:
        return ""
    return f" ({found.ci95_low:.1f} to {found.ci95_high:.1f})"


def render(text: str) -> str:
    """README text with its tables made again."""
    text = SUMMARY.sub(lambda m: f"<!-- summary -->\n{summary()}\n<!-- /summary -->", text)
    text = GENERATED.sub(lambda m: f"<!-- generated:{m['name']} -->\n{generated(m['name'])}\n<!-- /generated -->", text)
    text = MARK.sub(lambda m: f"<!-- table:{m['name']} -->\n{table(m['name'])}\n<!-- /table -->", text)
    return SEARCH.sub(lambda m: f"<!-- search:{m['name']} -->\n{searched(m['name'])}\n<!-- /search -->", text)


def main() -> None:
    """Rewrite README.md, or check it."""
    text = README.read_text(encoding="utf-8")
    made = render(text)
    if "--check" in sys.argv:
        sys.exit(0 if made == text else "README.md is not what recipes/*/h200.json say: python recipes/readme_tables.py")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
