"""The twenty architectures, rehearsed on a CPU: they are those that were published, their recipes are what they should be, and the page says what the reports say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt import converters
from gpuopt.core import codec
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.result import Accuracy, Environment, Relative, Report, Run, Stats, Status
from gpuopt.core.spec import Precision, TensorSpec, Transforms
from gpuopt.pipeline import recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # recipes are no part of the package

from recipes.predictions.desk import model_of  # noqa: E402
from recipes.predictions.pairs import Side  # noqa: E402
from recipes.zoo import models, run, table, tiny  # noqa: E402
from recipes.zoo.verdict import verdicts  # noqa: E402

MILLIONS = {
    "resnet50": 25.6,
    "regnet_y_4gf": 20.6,
    "convnext_tiny": 28.6,
    "mobilenet_v2": 3.5,
    "efficientnet_b0": 5.3,
    "vit_base": 86.6,
    "swin_tiny": 28.3,
    "segformer_b0": 3.8,
    "detr_resnet50": 41.5,
    "clip_vit_base": 151.3,
    "bert_base": 109.5,
    "deberta_v3_base": 183.8,
    "gpt2": 124.4,
    "smollm2_360m": 361.8,
    "t5_base": 222.9,
    "whisper_small": 241.7,
    "wav2vec2_base": 94.4,
}
"""As published, for those that are no cut and no invention."""


SLOW_HALVES = ("mobilenet_v2", "efficientnet_b0", "regnet_y_4gf", "segformer_b0", "diffusion_unet")
"""A CPU takes seconds for their convolutions in fp16."""


def inputs_of(factory: Any, dims: dict[str, int], device: str = "cpu") -> Inputs:
    torch.manual_seed(0)
    given: dict[str, torch.Tensor] = {}
    for text in factory.input_specs:
        spec = TensorSpec.parse(text).bind(dims)
        dtype = getattr(torch, spec.dtype)
        if device == "meta":
            given[spec.name] = torch.empty(spec.shape, dtype=dtype, device="meta")
        elif dtype.is_floating_point:
            given[spec.name] = torch.randn(spec.shape, dtype=dtype)
        else:
            given[spec.name] = torch.randint(spec.high or 2, spec.shape)
    return Inputs(kwargs=given, dims=dims)


def tensors(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    found = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in found if value is not None for tensor in tensors(value)]


def job_of(name: str) -> Any:
    return recipe.read(run.HERE / f"{name}.yaml")


def test_there_are_twenty_each_with_a_full_model_a_tiny_one_and_a_recipe() -> None:
    assert len(run.ORDER) == len(set(run.ORDER)) == 20
    for module in (models, tiny):
        assert {name for name, value in vars(module).items() if hasattr(value, "input_specs")} == set(run.ORDER)
    assert {path.stem for path in run.HERE.glob("*.yaml")} == set(run.ORDER)


@pytest.mark.parametrize("name", run.ORDER)
def test_the_full_model_has_the_size_that_was_published_and_takes_its_inputs(name: str) -> None:
    factory = getattr(models, name)
    with torch.device("meta"):
        model: nn.Module = factory()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count < 700e6
    if name in MILLIONS:
        assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)
    if name == "detr_resnet50":
        return  # it reads back whether its mask is all ones, and a meta tensor holds nothing
    if name == "granite_moe":
        model.to(torch.bfloat16)  # of the grouped product, torch knows the shape in bf16 alone
    rewrites = {text for candidate in job_of(name).candidates for text in candidate.transforms.rewrites}
    given = inputs_of(factory, {"N": 2, "S": 128}, "meta")
    if "no_mask" in rewrites:  # transformers looks into the mask that it makes, and a meta tensor holds nothing
        converters.rewrites.loaded("no_mask").apply(model, None, given)
    assert all(2 in found.shape[:1] for found in tensors(model(**given.kwargs)))


@pytest.mark.parametrize("name", run.ORDER)
def test_every_candidate_changes_the_tiny_model_into_one_that_says_the_same_in_half_precision(name: str) -> None:
    factory = getattr(tiny, name)
    given = inputs_of(factory, {"N": 2, "S": 16})
    model, given = model_of(Side(module=factory(), inputs=given.kwargs), name)
    with torch.no_grad():
        expected = tensors(model.module(**given.kwargs))
        assert all(found.isfinite().all() and found.std() > 1e-4 for found in expected)
        seen: set[Transforms] = set()
        for candidate in job_of(name).candidates:
            if candidate.transforms in seen:
                continue
            seen.add(candidate.transforms)
            changed = converters.apply(model, Precision.FP32, candidate.transforms, given)
            for want, found in zip(expected, tensors(changed.module(**given.kwargs)), strict=True):
                torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
        if name in SLOW_HALVES:
            return
        half = converters.apply(model, Precision.FP16, Transforms(), given)
        cast = given.map(lambda t: t.half() if t.is_floating_point() else t)
        for want, found in zip(expected, tensors(half.module(**cast.kwargs)), strict=True):
            assert ((found.float() - want).norm() / want.norm()).item() < 0.05


@pytest.mark.parametrize("name", run.ORDER)
def test_a_recipe_asks_for_two_batches_each_begun_by_plain_fp16_eager(name: str) -> None:
    job = job_of(name)
    batches = {c.dims["N"] for c in job.candidates}
    assert min(batches) == 1
    assert len(batches) == 2
    assert {c.model.text for c in job.candidates} == {f"recipes.zoo.models:{name}"}
    for batch in batches:
        first = next(c for c in job.candidates if c.dims["N"] == batch)
        assert (first.backend.name, first.precision, first.transforms) == ("eager", Precision.FP16, Transforms())
    assert sum(c.backend.name != "eager" for c in job.candidates) <= 5


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="resnet51") as caught:
        run.chosen("gpt2,resnet51")
    assert "resnet50" in caught.value.fix
    assert run.chosen("vit_base, bert_base") == ["bert_base", "vit_base"]


@pytest.mark.parametrize("name", run.ORDER)
def test_a_rehearsal_is_a_recipe_of_the_tiny_model_at_small_batches(name: str) -> None:
    plain = run.small((run.HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    job = recipe.parse(codec.to_json(plain), device="cpu")
    assert {c.model.text for c in job.candidates} == {f"recipes.zoo.tiny:{name}"}
    assert {c.dims["N"] for c in job.candidates} == {1, 3}
    assert {c.backend.name for c in job.candidates} <= {"eager", "inductor"}


def stats(ms: float) -> Stats:
    return Stats(median=ms, mean=ms, stdev=0.0, min=ms, max=ms, p90=ms, ci95_low=ms, ci95_high=ms, num_samples=10)


def timed(batch: int, backend: str, ms: float, ratio: float | None = None, verdict: str = "faster", passed: bool = True) -> Run:
    relative = None
    if ratio is not None:
        relative = Relative(ratio=ratio, ci95_low=ratio * 0.99, ci95_high=ratio * 1.01, num_pairs=10, verdict=verdict, threshold=0.02)
    right = Accuracy(passed=passed, reason="" if passed else "relative RMSE 0.3", reference="fp64")
    return Run(
        model="m",
        backend=backend,
        precision="fp16",
        batch=batch,
        latency_ms=stats(ms),
        samples_per_s=batch / ms * 1e3,
        relative=relative,
        accuracy=right,
    )


def report_of(*runs: Run) -> Report:
    return Report(
        schema_version=1, command="", verb="bench", environment=Environment(gpuopt="0", python="3", platform="p", packages={}), runs=runs
    )


def test_the_fastest_that_is_right_and_beats_eager_beyond_noise_is_chosen_and_everything_else_is_told() -> None:
    wrong, noisy = timed(1, "aoti", 0.1, 20.0, passed=False), timed(1, "ort", 1.9, 1.05, "inconclusive")
    crashed = Run(model="m", backend="inductor", precision="fp16", batch=1, status=Status.CRASH, reason="boom")
    one, large = verdicts(
        report_of(
            timed(1, "eager", 2.0),
            wrong,
            timed(1, "cudagraphs", 1.0, 2.0),
            noisy,
            crashed,
            timed(8, "eager", 4.0),
            timed(8, "inductor", 5.0, 0.8, "slower"),
        )
    )
    assert (one.label, one.speedup) == ("cudagraphs", 2.0)
    assert [text.partition(":")[0] for text in one.failures] == ["aoti", "inductor"]
    assert [text.partition(":")[0] for text in one.slower] == ["ort"]
    assert (large.best, large.speedup, large.label) == (None, 1.0, "eager, kept")


def test_without_eager_there_is_no_speed_up() -> None:
    failed = Run(model="m", backend="eager", precision="fp16", batch=1, status=Status.CRASH, reason="no memory")
    (found,) = verdicts(report_of(failed, timed(1, "inductor", 1.0)))
    assert (found.speedup, found.best) == (None, None)
    (untimed,) = verdicts(report_of(replace(timed(1, "eager", 1.0), latency_ms=None), timed(1, "inductor", 1.0, 9.0)))
    assert untimed.speedup is None


def test_the_page_counts_a_kept_eager_as_one_names_what_is_missing_and_takes_its_medians_from_the_reports() -> None:
    reports = {
        "gpt2": report_of(timed(1, "eager", 2.0), timed(1, "cudagraphs", 0.5, 4.0), timed(8, "eager", 4.0), timed(8, "inductor", 2.0, 2.0)),
        "vit_base": report_of(timed(1, "eager", 2.0), timed(1, "cudagraphs", 2.1, 0.95, "slower"), timed(8, "eager", 4.0)),
    }
    page = table.render(reports)
    assert "At batch 1: median 2.50x over 2 architectures" in page
    assert "eager is kept for 1" in page
    assert "the goal is missed" in page
    assert "At the large batch: median 1.50x" in page
    assert "the goal is met, the aim is not" in page
    assert "| [gpt2](../recipes/zoo/gpt2.yaml) | 1 | 2 | 0.5 | 4.00x | 3.96 to 4.04 |" in page
    assert "cudagraphs: slower (0.95x)" in page
    assert "resnet50" in page.partition("Not measured")[2].partition("\n")[0]


def test_the_page_in_the_tree_is_what_the_reports_in_the_tree_say() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.render(table.read(table.REPORTS))


def test_at_the_deadline_every_command_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def stubborn(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(
            popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"], **options)
        )
        return started[-1]

    monkeypatch.setattr(run, "GRACE_S", 0.5)
    monkeypatch.setattr(run.lanes.subprocess, "Popen", stubborn)
    found = run.run(["gpt2", "vit_base", "bert_base"], tmp_path, gpus=2, deadline_s=1.8, device="cpu")
    assert sorted(tuple(ended.reports.items()) for ended in found) == [(("gpt2", None), ("bert_base", None)), (("vit_base", None),)]
    assert [process.returncode for process in started] == [-9, -9]
    said = capsys.readouterr().out
    assert said.count("no report") == 3
