"""Real data and a user's own metric, through a session and through the commands: what counts, what fails the candidate, and whose fault an error is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpuopt.core.errors import BadInput, GpuoptError, Unsupported, UsageError
from gpuopt.core.result import Accuracy, Status
from gpuopt.core.spec import Candidate, EvalSpec, Tolerance
from gpuopt.pipeline import figures, jobs, recipe
from gpuopt.pipeline.session import Session

METRICS = """
import math

calls = []


def accuracy(outputs, targets):
    return (outputs.argmax(-1) == targets).float().mean()


def by_name(outputs, batch):
    calls.append(sorted(batch))
    return float((outputs.argmax(-1) == batch["labels"]).float().mean())


def loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets).item()


loss.lower_is_better = True


def negative(outputs, targets):
    return -loss(outputs, targets)


def raises(outputs, targets):
    scale = 1.0
    return scale / 0


def nothing(outputs, targets):
    print("no return")


def many(outputs, targets):
    return outputs


def nan(outputs, targets):
    return math.nan


def truth(outputs, targets):
    return True


def one_argument(outputs):
    return 1.0


def seen(outputs, batch):
    assert outputs.device.type == "cpu" and outputs.dtype is torch.float32, (outputs.device, outputs.dtype)
    return outputs.numpy().mean() ** 2 + 1


number = 3


import torch
"""


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.close()


@pytest.fixture(scope="module")
def net_data(tmp_path_factory: pytest.TempPathFactory, models: Callable[[str], str]) -> dict[str, str]:
    """50 samples of Net with the labels that the model itself gives: it scores 1."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "metrics.py").write_text(METRICS)
    spec = __import__("importlib.util").util.spec_from_file_location("nets", models("net").rpartition(":")[0])
    module = __import__("importlib.util").util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(3)
    x = torch.randn(50, 16)
    labels = module.net()(x).argmax(-1)
    np.savez(folder / "data.npz", x=x.numpy(), labels=labels.numpy())
    np.savez(folder / "unlabelled.npz", x=x.numpy())
    np.savez(folder / "calib.npz", x=(3 * x).numpy())
    return {
        "folder": str(folder),
        "metrics": str(folder / "metrics.py"),
        "data": str(folder / "data.npz"),
        "calib": str(folder / "calib.npz"),
    }


def asked(tools: Any, models: Any, net_data: dict[str, str], metric: str | None, backend: str = "null", **more: Any) -> Candidate:
    spec = EvalSpec(data=more.pop("data", net_data["data"]), metric=f"{net_data['metrics']}:{metric}" if metric else None, **more)
    return replace(tools.candidate(models("net"), backend, N=8), evaluation=spec)


def verified(session: Session, candidate: Candidate) -> Accuracy:
    session.load(candidate)
    session.build()
    return session.verify(Tolerance()).accuracy


@pytest.mark.parametrize("metric", ["accuracy", "by_name", "loss", "negative", "seen"])
def test_an_honest_candidate_scores_what_eager_scores(
    metric: str, session: Session, tools: Any, models: Any, net_data: dict[str, str]
) -> None:
    accuracy = verified(session, asked(tools, models, net_data, metric))
    assert accuracy.passed, accuracy.reason
    assert accuracy.metric is not None
    assert accuracy.metric.value == pytest.approx(accuracy.metric.reference)
    assert accuracy.metric.num_samples == 50, "every sample, though 50 is no multiple of 8"
    assert accuracy.metric.lower_is_better == (metric == "loss")
    if metric == "accuracy":
        assert accuracy.metric.value == 1.0
    assert any("over 50 samples" in note for note in accuracy.notes)
    assert [stage.name for stage in accuracy.stages] == ["structure", "precision", "real data", "scales"]


