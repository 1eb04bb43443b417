"""A batch in parts: a stand-in for CUDA knows what each stream has waited for, and says where a tensor is read that need not be there yet. The real thing is in
tests/programs/test_streams_gpu.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpuopt.backends import cudagraphs, inductor
from gpuopt.core.errors import Unsupported, UsageError
from gpuopt.core.live import Inputs, Model
from gpuopt.core.spec import TensorSpec
from gpuopt.programs import streams


class Stream:
    """How far it is with its own work, and how much of each other stream's it has waited for."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.name = cuda, f"stream {len(cuda.made)}"
        self.seen: dict[str, int] = {self.name: 0}
        cuda.made.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.cuda.waits.append((self.name, other.name))
        if len(self.cuda.waits) - 1 != self.cuda.lost:
            for name, tick in other.seen.items():
                self.seen[name] = max(self.seen.get(name, 0), tick)

    def work(self) -> int:
        self.seen[self.name] += 1
        return self.seen[self.name]


class Race(AssertionError):
    """A tensor is read, or its memory written, before it is certain to be done with."""


class Cuda(TorchDispatchMode):
    """`torch.cuda` without a GPU: every op is work of the current stream, on memory that knows who wrote and who read it last."""

    def __init__(self, lost: int | None = None) -> None:
        """lost: the number of a wait that is not made."""
        super().__init__()
        self.made: list[Stream] = []
        self.waits: list[tuple[str, str]] = []
        self.lost = lost
        self.writes: dict[int, tuple[str, int]] = {}
        self.reads: dict[int, list[tuple[str, int]]] = {}
        self.kept: list[torch.Tensor] = []
        self.now = Stream(self)

    def Stream(self, device: Any) -> Stream:
        return Stream(self)

    def current_stream(self, device: Any) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def _require(self, places: list[tuple[str, int]], what: str) -> None:
        for name, tick in places:
            if self.now.seen.get(name, 0) < tick:
                raise Race(f"{self.now.name} {what} what {name} may not be done with")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in pytree.tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        for tensor in given:
            at = tensor.untyped_storage().data_ptr()
            self._require([self.writes[at]] if at in self.writes else [], "reads")
        out = func(*args, **(kwargs or {}))
        tick = self.now.work()
        sources = {t.untyped_storage().data_ptr() for t in given}
        for at in sources:
            self.reads.setdefault(at, []).append((self.now.name, tick))
        written = {
            str(a)
            for a in (func._schema.arguments if hasattr(func, "_schema") else ())
            if a.alias_info is not None and a.alias_info.is_write
        }
        for tensor in (t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)):
            at = tensor.untyped_storage().data_ptr()
            if at not in sources or written:
                self._require(self.reads.get(at, []) if written else [], "writes")
                self.writes[at] = (self.now.name, tick)
                self.reads[at] = []
                self.kept.append(tensor)  # its address is its own for as long as this runs
        return out


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        y = self.layer(x) * scale
        return {"y": y, "pair": (y.sum(-1), y.transpose(0, 1)), "name": "net", "nothing": None}


def given(batch: int = 4) -> Inputs:
    specs = (TensorSpec.parse("x:float32[N,6]"), TensorSpec.parse("scale:float32[5]"))
    return Inputs(args=(torch.randn(batch, 6),), kwargs={"scale": torch.randn(5)}, specs=specs, dims={"N": batch})


def called(cuda: Cuda, count: int = 2, times: int = 2) -> tuple[Any, Any]:
    """Results of the last of some calls, the inputs of each written just before it on the stream of the call; and what the module itself gives."""
    torch.manual_seed(0)
    net, inputs = Net(), given()
    split = streams.of(net, inputs, count)
    parted = streams.Parted(net, split, tuple(inputs.kwargs), "cpu", cuda=cuda)
    found: Any = None
    with torch.no_grad(), cuda:
        for index in range(times):
            inputs.args[0].add_(index)
            found = parted(*inputs.args, **inputs.kwargs)
            pytree.tree_map_only(torch.Tensor, lambda t: t.clone(), found)  # the caller reads the results
    with torch.no_grad():
        return found, net(*inputs.args, **inputs.kwargs)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_give_what_the_whole_gives_in_order_and_race_with_nothing(count: int) -> None:
    cuda = Cuda()
    found, wanted = called(cuda, count)
    torch.testing.assert_close(found["y"], wanted["y"])
    torch.testing.assert_close(found["pair"][0], wanted["pair"][0])
    torch.testing.assert_close(found["pair"][1], wanted["pair"][1])
    assert found["name"] == "net" and "nothing" not in found
    sides = [stream.name for stream in cuda.made[1:]]
    own = cuda.made[0].name
    assert cuda.waits[: 2 * len(sides)] == [(side, own) for side in sides] + [(own, side) for side in sides]


