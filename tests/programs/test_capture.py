"""Graphs on a CPU: a stand-in records a tape of ops at fixed addresses, as a CUDA graph does; what only a GPU can say is in tests/backends/test_inductor_gpu.py."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from gpuopt.core.accepts import Accepts
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import capture

sys.path.insert(0, str(Path(__file__).parents[1]))

from tapes import FakeRecorder, Stream, Tape


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, Any]:
        y = self.inner(x) * self.scale + shift
        return {"y": y, "pair": (y.sum(), x), "nothing": None}


def given(batch: int = 2) -> Inputs:
    specs = (TensorSpec.parse("x:float32[N,8]"), TensorSpec.parse("shift:float32[4]"))
    return Inputs(args=(torch.randn(batch, 8),), kwargs={"shift": torch.randn(4)}, specs=specs, dims={"N": batch})


def graphs(call: Any, inputs: Inputs, ranges: Any = None, **how: Any) -> tuple[capture.Graphs, FakeRecorder]:
    recorder = FakeRecorder()
    made = capture.Graphs(call, Accepts.of(inputs, ranges, any_layout=True), recorder=recorder, **how)  # type: ignore[arg-type]
    made.record(inputs)
    return made, recorder


def one(call: Callable[[torch.Tensor], Any], x: torch.Tensor, **how: Any) -> tuple[capture.Graphs, FakeRecorder]:
    return graphs(call, Inputs(args=(x,), specs=(TensorSpec.parse(f"x:float32[{','.join(map(str, x.shape))}]"),)), **how)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_call_gives_the_callables_answer_for_inputs_it_was_not_recorded_with() -> None:
    net = Net()
    made, recorder = graphs(net, given())
    for inputs in (given(), given()):
        out, wanted = made(*inputs.args, **inputs.kwargs), net(*inputs.args, **inputs.kwargs)
        torch.testing.assert_close(out["y"], wanted["y"])
        torch.testing.assert_close(out["pair"][0], wanted["pair"][0])
        assert torch.equal(out["pair"][1], inputs.args[0])
        assert "nothing" not in out and not out["y"].requires_grad
    assert recorder.runs == capture.WARMUP and len(recorder.tapes) == 1 and recorder.tapes[0].replays == 2


@hypothesis.settings(deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_results_kept_over_any_number_of_calls_stay_what_they_were(values: list[int]) -> None:
    made, _ = one(lambda x: {"twice": x * 2, "itself": x, "view": x.view(-1)}, torch.zeros(2, 3))
    kept = [made(torch.full((2, 3), float(value))) for value in values]
    for value, out in zip(values, kept, strict=True):
        assert all(
            torch.equal(out[key].unique(), torch.tensor([factor * float(value)]))
            for key, factor in (("twice", 2), ("itself", 1), ("view", 1))
        )


def test_static_outputs_are_the_graphs_own_memory() -> None:
    made, _ = one(lambda x: x * 2, torch.zeros(3), static_outputs=True)
    first = made(torch.ones(3))
    second = made(torch.full((3,), 5.0))
    assert first is second and torch.equal(first, torch.full((3,), 10.0))


def test_the_callers_tensors_are_neither_kept_nor_changed() -> None:
    x = torch.ones(3)
    made, _ = one(lambda x: x + 1, x)
    assert made.static_inputs[0] is not x
    made(torch.full((3,), 9.0))
    assert torch.equal(x, torch.ones(3))
    x.fill_(4.0)
    assert torch.equal(made(x), torch.full((3,), 5.0))


def copies(call: Callable[[], Any]) -> int:
    with Tape() as tape:
        call()
    return sum(str(step[0]) == "aten.copy_.default" for step in tape.steps)


def test_what_is_in_the_buffer_already_is_not_copied() -> None:
    made, _ = one(lambda x: x + 1, torch.ones(2, 2))
    (own,) = made.static_inputs
    found = made._newest
    assert found is not None
    assert (
        copies(lambda: found.fill((own,)))
        == copies(lambda: found.fill((own.view(2, 2),)))
        == copies(lambda: found.fill((own.detach(),)))
        == 0
    )
    assert copies(lambda: found.fill((torch.ones(2, 2),))) == 1


def test_a_turned_view_of_the_buffer_is_another_input() -> None:
    made, _ = one(lambda x: x + 0, torch.zeros(3, 3))
    (own,) = made.static_inputs
    values = torch.arange(9.0).view(3, 3)
    own.copy_(values)
    assert torch.equal(made(own.t()), values.t())


def test_buffers_given_in_each_others_place_are_read_before_they_are_written() -> None:
    specs = (TensorSpec.parse("a:float32[3]"), TensorSpec.parse("b:float32[3]"))
    made, _ = graphs(lambda a, b: a - b, Inputs(args=(torch.zeros(3), torch.zeros(3)), specs=specs))
    a, b = made.static_inputs
    a.fill_(1.0)
    b.fill_(10.0)
    assert torch.equal(made(b, a), torch.full((3,), 9.0))


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((torch.zeros(3, 8),), {"shift": torch.zeros(4)}, "dimension 0 was built for 2"),
        ((torch.zeros(2, 8).double(),), {"shift": torch.zeros(4)}, "float64"),
        ((torch.zeros(2, 8, device="meta"),), {"shift": torch.zeros(4)}, "on meta"),
        ((torch.zeros(2, 8).tolist(),), {"shift": torch.zeros(4)}, "list"),
        ((torch.zeros(2, 8),), {}, "missing"),
        ((torch.zeros(2, 8),), {"shft": torch.zeros(4)}, "missing"),
        ((torch.zeros(2, 8),), {"shift": torch.zeros(4), "more": torch.zeros(4)}, "no input 'more'"),
        ((torch.zeros(2, 8), torch.zeros(4)), {}, "2 positional"),
        ((torch.zeros(2, 8),), {"shift": None}, "NoneType"),
    ],
)
def test_what_would_be_broadcast_cast_or_left_out_is_refused(args: Any, kwargs: Any, said: str) -> None:
    made, recorder = graphs(Net(), given())
    with pytest.raises(UsageError, match=said):
        made(*args, **kwargs)
    assert not recorder.tapes[0].replays


def test_a_range_is_recorded_once_a_shape_and_the_one_unused_for_longest_makes_room() -> None:
    net = Net()
    made, recorder = graphs(net, given(2), {"N": (1, 64)})
    sizes = list(range(1, capture.KEPT + 1))
    for size in (*sizes, *sizes):
        inputs = given(size)
        torch.testing.assert_close(made(*inputs.args, **inputs.kwargs)["y"], net(*inputs.args, **inputs.kwargs)["y"])
    assert len(recorder.tapes) == made.num_kept == capture.KEPT
    made(*given(2).args, shift=torch.zeros(4))  # recorded first, and now size 1 is the one used longest ago
    before = recorder.synchronized
    made(*given(40).args, shift=torch.zeros(4))
    assert made.num_kept == capture.KEPT and len(recorder.tapes) == capture.KEPT + 1
    assert [tape.resets for tape in recorder.tapes] == [0, 1] + [0] * (capture.KEPT - 1)
    assert recorder.synchronized > before, "a graph may not be freed while it runs"
    with pytest.raises(UsageError, match="built for 1 to 64"):
        made(*given(65).args, shift=torch.zeros(4))


@pytest.mark.parametrize(
    ("write", "x"),
    [
        (lambda x: x.mul_(2), torch.ones(4)),
        (lambda x: x.mul_(2), torch.zeros(4)),
        (lambda x: x.view(2, 2)[0].fill_(7), torch.ones(4)),
        (lambda x: x.numpy().fill(3.0), torch.ones(4)),
    ],
    ids=["in place", "without a trace", "through a view", "past PyTorch"],
)
def test_a_forward_that_writes_into_its_input_is_refused_by_name(write: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        write(x)
        return x + 1

    kept = x.clone()
    with pytest.raises(Unsupported, match="writes into its input 'x'") as raised:
        one(forward, x)
    assert "clone()" in raised.value.fix
    assert torch.equal(x, kept), "the caller's own tensor was written to"


def test_nan_and_small_formats_are_no_writing() -> None:
    one(lambda x: x + 1, torch.full((3,), torch.nan))
    for dtype in (torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64, torch.complex128):
        x = torch.zeros(4).to(dtype)
        capture.Graphs(lambda x: x.view(-1), Accepts.of(Inputs(args=(x,)), any_layout=True), recorder=FakeRecorder()).record(
            Inputs(args=(x,))
        )  # type: ignore[arg-type]


def test_strides_of_a_dense_input_are_kept_and_gaps_are_not() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert capture.buffer(x).stride() == x.stride()
    assert capture.buffer(torch.randn(1, 4).expand(3, 4)).is_contiguous()
    assert not capture.buffer(torch.ones(2, requires_grad=True)).requires_grad


def test_memory_that_a_graph_reads_outlives_a_module_that_is_cast() -> None:
    net = Net()
    places = [t.data_ptr() for t in capture.tensors_of(net)]
    made, _ = graphs(net, given(), holds=capture.tensors_of(net))
    net.half()
    assert [t.data_ptr() for t in made._holds] == places
    assert not set(places) & {t.data_ptr() for t in capture.tensors_of(net)}
    made.close()
    assert not made._holds


def test_a_stream_waits_for_the_one_before_and_not_for_itself() -> None:
    made, recorder = one(lambda x: x + 1, torch.zeros(2))
    made(torch.zeros(2))
    made(torch.zeros(2))
    assert recorder.stream.waited == []
    recorder.stream = Stream("second")
    made(torch.zeros(2))
    made(torch.zeros(2))
    assert recorder.stream.waited == ["first"]


def test_threads_get_their_own_answers() -> None:
    made, _ = one(lambda x: (x * 2).relu() + x.sum(), torch.zeros(64))
    wrong: list[float] = []

    def serve(value: float) -> None:
        x = torch.full((64,), value)
        wrong.extend(value for _ in range(60) if not torch.equal(made(x), x * 2 + x.sum()))

    threads = [threading.Thread(target=serve, args=(float(n),)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_watches_sees_the_recorded_call_alone() -> None:
    entered = []

    @contextmanager
    def watch() -> Iterator[None]:
        entered.append(1)
        yield

    made, _ = one(lambda x: x + 1, torch.zeros(2), watch=watch)
    made(torch.zeros(2))
    assert entered == [1]


def test_closing_frees_every_graph_and_is_harmless_twice() -> None:
    made, recorder = graphs(Net(), given(2), {"N": (1, 8)})
    made(*given(3).args, shift=torch.zeros(4))
    made.close()
    made.close()
    assert [tape.resets for tape in recorder.tapes] == [1, 1] and made.num_kept == 0 and made.static_inputs == ()
    with pytest.raises(RuntimeError, match="after it was closed"):
        made(*given(3).args, shift=torch.zeros(4))


def test_without_inputs_there_is_nothing_to_record_on() -> None:
    with pytest.raises(Unsupported, match="without inputs"):
        capture.Graphs(lambda: None, Accepts.of(Inputs()))


def test_a_value_on_another_device_would_be_baked_in() -> None:
    inputs = Inputs(args=(torch.zeros(2), torch.zeros(2, device="meta")))
    with pytest.raises(Unsupported, match="'input_1' is on meta, 'input_0' on cpu"):
        capture.Graphs(torch.add, Accepts.of(inputs, any_layout=True), recorder=FakeRecorder())  # type: ignore[arg-type]


class Refuses(FakeRecorder):
    """CUDA as it refuses while recording: the op's error first, then the error of ending a capture that is broken already."""

    def record(self, call: Callable[[], Any], watch: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, Any]:
        global capturing
        capturing = True
        try:
            call()
        except RuntimeError as error:
            try:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            except RuntimeError as last:
                last.__context__ = error
                raise
        finally:
            capturing = False
        raise AssertionError