def test_a_candidate_within_every_tolerance_and_worse_by_the_metric_fails(
    session: Session, tools: Any, models: Any, net_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong on real data that the numeric gate never sees: only the metric can tell."""
    from gpuopt.backends import null

    data = torch.from_numpy(np.load(net_data["data"])["x"])
    late = data[-10:]
    real = null.NullRunner.__call__

    def lies(self: Any, x: Any) -> Any:
        out = real(self, x=x)
        return -out if any(torch.equal(row, known) for row in x for known in late) else out

    monkeypatch.setattr(null.NullRunner, "__call__", lies)
    accuracy = verified(session, asked(tools, models, net_data, "accuracy"))
    assert all(stage.passed for stage in accuracy.stages)
    assert not accuracy.passed and accuracy.status is Status.ACCURACY_FAIL
    assert accuracy.metric is not None and not accuracy.metric.passed
    assert accuracy.metric.value is not None and accuracy.metric.value < 0.9
    assert "at least 0.99 is wanted" in accuracy.reason and "\n" not in accuracy.reason


def test_the_ratio_asked_for_decides(session: Session, tools: Any, models: Any, net_data: dict[str, str]) -> None:
    accuracy = verified(session, asked(tools, models, net_data, "loss", min_ratio=0.9))
    assert accuracy.metric is not None
    assert accuracy.metric.limit == pytest.approx(1.1 * accuracy.metric.reference), "a loss may grow by what a score may shrink"


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("raises", "ZeroDivisionError at metrics.py:29"),
        ("nothing", "NoneType, not a number"),
        ("many", "a tensor of shape [8, 8], not a number"),
        ("nan", "gave nan for the model as it is"),
        ("truth", "bool, not a number"),
        ("one_argument", "cannot be called with two arguments"),
        ("number", "is a int, not a function"),
        ("acuracy", "has no 'acuracy'"),
    ],
)
def test_a_metric_that_does_not_work_is_told_before_anything_is_built(
    metric: str, says: str, session: Session, tools: Any, models: Any, net_data: dict[str, str]
) -> None:
    with pytest.raises(UsageError) as caught:
        session.load(asked(tools, models, net_data, metric))
    assert says in caught.value.message and caught.value.fix
    assert metric in caught.value.message


def test_a_metric_that_is_nan_for_a_sound_candidate_is_never_a_pass(
    session: Session, tools: Any, models: Any, net_data: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "turns.py"
    file.write_text("n = 0\ndef fn(outputs, batch):\n    global n\n    n += 1\n    return 1.0 if n <= 7 else float('nan')\n")
    spec = EvalSpec(data=net_data["data"], metric=f"{file}:fn")
    with pytest.raises(UsageError, match="gave nan for this candidate"):
        verified(session, replace(tools.candidate(models("net"), "null", N=8), evaluation=spec))


def test_nan_in_the_candidates_own_outputs_is_its_failure_and_not_the_metrics(
    session: Session, tools: Any, models: Any, net_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.backends import null

    last = torch.from_numpy(np.load(net_data["data"])["x"])[-1]
    real = null.NullRunner.__call__
    monkeypatch.setattr(
        null.NullRunner, "__call__", lambda self, x: real(self, x=x) * (torch.nan if any(torch.equal(r, last) for r in x) else 1.0)
    )
    accuracy = verified(session, asked(tools, models, net_data, "loss"))
    assert not accuracy.passed and accuracy.metric is not None and accuracy.metric.value is None
    assert "NaN or Inf" in accuracy.reason


def test_calib_and_eval_data_go_through_the_numeric_gate(
    session: Session, tools: Any, models: Any, net_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpuopt.backends import null

    calib = torch.from_numpy(np.load(net_data["calib"])["x"])
    real = null.NullRunner.__call__
    monkeypatch.setattr(null.NullRunner, "__call__", lambda self, x: real(self, x=x) * (1.1 if torch.equal(x[0], calib[8]) else 1.0))
    accuracy = verified(session, asked(tools, models, net_data, None, data=None, calib=net_data["calib"]))
    assert not accuracy.passed and accuracy.reason.startswith("real data")
    assert {stage.name: stage.passed for stage in accuracy.stages}["precision"]


def test_the_file_has_to_fit_the_candidate(session: Session, tools: Any, models: Any, net_data: dict[str, str], tmp_path: Path) -> None:
    x = np.zeros((10, 16), np.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"y": x}, "no array 'x'"),
        ({"x": np.zeros((10, 15), np.float32)}, "the candidate takes [samples, 16]"),
        ({"x": x.astype(np.int64)}, "is int64"),
        ({"x": x, "labels": np.zeros(9)}, "different numbers of samples"),
        ({"x": x[:0], "labels": np.zeros(0)}, "no samples"),
        ({"x": x, "labels": np.array(3)}, "a single number"),
    ]
    for arrays, says in cases:
        np.savez(tmp_path / "odd.npz", **arrays)
        with pytest.raises(UsageError) as caught:
            session.load(asked(tools, models, net_data, "accuracy", data=str(tmp_path / "odd.npz")))
        assert says in caught.value.message and caught.value.fix, caught.value.message
    (tmp_path / "odd.npz").write_bytes(b"PK nothing")
    with pytest.raises(BadInput):
        session.load(asked(tools, models, net_data, "accuracy", data=str(tmp_path / "odd.npz")))
    with pytest.raises(UsageError, match="wants targets"):
        session.load(asked(tools, models, net_data, "accuracy", data=str(Path(net_data["folder"]) / "unlabelled.npz")))
    with pytest.raises(UsageError, match="there is no file"):
        session.load(asked(tools, models, net_data, "accuracy", data=str(tmp_path / "gone.npz")))


def test_fewer_samples_than_a_batch_are_taken_round(
    session: Session, tools: Any, models: Any, net_data: dict[str, str], tmp_path: Path
) -> None:
    arrays = np.load(net_data["data"])
    np.savez(tmp_path / "three.npz", x=arrays["x"][:3], labels=arrays["labels"][:3])
    accuracy = verified(session, asked(tools, models, net_data, "accuracy", data=str(tmp_path / "three.npz")))
    assert accuracy.passed and accuracy.metric is not None and (accuracy.metric.value, accuracy.metric.num_samples) == (1.0, 3)


def test_a_bundle_is_scored_against_what_its_model_scored(
    tools: Any, models: Any, net_data: dict[str, str], local: Any, tmp_path: Path
) -> None:
    candidate = asked(tools, models, net_data, "accuracy", backend="eager")
    report = jobs.compile(tools.job("compile", candidate, output=str(tmp_path / "b")))
    assert report.runs[-1].accuracy is not None and report.runs[-1].accuracy.metric is not None
    again = replace(tools.candidate(str(tmp_path / "b")), evaluation=candidate.evaluation)
    (run,) = jobs.bench(tools.job("bench", again)).runs
    assert run.accuracy is not None and run.accuracy.metric is not None and run.accuracy.metric.passed
    with pytest.raises(Unsupported, match="does not know"):
        other = replace(candidate.evaluation, metric=f"{net_data['metrics']}:loss")
        jobs.bench(tools.job("bench", replace(again, evaluation=other)))


def test_a_metric_that_raises_is_exit_2_of_the_command(
    tools: Any, models: Any, net_data: dict[str, str], local: Any, tmp_path: Path
) -> None:
    for verb, more in (("bench", {}), ("compile", {"output": str(tmp_path / "b")})):
        with pytest.raises(GpuoptError) as caught:
            getattr(jobs, verb)(tools.job(verb, asked(tools, models, net_data, "raises", backend="eager"), **more))
        assert caught.value.exit_code == 2 and "metrics.py:29" in caught.value.message
    assert not (tmp_path / "b").exists()


def test_recipes_and_reproducers_know_the_evaluation(net_data: dict[str, str], tools: Any, models: Any) -> None:
    text = "model: m.py:net\nevaluation:\n  data: d.npz\n  metric: m.py:score\n  min_ratio: 0.95\n  lower_is_better: true\n"
    job = recipe.parse(text)
    assert job.candidates[0].evaluation == EvalSpec(data="d.npz", metric="m.py:score", min_ratio=0.95, lower_is_better=True)
    line = figures.reproducer(job.candidates[0])
    assert "--eval-data d.npz --metric m.py:score --min-metric-ratio 0.95 --metric-lower-is-better" in line
    for wrong in ("min_ratio: 1.5", "min_ratio: 0"):
        with pytest.raises(UsageError, match="min_ratio"):
            recipe.parse(text.replace("min_ratio: 0.95", wrong))
    with pytest.raises(UsageError, match="no data"):
        recipe.parse("model: m.py:net\nevaluation: {metric: m.py:score}\n")
    with pytest.raises(UsageError, match="verification, which is off"):
        recipe.parse(text + "bench: {verify: 'off'}\n")
    assert json.dumps(line)