@pytest.mark.parametrize("count", [2, 4])
def test_without_any_one_of_its_waits_it_races(count: int) -> None:
    whole = Cuda()
    called(whole, count)
    for lost in range(len(whole.waits)):
        with pytest.raises(Race):
            called(Cuda(lost=lost), count)


def test_each_part_runs_on_the_same_stream_in_every_call() -> None:
    cuda, ran = Cuda(), []

    class Tells(Net):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> Any:
            ran.append((cuda.now.name, float(x[0, 0])))
            return super().forward(x, scale=scale)

    inputs = given()
    inputs.args[0][:, 0] = torch.arange(4.0)
    split = streams.of(Net(), inputs, 2)
    parted = streams.Parted(Tells(), split, ("scale",), "cpu", cuda=cuda)
    for _ in range(2):
        parted(*inputs.args, **inputs.kwargs)
    assert ran == [("stream 0", 0.0), ("stream 1", 2.0)] * 2 and cuda.now is cuda.made[0]


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


class Fixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(4, 6)


class Counts(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x.shape[0]


class Pairs(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T


@pytest.mark.parametrize(
    ("module", "said"),
    [(Mean(), "not one sample after the other"), (Fixed(), "does not run on a part"), (Counts(), "is 4 of all"), (Pairs(), "not one sample after the other")],
)  # fmt: skip
def test_results_that_are_not_one_sample_after_the_other_are_refused(module: Any, said: str) -> None:
    inputs = Inputs(args=(torch.ones(4, 6),), specs=(TensorSpec.parse("x:float32[N,6]"),), dims={"N": 4})
    with pytest.raises(Unsupported, match=said):
        streams.of(module, inputs, 2)


def test_a_batch_that_is_not_named_or_does_not_divide_is_refused() -> None:
    with pytest.raises(Unsupported, match="a batch of 4 does not come apart into 3"):
        streams.of(Net(), given(), 3)
    inputs = given()
    plain = Inputs(args=inputs.args, kwargs=inputs.kwargs, specs=(TensorSpec.parse("x:float32[4,6]"), inputs.specs[1]))
    with pytest.raises(Unsupported, match="no input has a batch"):
        streams.of(Net(), plain, 2)


@pytest.mark.parametrize("value", [0, 9, -1, 2.0, True, "two"])
def test_a_number_of_streams_that_there_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="streams is"):
        streams.asked({"streams": value})


def test_only_what_is_recorded_by_us_and_has_one_size_takes_streams() -> None:
    model = Model(form="module", name="net", module=Net())
    with pytest.raises(UsageError, match="preset default records none"):
        inductor.build(model, given(), {"precision": "fp32", "streams": 2})
    with pytest.raises(Unsupported, match="one size"):
        streams.asked({"streams": 2, "dynamic": {"N": (1, 8)}})
    with pytest.raises(UsageError, match="streams is 99"):
        cudagraphs.build(model, given(), {"streams": 99})


def test_a_saved_part_knows_the_whole(tmp_path: Path) -> None:
    from gpuopt.programs import artifact

    torch.manual_seed(0)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.layer(x) * scale}

    net, inputs = Plain(), given()
    split = streams.of(net, inputs, 2)
    files = streams.save(net, inputs, split, tmp_path)
    module, accepts = artifact.load(tmp_path, files, {"signed_by_us": True})
    assert streams.read(tmp_path, files) == split and streams.read(tmp_path, {}) is None
    assert accepts.inputs[0].shape == (4, 6)
    found = streams.Parted(module, split, ("scale",), "cpu", cuda=Cuda())(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(found["y"], net(*inputs.args, **inputs.kwargs)["y"])


def test_the_buffers_of_a_graph_are_taken_apart_without_compiling_a_part_twice() -> None:
    """Parts are views that begin at different places of one memory: no guard may tell them apart."""
    torch._dynamo.reset()
    inputs = given()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    net = Net()
    parted = streams.Parted(torch.compile(net, backend=backend), streams.of(net, inputs, 4), ("scale",), "cpu", cuda=Cuda())
    with torch.no_grad():
        torch.testing.assert_close(parted(*inputs.args, **inputs.kwargs)["y"], net(*inputs.args, **inputs.kwargs)["y"])
    assert len(compiled) == 1
