"""A session's profile names modules where the trace names none: compiled code on a CPU, a replayed graph made up from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpuopt.core.spec import BackendSpec
from gpuopt.core.trace import Kernel, Trace
from gpuopt.pipeline.session import Session
from gpuopt.profiling import trace as profiler


@pytest.fixture
def sessions() -> Iterator[Callable[[], Session]]:
    opened: list[Session] = []

    def new() -> Session:
        opened.append(Session())
        return opened[-1]

    yield new
    for session in reversed(opened):  # each puts back the precision switches it found
        session.close()


def test_the_products_of_compiled_code_have_modules_and_lines(sessions: Any, models: Any, tools: Any) -> None:
    session = sessions()
    session.load(replace(tools.candidate(models("net"), N=64), backend=BackendSpec(name="inductor")))
    session.build()
    profiled = session.profile(tools.fake_survey().device, wall_ms=50.0, depth=3)
    times = {row.name: row.time_ns for row in profiled.modules}
    assert (times["first"] or 0) > 0 and (times["last"] or 0) > 0
    assert (profiled.attributed or 0) > 0
    # What the doctor sees is the same.
    found = {r.module: r for r in session._seen.records if r.op == "aten.addmm"}
    assert set(found) == {"first", "last"}
    assert found["first"].flops == 2 * 64 * 16 * 24 and found["first"].line


class Recorded:
    """A runner that replays what its module would launch; its kernels are made up from the ops of the trace without the graph."""

    def __init__(self, runner: Any, module: torch.nn.Module) -> None:
        self.runner, self.module, self.device = runner, module, "cpu"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given = (args, kwargs)
        return self.runner(*args, **kwargs)

    def close(self) -> None:
        self.runner.close()

    def ungraphed(self) -> Any:
        args, kwargs = self.given
        return self.module, lambda: self.module(*args, **kwargs)


def kernels_of(trace: Trace, *, is_graph: bool, extra: tuple[str, ...] = ()) -> Trace:
    made = [
        Kernel(name=f"k_{op.name}", start_ns=op.start_ns, dur_ns=1000, stream=7, correlation=1, op=op.index, step=op.step)
        for op in trace.ops
        if op.step is not None and op.name in ("aten::addmm", "aten::relu")
    ]
    made += [Kernel(name=name, start_ns=10**12, dur_ns=1000, stream=7, correlation=1, op=None, step=0) for name in extra]
    if is_graph:
        made = [replace(k, op=None, graph_id=5) for k in made]
    return replace(trace, device="cuda:0", kernels=tuple(made))


@pytest.mark.parametrize("is_short_of_memory", [False, True])
def test_a_replay_is_named_by_the_call_it_was_recorded_from(
    sessions: Any, models: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, is_short_of_memory: bool
) -> None:
    session = sessions()
    session.load(tools.candidate(models("net"), N=64))
    session.build()
    session._runner = Recorded(session._runner, session._changed.module)
    record = profiler.record

    def traced(call: Any, device: str, *, steps: int = 3, with_modules: Any = None, **options: Any) -> Trace:
        if with_modules is not None and is_short_of_memory:
            raise torch.OutOfMemoryError("full")
        found: Trace = record(call, device, steps=steps, with_modules=with_modules, **options)
        return kernels_of(found, is_graph=with_modules is None, extra=("copy_node",) if with_modules is None else ())

    monkeypatch.setattr(profiler, "record", traced)
    monkeypatch.setattr(session, "_is_eager", lambda: False)
    profiled = session.profile(tools.fake_survey().device, wall_ms=50.0, depth=3)
    records = {(r.module, r.op): r for r in session._seen.records}
    if is_short_of_memory:
        assert profiled.attributed == 0.0 and "no memory" in profiled.notes[0]
        return
    assert set(records) == {("first", "aten.addmm"), ("", "aten.relu"), ("last", "aten.addmm"), ("?", "copy_node")}
    assert records["last", "aten.addmm"].flops == 2 * 64 * 24 * 8 and records["last", "aten.addmm"].count == 1
    assert 0.8 < (profiled.attributed or 0) < 1.0
