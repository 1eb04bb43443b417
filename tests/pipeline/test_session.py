"""One session, step by step, in this process: every form, every kind of input and output, bundles, and rewrites that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt import converters
from gpuopt.bundles import write
from gpuopt.core.errors import GpuoptError, Unsupported, UsageError
from gpuopt.core.result import Status
from gpuopt.core.spec import BackendSpec, Candidate, DimSpec, InputSpec, ModelRef, Tolerance
from gpuopt.pipeline import figures, manifests
from gpuopt.pipeline.session import Session

Models = Callable[[str], str]


@pytest.fixture
def sessions() -> Iterator[Callable[[], Session]]:
    made: list[Session] = []

    def new() -> Session:
        made.append(Session())
        return made[-1]

    yield new
    for session in reversed(made):  # each puts back the precision switches it found
        session.close()


def bundled(session: Session, candidate: Candidate, target: Path, *, verify: bool = True) -> Any:
    """Load, build, verify and publish: what compile does."""
    run = figures.loaded(figures.started(candidate), session.load(candidate))
    run = figures.built(run, session.build(), candidate)
    if verify:
        run = figures.verified(run, session.verify(Tolerance()))
        assert run.status is Status.OK, run.reason
    with write.staging(target) as folder:
        saved = session.save(str(folder))
        return write.publish(folder, target, manifests.assemble(candidate, run, saved, verified=verify))


def verified(session: Session, candidate: Candidate, mode: str = "full") -> Any:
    session.load(candidate)
    session.build()
    return session.verify(Tolerance(), mode).accuracy


@pytest.mark.parametrize("backend", ["eager", "ort", "null"])
def test_a_module_goes_the_whole_way_and_its_bundle_comes_back(
    backend: str, sessions: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    candidate = tools.candidate(models("pair"), backend, N=3, S=5)
    first = sessions()
    manifest = bundled(first, candidate, tmp_path / "b")
    measured = first.measure(tools.QUICK)
    assert len(measured.samples.samples_ns) >= 10
    assert manifest.dims == {"N": 3, "S": 5}

    second = sessions()
    loaded = second.load(replace(tools.candidate(str(tmp_path / "b")), dims={}))
    assert (loaded.form, loaded.bundle_backend, loaded.dims) == ("bundle", backend, {"N": 3, "S": 5})
    built = second.build()
    assert built.executable
    accuracy = second.verify(Tolerance()).accuracy
    assert accuracy.passed, accuracy.reason
    assert "fp64" in accuracy.reference
    # The same inputs give the same outputs in both.
    given = first._given()
    ours = [t for _, t in flat(first.runner()(*given.args, **given.kwargs))]
    again = second._given()
    theirs = [t for _, t in flat(second.runner()(*again.args, **again.kwargs))]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-5, atol=1e-6)


def flat(outputs: Any) -> Any:
    from gpuopt.accuracy import compare

    return compare.flatten(outputs)


@pytest.mark.parametrize(("dims", "says"), [({"N": 4}, "N=4"), ({"Q": 1}, "Q=1"), ({"S": 6}, "S=6")])
def test_a_bundle_refuses_sizes_it_was_not_built_for(
    dims: dict[str, int], says: str, sessions: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    bundled(sessions(), tools.candidate(models("pair"), "eager", N=3, S=5), tmp_path / "b", verify=False)
    with pytest.raises(UsageError, match=says) as caught:
        sessions().load(replace(tools.candidate(str(tmp_path / "b")), dims=dims))
    assert caught.value.fix


def ranged(candidate: Candidate, name: str, low: int, usual: int, high: int) -> Candidate:
    return replace(candidate, inputs=InputSpec(dims=(DimSpec(name=name, values=(usual,), low=low, high=high),)), dims={name: usual})


def dynamic(backend: str, sessions: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    candidate = ranged(tools.candidate(models("net"), backend), "N", 1, 2, 4)
    manifest = bundled(sessions(), candidate, tmp_path / "b")
    assert manifest.dim_ranges == {"N": (1, 4)}
    for batch in (1, 2, 4):
        session = sessions()
        session.load(replace(tools.candidate(str(tmp_path / "b")), dims={"N": batch}))
        session.build()
        given = session._given()
        (x,) = [*given.args, *given.kwargs.values()]
        assert x.shape == (batch, 16)
        (out,) = [t for _, t in flat(session.runner()(*given.args, **given.kwargs))]
        wanted = models_module(models).net()(x)
        assert torch.allclose(out.double(), wanted.double(), rtol=1e-4, atol=1e-5)
        accuracy = session.verify(Tolerance()).accuracy
        assert accuracy.passed, accuracy.reason
    with pytest.raises(UsageError, match="N=5"):
        sessions().load(replace(tools.candidate(str(tmp_path / "b")), dims={"N": 5}))
    session = sessions()
    session.load(tools.candidate(str(tmp_path / "b")))
    session.build()
    with pytest.raises(GpuoptError):
        session.runner()(x=torch.ones(5, 16))


def models_module(models: Models) -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("small_models", models("net").rpartition(":")[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", ["eager", "ort"])
def test_a_range_of_sizes_is_honoured_inside_and_refused_outside(
    backend: str, sessions: Any, models: Models, tools: Any, tmp_path: Path
) -> None:
    dynamic(backend, sessions, models, tools, tmp_path)


@pytest.mark.slow
def test_aoti_honours_a_range_of_sizes(sessions: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    dynamic("aoti", sessions, models, tools, tmp_path)


# --- other forms


def test_a_torchscript_file_is_verified_against_itself_and_times(sessions: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    from gpuopt.trust import consent

    path = tmp_path / "m.pt"
    torch.jit.trace(models_module(models).net(), torch.ones(2, 16)).save(str(path))
    candidate = replace(
        tools.candidate(str(path), N=2),
        model=ModelRef(text=str(path), trust=(consent.sha256_of(path),)),
        inputs=InputSpec(tensors=(tools_spec("x:float32[N,16]"),)),
    )
    session = sessions()
    accuracy = verified(session, candidate)
    assert accuracy.passed
    assert "TorchScript" in accuracy.reference
    assert session.measure(tools.QUICK).samples.samples_ns


def tools_spec(text: str) -> Any:
    from gpuopt.core.spec import TensorSpec

    return TensorSpec.parse(text)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_an_exported_file_comes_back_as_a_model(kind: str, sessions: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    from gpuopt.trust import consent

    source = sessions()
    source.load(ranged(tools.candidate(models("net")), "N", 1, 2, 4))
    source.build()
    exported = source.export(kind, str(tmp_path), f"m.{kind}")
    assert exported.files[-1] == f"m.{kind}"
    path = tmp_path / f"m.{kind}"
    ref = ModelRef(text=str(path), trust=(consent.sha256_of(path),))
    for backend in ("ort",) if kind == "onnx" else ("eager", "ort"):
        session = sessions()
        accuracy = verified(session, replace(tools.candidate(str(path), backend, N=3), model=ref))
        assert accuracy.passed, accuracy.reason
        assert session._count is not None and session._count.flops == pytest.approx(2 * 3 * (16 * 24 + 24 * 8), rel=0.05)
    if kind == "onnx":
        session = sessions()
        session.load(replace(tools.candidate(str(path), "eager", N=3), model=ref))
        with pytest.raises(Unsupported, match="eager"):
            session.build()


def test_a_converted_safetensors_file_loads_into_its_architecture(sessions: Any, models: Models, tools: Any, tmp_path: Path) -> None:
    source = sessions()
    source.load(tools.candidate(models("net"), precision="bf16"))
    source.build()
    source.export("safetensors", str(tmp_path), "m.safetensors")
    path = str(tmp_path / "m.safetensors")
    candidate = replace(tools.candidate(path, N=2), model=ModelRef(text=path, arch=models("net"), cast=True))
    assert verified(sessions(), candidate).passed


# --- candidates that lie, in ways that show late


LIES = {
    "wrong": Status.ACCURACY_FAIL,
    "nan": Status.NAN,
    "wrong_shape": Status.ACCURACY_FAIL,
    "wrong_dtype": Status.ACCURACY_FAIL,
    "missing_output": Status.ACCURACY_FAIL,
    "extra_output": Status.ACCURACY_FAIL,
    "slightly_wrong": Status.ACCURACY_FAIL,
    "nondeterministic": Status.ACCURACY_FAIL,
    "mutate_inputs": Status.ACCURACY_FAIL,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_and_called_by_its_name(lie: str, sessions: Any, models: Models, tools: Any) -> None:
    accuracy = verified(sessions(), tools.candidate(models("net"), f"null:fail={lie}", N=4))
    assert not accuracy.passed
    assert accuracy.status is LIES[lie]
    assert accuracy.reason and "\n" not in accuracy.reason
    if lie == "mutate_inputs":
        assert accuracy.mutates_inputs
    if lie == "nondeterministic":
        assert accuracy.deterministic is False


def test_a_lie_on_one_input_alone_is_found(sessions: Any, models: Models, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right on the first seed, wrong on the second: a candidate that was tuned to the inputs it was built with."""
    from gpuopt.backends import null

    session = sessions()
    session.load(tools.candidate(models("net"), "null", N=4))
    session.build()
    honest = session._given().kwargs["x"].clone()
    real = null.NullRunner.__call__

    def fitted(self: Any, x: Any) -> Any:
        out = real(self, x=x)
        return out if torch.equal(x, honest) else out * 1.01

    monkeypatch.setattr(null.NullRunner, "__call__", fitted)
    accuracy = session.verify(Tolerance()).accuracy
    assert accuracy.status is Status.ACCURACY_FAIL
    assert accuracy.deterministic


