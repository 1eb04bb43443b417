"""A session that ends, whichever way, leaves the module its weights and nothing else: no locked page, no wrapped forward, no complaint."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import streams

from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import Candidate, InputSpec, ModelRef, TensorSpec
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.streamed import device
from gpuopt.pipeline.streamed.session import StreamSession

IDS = torch.arange(6)[None]
HALF = StreamSpec(budget_share=0.5)


def stack() -> Any:
    space: dict[str, Any] = {}
    exec(compile(streams.FACTORY, "stack.py", "exec"), space)
    return space["build"]()


@torch.inference_mode()
def output(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(IDS)
    return found


def of(module: Any, *, live: bool = True) -> StreamSession:
    session = StreamSession()
    candidate = Candidate(model=ModelRef(text=""), device="simulated")
    model = Model(form="module", name="stack", module=module)
    session.adopt(candidate, StreamRequest(action="run"), model, device.parse(streams.DEVICE), Inputs(args=(IDS,), dims={"N": 1, "S": 6}))
    session._is_live = live
    return session


def require_untouched(module: Any) -> None:
    assert torch.equal(output(module), output(stack()))
    assert all("forward" not in vars(part) for part in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), stack().parameters(), strict=True))


@pytest.mark.parametrize("live", [True, False])
def test_a_session_that_is_dropped_while_bound_gives_the_weights_back(live: bool) -> None:
    """What the garbage collector finds first (pages, or who reads them) must not matter; an exception in a finaliser would fail this test."""
    module = stack()
    session = of(module, live=live)
    session.bind(HALF)
    output(module)
    del session
    gc.collect()
    require_untouched(module)


def test_closing_closes_what_others_have_bound_and_then_the_memory_behind_it() -> None:
    module = stack()
    session = of(module, live=False)
    plan = session.plan(HALF).plan
    held = session.streamed(plan)
    bound = held.__enter__()
    engine = bound.engine
    assert engine.pinned_bytes
    session.close()
    require_untouched(module)
    assert engine.pinned_bytes == 0
    session.close()
    del held, bound
    gc.collect()
    require_untouched(module)


def test_breaking_off_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stack()
    with pytest.raises(ZeroDivisionError), of(module, live=False) as session:
        with session.streamed(session.plan(HALF).plan, audit=True) as bound:
            output(module)
            engine = bound.engine
            raise ZeroDivisionError
    assert engine.pinned_bytes == 0
    require_untouched(module)


def test_one_budget_after_the_other_is_bound_to_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of the weights once: nothing is written, summed or locked a second time."""
    from gpuopt.streaming.engines.simulated import SimulatedEngine

    homes: list[int] = []
    kept = SimulatedEngine.home

    def home(self: SimulatedEngine, num_bytes: int, pin: bool) -> Any:
        homes.append(num_bytes)
        return kept(self, num_bytes, pin)

    monkeypatch.setattr(SimulatedEngine, "home", home)
    module = stack()
    with of(module, live=False) as session:
        places = set()
        for share in (0.4, 0.6, 0.8, 0.5):
            ready = session.bind(StreamSpec(budget_share=share))
            assert ready.plan is not None
            assert ready.pinned_bytes == sum(u.num_bytes for u in ready.plan.anatomy.units if u.name in ready.plan.binding)
            assert torch.equal(output(module), output(stack()))
            session.release()
            places.add(tuple(p.data_ptr() for p in module.layers.parameters()))
        assert len(homes) == 8 and len(places) == 1
    require_untouched(module)


def test_weights_that_were_changed_between_two_bindings_are_read_again() -> None:
    module = stack()
    with of(module, live=False) as session:
        session.bind(HALF)
        session.release()
        fresh = stack()
        with torch.no_grad():
            for part in (module, fresh):
                for layer in part.layers:
                    layer.up.weight.data = layer.up.weight.data * 1.5
        session.bind(HALF)
        assert torch.equal(output(module), output(fresh))
    assert torch.equal(output(module), output(fresh))


def test_a_callers_host_memory_is_free_while_a_block_is_resident() -> None:
    module = stack()
    with of(module) as session:
        ready = session.bind(HALF)
        assert ready.plan is not None and session._shelf is not None
        assert ready.plan.resident and all(name not in session._shelf for name in ready.plan.resident)
        assert all(name in session._shelf for name in ready.plan.binding)
    require_untouched(module)


def test_pages_that_are_collected_first_still_have_the_bytes_to_give_back() -> None:
    """A garbage collector runs finalisers in any order: pages are unlocked by then, and read all the same."""
    module = stack()
    session = of(module, live=False)
    session.bind(HALF)
    engine = session._engine
    assert session._shelf is not None and engine.pinned_bytes
    for home in session._shelf._homes.values():
        home.__del__()  # type: ignore[attr-defined]
    assert engine.pinned_bytes == 0
    session.close()
    require_untouched(module)


def test_other_inputs_are_planned_anew_and_find_the_weights_where_they_are() -> None:
    """Prompts of several lengths: one model, laid out once."""
    module = stack()
    with of(module, live=False) as session:
        first = session.plan(HALF).plan
        session.bind(HALF)
        places = [home.bytes.data_ptr() for home in session._shelf._homes.values()]  # type: ignore[union-attr]
        candidate = Candidate(
            model=ModelRef(text=""),
            inputs=InputSpec(tensors=(TensorSpec.parse("ids:int64[N,S]<50"),)),
            dims={"N": 2, "S": 512},
            device="simulated",
        )
        opened = session.aim(candidate, StreamRequest(action="run"))
        assert opened.dims == {"N": 2, "S": 512} and opened.workload == "prefill N=2 S=512"
        second = session.plan(HALF).plan
        assert second.calibration.workload != first.calibration.workload
        session.bind(HALF)
        assert [home.bytes.data_ptr() for home in session._shelf._homes.values()] == places  # type: ignore[union-attr]
        assert torch.equal(session.work.forward(), session.work.forward())
    require_untouched(module)


def test_compiled_blocks_are_held_against_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code rounds otherwise than eager: here by a thousandth."""
    made = []

    def rounding(call: Any, **options: Any) -> Any:
        made.append(call)
        return lambda *args: call(*args) * 1.001

    monkeypatch.setattr(torch, "compile", rounding)
    module = stack()
    with of(module) as session:
        found = session.verify(StreamSpec(budget_share=0.5, compile=True), forwards=6)
    assert {check.name: check.passed for check in found.checks} == dict.fromkeys(("checksums", "outputs", "races", "order"), True)
    assert "compiled too" in next(check.detail for check in found.checks if check.name == "outputs")
    assert len(made) >= 2 * 8, "the reference's blocks and the streamed model's"
    require_untouched(module)