capturing = False


def waits(x: torch.Tensor) -> float:
    if capturing:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be reported later")
    return float(x.sum())


class Waits(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if waits(x) > 0 else x


def test_what_cannot_be_recorded_is_told_with_the_line_of_the_model_and_the_first_reason() -> None:
    x = torch.ones(2)
    made = capture.Graphs(Waits(), Accepts.of(Inputs(args=(x,)), any_layout=True), recorder=Refuses(), remedy="do this")  # type: ignore[arg-type]
    with pytest.raises(Unsupported) as raised:
        made.record(Inputs(args=(x,)))
    line = Waits.forward.__code__.co_firstlineno + 1
    assert (
        f"at test_capture.py:{line}" in raised.value.message
        or f"at test_capture.py:{waits.__code__.co_firstlineno + 2}" in raised.value.message
    )
    assert "operation not permitted when stream is capturing" in raised.value.message
    assert raised.value.fix == "do this"
    assert made.num_kept == 0


def test_an_op_of_generated_code_is_named() -> None:
    source = "def call(args):\n    buf0 = torch.ops.aten.nonzero.default(args)\n"
    module: dict[str, Any] = {}
    import linecache

    name = "/tmp/torchinductor_me/ab/cabc.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)

    class Torch:
        class ops:
            class aten:
                class nonzero:
                    @staticmethod
                    def default(x: Any) -> Any:
                        raise RuntimeError("operation not permitted when stream is capturing")

    exec(compile(source, name, "exec"), module)
    module["torch"] = Torch
    try:
        module["call"](None)
    except RuntimeError as error:
        assert capture._place(error).endswith("in aten.nonzero")
    finally:
        del linecache.cache[name]


def test_errors_that_have_nothing_to_do_with_recording_go_through() -> None:
    class Breaks(FakeRecorder):
        def record(self, call: Any, watch: Any) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        capture.Graphs(Net(), Accepts.of(given(), any_layout=True), recorder=Breaks()).record(given())  # type: ignore[arg-type]


class FakeCuda:
    """What `capture.Recorder` asks torch.cuda for, with a log of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.log: list[str] = []
        self.current: Any = Stream("caller's")
        self.generator = self
        cuda = torch.cuda
        outer = self

        class Graph:
            def replay(self) -> None:
                outer.log.append("replay")

        class Capture:
            def __init__(self, graph: Any, *, stream: Any, pool: Any, capture_error_mode: str) -> None:
                self.stream = stream
                outer.log.append(f"{pool} {capture_error_mode}")

            def __enter__(self) -> None:
                outer.current = self.stream

            def __exit__(self, *args: Any) -> None:
                if fails:  # as torch.cuda.graph: what ends the capture raises before the stream is put back
                    raise RuntimeError("operation failed due to a previous error during capture")
                outer.current = Stream("caller's")

        @contextmanager
        def stream(to: Any) -> Iterator[None]:
            before, outer.current = outer.current, to
            yield
            outer.current = before

        def set_stream(to: Any) -> None:
            outer.current = to

        pools = iter(range(9))
        for name, fake in {
            "Stream": lambda device: Stream("recording"), "CUDAGraph": Graph, "graph": Capture, "stream": stream, "set_stream": set_stream,
            "current_stream": lambda index: outer.current, "synchronize": lambda device: None, "device": lambda device: nullcontext(),
            "graph_pool_handle": lambda: f"pool {next(pools)}", "default_generators": [self], "current_device": lambda: 0,
        }.items():  # fmt: skip
            monkeypatch.setattr(cuda, name, fake)

    def clone_state(self) -> str:
        return "state"

    def graphsafe_set_state(self, state: str) -> None:
        self.log.append(f"generator {state}")


def test_graphs_of_one_recorder_share_stream_and_memory_and_are_replayed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = capture.Recorder("cuda:0")
    on: list[str] = []
    recorder.run(lambda: on.append(cuda.current.name))
    for _ in range(2):
        _, out = recorder.record(lambda: on.append(cuda.current.name) or 7, nullcontext)
        assert out == 7
    assert on == ["recording"] * 3 and cuda.current.name == "caller's"
    assert cuda.log == ["pool 0 thread_local", "replay"] * 2


def test_after_a_capture_that_broke_off_stream_and_generator_are_the_callers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, fails=True)
    recorder = capture.Recorder("cuda:0")
    before = cuda.current

    def breaks() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    for number in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            recorder.record(breaks, nullcontext)
        assert cuda.current is before
        assert cuda.log[-2:] == [f"pool {number} thread_local", "generator state"], "half-made memory is not recorded into again"