def test_honest_models_that_write_into_their_inputs_pass_and_say_so(sessions: Any, models: Models, tools: Any) -> None:
    """Every side must see the inputs as they were made, not as the side before left them."""
    for backend in ("eager", "null"):
        accuracy = verified(sessions(), tools.candidate(models("writer"), backend, N=4))
        assert accuracy.passed, (backend, accuracy.reason)
        assert accuracy.mutates_inputs
        assert any("writes into its inputs" in note for note in accuracy.notes)


def test_a_dropped_bias_hidden_by_bf16_shows_in_the_structure_stage(
    sessions: Any, models: Models, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = converters.apply

    def wrong(model: Any, precision: Any, transforms: Any, inputs: Any = None, **kwargs: Any) -> Any:
        changed = real(model, precision, transforms, inputs, **kwargs)
        if transforms.channels_last:  # the candidate alone; references and twins change nothing
            with torch.no_grad():
                changed.module.conv.bias.zero_()
        return changed

    monkeypatch.setattr(converters, "apply", wrong)
    candidate = tools.candidate(models("conv"), "eager", "bf16", N=8)
    candidate = replace(candidate, transforms=replace(candidate.transforms, channels_last=True))
    assert verified(sessions(), candidate, "precision").passed, "bf16 hides it"
    accuracy = verified(sessions(), candidate, "full")
    assert not accuracy.passed
    assert accuracy.reason.startswith("structure")
    stages = {stage.name: stage.passed for stage in accuracy.stages}
    assert stages == {"structure": False, "precision": True, "scales": True}


def test_tf32_and_precision_flags_are_as_they_were_after_close(models: Models, tools: Any) -> None:
    before = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision())
    session = Session()
    session.load(tools.candidate(models("net")))
    session.build()
    session.close()
    session.close()
    after = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision())
    assert after == before


def test_what_is_not_there_is_named(sessions: Any, models: Models, tools: Any) -> None:
    with pytest.raises(UsageError, match="Q"):
        sessions().load(tools.candidate(models("net"), Q=3))
    with pytest.raises(GpuoptError, match="tf32|TF32"):
        sessions().load(tools.candidate(models("net"), precision="tf32"))
    session = sessions()
    session.load(replace(tools.candidate(models("net")), backend=BackendSpec(name="eagre")))
    with pytest.raises(UsageError) as caught:
        session.build()
    assert "eager" in caught.value.fix


def test_a_profile_accounts_for_the_whole_time(sessions: Any, models: Models, tools: Any) -> None:
    session = sessions()
    session.load(tools.candidate(models("net"), N=64))
    session.build()
    measured = session.measure(tools.QUICK)
    wall_ms = measured.samples.wall_ns / len(measured.samples.samples_ns) / 1e6
    profiled = session.profile(tools.fake_survey().device, wall_ms, 3)
    assert sum(part.ms for part in profiled.waterfall.parts) == pytest.approx(profiled.waterfall.wall_ms, rel=0.02)
    assert {"first", "last"} <= {row.name for row in profiled.modules}
