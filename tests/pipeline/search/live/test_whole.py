"""A pipeline of modules: its calls are recorded, what is faster takes their place, and everything comes back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gpuopt.core.errors import GateFailed, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.result import Report
from gpuopt.core.search import Choice, Search, SearchSpec
from gpuopt.core.spec import BenchSpec, Candidate, ModelRef, Precision, Tolerance
from gpuopt.pipeline import environment
from gpuopt.pipeline.search.live import calls, handed, overheard, searched, whole

QUICK = BenchSpec(
    min_time_s=0.02, max_time_s=1.5, min_iterations=1, warmup_s=0.01, max_warmup_s=0.05, block_ms=3.0, num_pairs=15, energy_s=0.0
)
"""Fifteen short pairs rather than six long ones: the interval of six is their extremes, and on a shared machine one sleep in six ends late."""
HALF = SearchSpec(backends=("eager",), precisions=("bf16",), rewrites=())
"""The input and one candidate beside it."""


class Slow(nn.Module):
    """Slow in float32 alone, so that a narrower precision is faster on any machine."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.lin, self.ms = nn.Linear(16, 16), ms

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, *, return_dict: bool = True) -> Any:
        time.sleep((self.ms if x.dtype == torch.float32 else self.ms / 10) / 1e3)
        y = self.lin(x) if scale is None else self.lin(x) * scale
        return {"y": y} if return_dict else (y,)


class Pipe:
    """Text in, image out, as a diffusion pipeline is built: one module that is called in a loop, one that is not worth it, one called in two ways."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.cold, self.vae = Slow(5.0).eval(), nn.Linear(16, 16).eval(), Slow(3.0).eval()
        self.again = self.unet
        self.steps = 3
        self.fail: Callable[[int], bool] = lambda number: False
        self.runs = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.runs += 1
        if self.fail(self.runs):
            raise ValueError("the scheduler has no such step")
        with torch.no_grad():
            x = self.cold(torch.randn(4, 16))
            for _ in range(self.steps):
                x = self.unet(x, torch.ones(()), return_dict=False)[0]
            return {"image": self.vae(x)["y"], "preview": self.vae(x[:1])["y"]}


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    found = Pipe()
    yield found
    for module in (found.unet, found.cold, found.vae):
        assert not module._forward_hooks and not module._forward_pre_hooks, "a hook was left"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests before these may have left more: threads that spin on a shared core make sleeps end late."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, unmeasured: None) -> None:
    """In this process: a class of a test cannot be imported by another."""

    def stays(*_: Any) -> Any:
        raise handed.CannotHand("a test")

    monkeypatch.setattr(handed, "handed", stays)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every search finds bf16, without searching; what was found is built and verified all the same."""

    def found(module: nn.Module, inputs: Inputs, *, bench: BenchSpec, tolerance: Tolerance, more: Any, **_: Any) -> searched.Optimized:
        candidate = Candidate(model=ModelRef(text=""), precision=Precision.BF16)
        choice = Choice(key="k", keeps_input=False, because="5x", speedup=5.0, change="bf16 eager")
        report = Report(
            schema_version=1,
            command="",
            verb="optimize",
            environment=environment.describe(),
            search=Search(goal="latency", choice=choice, seconds=0.1),
        )
        try:
            call = searched._standing(module, inputs, candidate, more=more, bench=bench, tolerance=tolerance)
        except GateFailed as error:
            return searched._kept(module, report, candidate, error.message, searched._Heard())
        return searched.Optimized(report=report, model=call, candidate=candidate)

    monkeypatch.setattr(searched, "optimized", found)


def optimized(pipe: Pipe, run: Callable[[], Any] | None = None, **more: Any) -> whole.OptimizedPipeline:
    fields = {"spec": HALF, "bench": QUICK, "tolerance": Tolerance()} | more
    return whole.optimized(pipe, run or pipe, **fields)


