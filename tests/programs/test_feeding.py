"""Batches that are copied while another is computed with: the right ones, in order, and no buffer is written while somebody reads it."""

from __future__ import annotations

import itertools
from collections import UserDict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gpuopt
from gpuopt.core.errors import UsageError
from gpuopt.core.live import Inputs
from gpuopt.pipeline import metering
from gpuopt.programs import feeding


class Streams(TorchDispatchMode):
    """torch.cuda on a CPU: what each stream was given, in order, and what happened before what.

    Each stream knows of the operations it is ordered after. A copy into memory that another operation read or wrote and that it is not ordered after is a race.
    """

    def __init__(self, *, deaf_to: str = "") -> None:
        super().__init__()
        self.deaf_to = deaf_to
        self.main = Stream(self, "main")
        self.stack = [self.main]
        self.touched: dict[int, list[tuple[int, bool]]] = {}
        self.races: list[str] = []
        self.num = 0

    # -- torch.cuda
    def Stream(self, device: Any) -> Stream:
        return Stream(self, "copying")

    def Event(self) -> Event:
        return Event()

    def current_stream(self, device: Any = None) -> Stream:
        return self.stack[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        self.stack.append(stream)
        try:
            yield
        finally:
            self.stack.pop()

    # -- what is computed
    def touch(self, tensor: torch.Tensor, *, writes: bool, what: str) -> None:
        stream = self.stack[-1]
        self.num += 1
        before = self.touched.setdefault(tensor.untyped_storage().data_ptr(), [])
        for number, wrote in before:
            if (writes or wrote) and number not in stream.known:
                self.races.append(f"{what} on {stream.name} is not after operation {number}")
        before.append((self.num, writes))
        stream.known.add(self.num)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and args[0].dim():
            self.touch(args[0], writes=True, what="a copy")
        elif func is torch.ops.aten.mul.Tensor:
            self.touch(args[0], writes=False, what="computing")
        return result


class Stream:
    def __init__(self, log: Streams, name: str) -> None:
        self.log, self.name, self.known = log, name, set[int]()

    def wait_event(self, event: Event) -> None:
        if self.log.deaf_to != self.name:
            self.known |= event.known

    def wait_stream(self, other: Stream) -> None:
        self.known |= other.known

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self) -> None:
        self.known: set[int] = set()

    def record(self, stream: Stream) -> None:
        self.known = set(stream.known)

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked memory needs a driver; copies go to the CPU, which stands for the device."""
    monkeypatch.setattr(feeding, "locked", torch.empty_like)


def fed(log: Streams, count: int, depth: int) -> list[float]:
    batches = [{"x": torch.full((4,), float(n)), "name": str(n)} for n in range(count)]
    found = []
    with log:
        for batch in feeding.Feed(batches, torch.device("cpu"), depth, cuda=log):
            assert batch["name"] == str(len(found))
            found.append(float((batch["x"] * 2).sum()))
    return found


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_batch_comes_in_order_and_nothing_is_overwritten_while_it_is_read(count: int, depth: int) -> None:
    log = Streams()
    assert fed(log, count, depth) == [8.0 * n for n in range(count)]
    assert log.races == []


@pytest.mark.parametrize("deaf", ["main", "copying"])
def test_each_wait_is_needed(deaf: str) -> None:
    """The test above would notice: without either wait there is a race."""
    log = Streams(deaf_to=deaf)
    fed(log, 7, 2)
    assert log.races


def test_copies_are_begun_before_the_batch_in_front_is_handed_out() -> None:
    asked = []

    def batches() -> Any:
        for n in itertools.count():
            asked.append(n)
            yield torch.full((2,), float(n))

    log = Streams()
    with log:
        feed = feeding.Feed(batches(), torch.device("cpu"), 2, cuda=log)
        next(feed)
        assert asked == [0, 1]
        next(feed)
        assert asked == [0, 1, 2]


def test_batches_of_other_shapes_and_other_things_go_through() -> None:
    log = Streams()
    with log:
        feed = feeding.Feed([torch.zeros(2), (torch.ones(3), 7), torch.ones(3, dtype=torch.int64), None], torch.device("cpu"), 2, cuda=log)
        shapes = [getattr(b, "shape", b) if not isinstance(b, tuple) else (b[0].shape, b[1]) for b in feed]
    assert shapes == [(2,), ((3,), 7), (3,), None]


def test_on_a_cpu_batches_are_what_they_were() -> None:
    batches = [torch.zeros(2), torch.ones(2)]
    assert [id(b) for b in gpuopt.feed(batches, "cpu")] == [id(b) for b in batches]
    with pytest.raises(UsageError, match="depth is 1"):
        gpuopt.feed(batches, "cpu", depth=1)


def test_a_timed_call_computes_what_it_would_and_ends_after_the_copy_of_the_next() -> None:
    log = Streams()
    runner: Any = lambda x, *, y: {"sum": x * y, "n": 3}  # noqa: E731
    given = Inputs(args=(torch.arange(4.0),), kwargs={"y": torch.full((4,), 2.0)})
    with log:
        call = metering._overlapped(runner, given, "cpu", cuda=log)
        for _ in range(4):
            found = call()
            # Everything that was launched so far is in the past of what the stream does next: the clock's event comes after the copy.
            assert log.main.known >= set(range(1, log.num + 1))
    assert log.races == []
    assert found[1] == 3
    assert metering.timed(runner, given, mode="overlapped", device="cpu")()["n"] == 3


@pytest.mark.gpu
def test_on_a_gpu_a_fed_sum_is_the_sum_and_the_copies_hide() -> None:
    batches = [torch.full((1 << 24,), float(n)).pin_memory() if n % 2 else torch.full((1 << 24,), float(n)) for n in range(8)]
    found = []
    for batch in gpuopt.feed(batches, "cuda"):
        torch.cuda._sleep(10_000_000)
        found.append(batch.double().sum())
    assert [float(f) for f in found] == [float(n << 24) for n in range(8)]


def test_what_a_loader_raises_comes_after_the_batches_before_it() -> None:
    def batches() -> Any:
        yield torch.zeros(2)
        yield torch.ones(2)
        raise ValueError("a bad file")

    log, found = Streams(), []
    with log, pytest.raises(ValueError, match="a bad file"):
        for batch in feeding.Feed(batches(), torch.device("cpu"), 3, cuda=log):
            found.append(float(batch.sum()))
    assert found == [0.0, 2.0]


def test_strides_are_kept_and_no_history_is() -> None:
    log = Streams()
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with log:
        feed = feeding.Feed([image, image, image, image.detach().contiguous()], torch.device("cpu"), 2, cuda=log)
        with torch.inference_mode():
            first = next(feed)
            assert first.stride() == image.stride()
        found = [first, *feed]
    assert [f.stride() for f in found[:3]] == [image.stride()] * 3
    assert found[3].is_contiguous()
    assert not any(f.requires_grad or f.is_inference() for f in found)


def test_sparse_batches_go_through() -> None:
    log = Streams()
    with log:
        (found,) = feeding.Feed([torch.eye(3).to_sparse()], torch.device("cpu"), 2, cuda=log)
    assert torch.equal(found.to_dense(), torch.eye(3))


def test_what_is_nothing_to_iterate_over_says_only_that() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        feeding.Feed(3, torch.device("cpu"), 2, cuda=Streams())  # type: ignore[arg-type]


def test_a_tokenizers_batch_is_moved_and_an_object_with_tensors_of_its_own_is_refused() -> None:
    class Encoding(UserDict):  # type: ignore[type-arg]
        """As transformers' BatchEncoding is one."""

    class Opaque:
        def to(self, device: Any) -> Any:
            return self

    log = Streams()
    with log:
        (found,) = feeding.Feed([Encoding({"ids": torch.arange(4)})], torch.device("cpu"), 2, cuda=log)
        assert type(found) is dict and found["ids"].tolist() == [0, 1, 2, 3]
        assert log.num > 0, "it was copied"
        with pytest.raises(UsageError, match="a batch holds a Opaque"):
            list(feeding.Feed([(Opaque(), torch.zeros(2))], torch.device("cpu"), 2, cuda=log))