def test_the_hot_modules_are_replaced_and_the_cold_one_is_left_alone(pipe: Pipe, decided: None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        before = pipe()
    with optimized(pipe) as found:
        by_name = {(p.module, p.call.partition(" ")[0]): p for p in found.parts}
        hot = by_name["unet", "float32[4,16]"]
        assert found.is_in_place, str(found)
        assert hot.outcome == "replaced" and hot.calls == 3 and hot.share > 0.4
        assert next(p.module for p in found.parts) == "unet", "the longest time comes first"
        cold = next(p for p in found.parts if p.module == "cold")
        assert cold.outcome == "left alone" and "of the time" in cold.reason
        assert {(p.module, p.outcome) for p in found.parts if p.kind == "Slow"} == {("unet", "replaced"), ("vae", "replaced")}
        assert len([p for p in found.parts if p.module == "vae"]) == 2, "two signatures are two kinds of call"
        assert found.measured is not None and found.measured.verdict == "faster"
        assert found.predicted_speedup is not None and found.predicted_speedup > 2
        assert found.error is not None and 0 < found.error < 0.05 and found.own_error == 0
        served = found.served["unet"]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            after = pipe()
        assert found.served["unet"] == served + 3 and not found.fallbacks
        assert after["image"].dtype == torch.float32
        assert torch.allclose(before["image"], after["image"], atol=0.05)
        assert "the whole is" in str(found) and "unet" in str(found)
    assert "forward" not in vars(pipe.unet) and "forward" not in vars(pipe.vae)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(pipe()["image"], before["image"])


def test_a_real_search_decides_what_takes_a_modules_place(pipe: Pipe) -> None:
    pipe.vae = nn.Identity().eval()  # type: ignore[assignment]
    pipe.unet.ms = 30.0  # other tests may take the cores for some milliseconds

    def run() -> Any:
        with torch.no_grad():
            return pipe.unet(torch.ones(4, 16), torch.ones(()))

    with optimized(pipe, run) as found:
        (part,) = found.parts
        assert part.outcome == "replaced" and part.report is not None and part.speedup is not None and part.speedup > 2, str(found)
        assert any(f.code == "not-isolated" and "a test" in f.message for f in part.report.findings)
        assert part.report.search is not None and len(part.report.search.trials) == 2
        assert found.is_in_place and found.measured is not None and found.measured.ratio > 2
        assert part.predicted_speedup is not None and found.measured.ratio < part.speedup * 1.5
        out = run()
        assert set(out) == {"y"} and out["y"].dtype == torch.float32


def test_a_call_that_nothing_was_built_for_goes_to_the_module_itself_and_is_said(pipe: Pipe, decided: None) -> None:
    found = optimized(pipe)
    x = torch.randn(7, 16)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"unet runs as it was.*float32\[7,16\]"):
            out = pipe.unet(x, torch.ones(()), return_dict=False)
        pipe.unet(x, torch.ones(()), return_dict=False)  # told once
        with pytest.warns(UserWarning, match="with other arguments"):
            pipe.unet(x[:4], torch.ones(()))
        with pytest.warns(UserWarning, match="called with a "):
            pipe.unet(x[:4], Scale())
    assert {k.partition(" ")[0]: n for k, n in found.fallbacks["unet"].items()} == {"float32[7,16]": 2, "float32[4,16]": 1, "called": 1}
    found.restore()
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, torch.ones(()), return_dict=False)[0], out[0])
    found.restore()  # harmless twice


class Scale:
    """Neither a tensor nor a constant."""

    def __rmul__(self, other: Any) -> Any:
        return other


def test_gradients_of_inputs_are_the_modules_own(pipe: Pipe, decided: None) -> None:
    with optimized(pipe) as found:
        x = torch.randn(4, 16, requires_grad=True)
        with pytest.warns(UserWarning, match="gradients"):
            pipe.unet(x, torch.ones(()), return_dict=False)[0].sum().backward()
        assert x.grad is not None and found.fallbacks["unet"] == {"gradients of its inputs are wanted": 1}


def test_what_run_raises_while_it_is_recorded_is_raised_and_nothing_is_left_behind(pipe: Pipe, decided: None) -> None:
    for number in (1, 2, 3):
        pipe.runs, pipe.fail = 0, lambda n, number=number: n == number  # type: ignore[misc]
        with pytest.raises(ValueError, match="no such step"):
            optimized(pipe)
        assert "forward" not in vars(pipe.unet)
        assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_what_run_raises_with_the_winners_in_place_undoes_them(pipe: Pipe, decided: None) -> None:
    pipe.fail = lambda number: "forward" in vars(pipe.unet)
    found = optimized(pipe)
    assert not found.is_in_place and "run() raised ValueError: the scheduler has no such step" in found.because
    assert "forward" not in vars(pipe.unet) and "forward" not in vars(pipe.vae)
    assert all(p.outcome != "replaced" for p in found.parts)


def test_ctrl_c_with_the_winners_in_place_undoes_them(pipe: Pipe, decided: None) -> None:
    def run() -> Any:
        if "forward" in vars(pipe.unet):
            raise KeyboardInterrupt
        return pipe()

    with pytest.raises(KeyboardInterrupt):
        optimized(pipe, run)
    assert "forward" not in vars(pipe.unet)


def test_a_whole_that_is_no_faster_keeps_its_modules(pipe: Pipe, decided: None) -> None:
    """Each module is faster by itself, and the run waits for something else when they are."""

    def run() -> Any:
        if "forward" in vars(pipe.unet):
            time.sleep(0.08)
        return pipe()

    found = optimized(pipe, run)
    assert not found.is_in_place and "keep what you have: the whole is slower" in found.because
    assert found.measured is not None and found.before_ms is not None and found.after_ms is not None and found.after_ms > found.before_ms
    assert "forward" not in vars(pipe.unet)


def test_a_whole_whose_outputs_are_too_far_off_keeps_its_modules(pipe: Pipe, decided: None) -> None:
    found = optimized(pipe, tolerance=Tolerance(max_error=0.5))
    assert found.is_in_place
    found.restore()

    def run() -> Any:
        out = pipe()
        return {"image": torch.sign(out["image"]) * (-1.0 if "forward" in vars(pipe.unet) else 1.0)}

    found = optimized(pipe, run)
    assert not found.is_in_place and "differ by 2 of their size" in found.because, found.because


def test_a_run_draws_the_same_numbers_every_time_and_leaves_the_callers_generators_alone(pipe: Pipe, decided: None) -> None:
    seen: list[tuple[float, float]] = []

    def run() -> Any:
        seen.append((random.random(), float(torch.rand(()))))
        return pipe()

    torch.manual_seed(7)
    random.seed(7)
    expected = (random.random(), float(torch.rand(())))
    torch.manual_seed(7)
    random.seed(7)
    with optimized(pipe, run):
        assert len(set(seen)) == 1
        assert (random.random(), float(torch.rand(()))) == expected


def test_a_module_in_training_mode_with_hooks_or_a_forward_of_its_own_is_left_alone(pipe: Pipe, decided: None) -> None:
    pipe.unet.train()
    handle = pipe.vae.lin.register_forward_hook(lambda *_: None)
    pipe.cold.forward = pipe.cold.forward  # type: ignore[method-assign]
    found = optimized(pipe)
    reasons = {p.module: p.reason for p in found.parts}
    assert "training mode" in reasons["unet"] and "forward hooks" in reasons["vae"] and "replaced" in reasons["cold"]
    assert not found.is_in_place and "every module was left alone" in found.because
    handle.remove()


def test_modules_are_found_once_under_their_first_name_in_attributes_components_lists_and_plain_objects() -> None:
    class Holder:
        def __init__(self) -> None:
            self.one = nn.Linear(2, 2)
            self.same = self.one
            self.many = {"a": nn.Linear(2, 2), "b": [nn.ReLU()]}
            self.inner = Inner()

    class Inner:
        def __init__(self) -> None:
            self.deep, self.back = nn.Tanh(), self

    assert list(overheard.modules_of(Holder())) == ["one", "many.a", "many.b.0", "inner.deep"]
    assert list(overheard.modules_of(nn.Sequential(nn.ReLU(), nn.ModuleList([nn.Tanh()])))) == ["0", "1.0"]

    class Diffusers:
        def __init__(self) -> None:
            self._unet = nn.Linear(2, 2)

        @property
        def components(self) -> dict[str, Any]:
            return {"unet": self._unet, "scheduler": None}

    assert list(overheard.modules_of(Diffusers())) == ["unet"]


def test_a_module_that_is_entered_by_a_method_is_seen_in_what_the_method_calls() -> None:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.decoder(x)
            return out

    vae = Vae().eval()
    found = overheard.outermost({"vae": vae}, lambda: vae.decode(torch.ones(1, 4)))
    assert list(found) == ["vae.decoder"], "what the decoder itself calls is inside its call"
    recording = overheard.record(found, lambda: vae.decode(torch.ones(1, 4)), lambda: None)
    assert [(g.name, g.calls, g.text) for g in recording.groups] == [("vae.decoder", 1, "float32[1,4]")]


def test_calls_that_cannot_be_made_again_are_told_apart() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor, how: Any = None) -> Any:
            if how == "write":
                return x.add_(1)
            return object() if how == "object" else x + 1

    odd = Odd().eval()

    def run() -> None:
        for how in ("write", "object", object(), None, None):
            odd(torch.ones(2), how)

    groups = overheard.record({"odd": odd}, run, lambda: None).groups
    assert sorted((g.reason, g.calls) for g in groups) == [
        ("", 2),
        ("it is called with a object", 1),
        ("it returns a object", 1),
        ("it writes into its inputs", 1),
    ]


def test_a_holder_without_modules_and_a_run_that_calls_none_are_refused(pipe: Pipe, decided: None) -> None:
    with pytest.raises(UsageError, match="no nn.Module was found in a dict"):
        whole.optimized({}, lambda: None, spec=HALF, bench=QUICK, tolerance=Tolerance())
    with pytest.raises(UsageError, match="called none of the modules"):
        optimized(pipe, lambda: None)
    with pytest.raises(UsageError, match="the pipeline is on cpu"):
        optimized(pipe, device="cuda")


def test_a_call_is_taken_apart_and_put_together_again() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    args, kwargs = (a, None, [b, {"k": a}]), {"flag": True, "size": (1, 2.5)}
    tensors, template = calls.taken(args, kwargs)
    assert [id(t) for t in tensors] == [id(a), id(b), id(a)]
    again_args, again_kwargs = calls.filled(template, tensors)
    assert again_args[0] is a and again_args[2][1]["k"] is a and again_kwargs == kwargs
    assert calls.taken(args, {"flag": 1, "size": (1, 2.5)})[1] != template, "1 is not True"
    with pytest.raises(calls.NotPlain, match="a set"):
        calls.taken(({1},), {})


def test_a_winner_that_fails_in_this_process_is_not_put_in_place(monkeypatch: pytest.MonkeyPatch, pipe: Pipe, decided: None) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise GateFailed("built in this process it is outside the accuracy gate: y", fix="")

    monkeypatch.setattr(searched.standin, "way", never)
    found = optimized(pipe)
    assert not found.is_in_place
    assert all("does not hold in this process" in p.reason for p in found.parts if p.kind == "Slow")
