"""The CUDA engine asks CUDA for the right things in the right order; the simulated one keeps time and order."""

import gc
import time
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gpuopt.core.errors import OutOfMemory, Unavailable, UsageError
from gpuopt.streaming.bound import bind
from gpuopt.streaming.engines import ENGINES
from gpuopt.streaming.engines.cuda import CudaEngine
from gpuopt.streaming.engines.simulated import SimulatedEngine


class FakeCuda:
    """Writes down what is asked of torch.cuda, and what of its runtime."""

    def __init__(self, refuse_after: int | None = None) -> None:
        self.calls: list[tuple] = []
        self.registered: dict[int, int] = {}
        self.refuse_after = refuse_after
        self.sticky = False
        self.current = FakeStream(self, "compute")
        self.entered: list[FakeStream] = []
        self.num_events = 0

    def is_available(self):
        return True

    def current_device(self):
        return 3

    def get_device_properties(self, device):
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=26, pci_device_id=0)

    def Stream(self, device):
        return FakeStream(self, "copy")

    def Event(self, enable_timing):
        assert enable_timing is False
        self.num_events += 1
        return FakeEvent(self, f"event{self.num_events - 1}")

    def current_stream(self, device):
        return self.current

    def device(self, device):
        assert device.type in ("cuda", "cpu")
        return nullcontext()

    def stream(self, stream):
        return stream

    def synchronize(self, device=None):
        self.calls.append(("synchronize",))

    def mem_get_info(self, device):
        return 10, 20

    def _sleep(self, cycles):
        self.calls.append(("sleep", self.entered[-1].name))

    def cudart(self):
        return self

    def cudaHostRegister(self, address, num_bytes, flags):
        if self.refuse_after is not None and len(self.registered) >= self.refuse_after:
            self.sticky = True
            return 2
        assert flags == 1
        self.registered[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        del self.registered[address]
        return 0


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_event(self, event):
        self.cuda.calls.append(("wait", self.name, event.name))

    def __enter__(self):
        self.cuda.entered.append(self)

    def __exit__(self, *_):
        self.cuda.entered.pop()


class FakeEvent:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def record(self, stream):
        self.cuda.calls.append(("record", stream.name, self.name))

    def synchronize(self):
        self.cuda.calls.append(("host waits", self.name))


class OnHost(CudaEngine):
    """Its memory is the host's: everything but the addresses is as on a GPU."""

    def __init__(self, cuda, **options):
        super().__init__("cuda", cuda=cuda, **options)
        assert self.device == torch.device("cuda", 3)
        self.device = torch.device("cpu")

    def _empty(self, num_bytes):
        raw = torch.zeros(num_bytes + 512, dtype=torch.uint8)
        start = -raw.data_ptr() % 512
        return raw[start : start + num_bytes]

    def _launch(self):
        self._cuda.calls.append(("launch",))
        if self._cuda.sticky:
            self._cuda.sticky = False
            raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    copy = torch.Tensor.copy_

    def written_down(self, source, non_blocking=False):
        if fake.entered:
            fake.calls.append(("copy", fake.entered[-1].name, self.numel(), non_blocking))
        return copy(self, source)

    def is_locked(self, device=None):
        return any(first <= self.data_ptr() < first + size for first, size in fake.registered.items())

    monkeypatch.setattr(torch.Tensor, "is_pinned", is_locked)
    monkeypatch.setattr(torch.Tensor, "copy_", written_down)
    return fake


@torch.inference_mode()
def test_a_forward_on_cuda_is_one_wait_one_copy_and_one_record_a_unit_and_the_host_never_waits(cuda, stack, planned):
    module = stack(num_blocks=4)
    x = torch.randn(3, 8)
    want = module(x)
    plan = planned(module)
    with bind(module, plan, OnHost(cuda)) as bound:
        streamer = bound.streamer
        ready = {name: lane.ready.name for name, lane in streamer.lanes.items()}
        free = [slot.free.name for slot in streamer.slots["blocks"]]
        size = plan.anatomy.units[0].num_bytes
        cuda.calls.clear()
        assert torch.equal(module(x), want)
        expected = []
        for index in range(4):
            following, slot = f"blocks.{(index + 2) % 4}", free[index % 2]
            expected += [
                ("wait", "compute", ready[f"blocks.{index}"]),
                ("record", "compute", slot),
                ("wait", "copy", slot),
                ("copy", "copy", size, True),
                ("record", "copy", ready[following]),
            ]
        assert cuda.calls == expected
        events = cuda.num_events
        module(x)
        assert cuda.num_events == events, "events are made once"


@torch.inference_mode()
def test_the_protocol_takes_next_to_no_time_of_the_host(cuda, stack, planned):
    """A block of a decoder is launched in 0.5 ms; what stands around it must not show. The driver's own part (an event, a copy) comes on top."""
    module, x = stack(num_blocks=64), torch.zeros(1, 8)
    for block in module.blocks:
        block.forward = lambda x: x
    cuda.calls = deque(maxlen=1)

    def took():
        began = time.perf_counter()
        module(x)
        return (time.perf_counter() - began) / 64

    bare = min(took() for _ in range(30))
    with bind(module, planned(module), OnHost(cuda)):
        assert min(took() for _ in range(60)) - bare < 20e-6


@torch.inference_mode()
def test_the_first_copies_wait_for_what_used_the_memory_of_the_slots_before(cuda, stack, planned):
    module = stack(num_blocks=4)
    with bind(module, planned(module), OnHost(cuda)) as bound:
        first = [slot.free.name for slot in bound.streamer.slots["blocks"]]
        for name in first:
            assert cuda.calls.index(("record", "compute", name)) < cuda.calls.index(("wait", "copy", name))
        assert [call for call in cuda.calls if call[0] == "copy"] == [("copy", "copy", 1536, True)] * 2


@torch.inference_mode()
def test_the_callers_stream_is_looked_up_at_each_call(cuda, stack, planned):
    module = stack(num_blocks=4)
    with bind(module, planned(module), OnHost(cuda)):
        cuda.current = FakeStream(cuda, "another")
        cuda.calls.clear()
        module(torch.randn(3, 8))
        assert {call[1] for call in cuda.calls} == {"another", "copy"}


@torch.inference_mode()
def test_memory_is_unregistered_after_the_streams_are_drained(cuda, stack, planned):
    module = stack(num_blocks=4)
    bound = bind(module, planned(module), OnHost(cuda))
    assert sorted(cuda.registered.values()) == [1536] * 4, "exactly what was asked for"
    assert bound.engine.pinned_bytes == 4 * 1536
    cuda.calls.clear()
    bound.close()
    assert cuda.registered == {} and bound.engine.pinned_bytes == 0
    assert [call[0] for call in cuda.calls][:5] == ["synchronize"] + ["unregister"] * 4


@torch.inference_mode()
def test_a_streamed_model_that_is_dropped_is_drained_before_its_memory_goes(cuda, stack, planned):
    module = stack(num_blocks=4)
    bind(module, planned(module), OnHost(cuda))
    module(torch.randn(3, 8))
    cuda.calls.clear()
    del module
    gc.collect()
    names = [call[0] for call in cuda.calls]
    assert cuda.registered == {} and names[0] == "synchronize" and names.count("unregister") == 4


@torch.inference_mode()
def test_a_refused_lock_leaves_no_error_behind_and_is_counted(cuda, stack, planned):
    cuda.refuse_after = 4
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module), OnHost(cuda)) as bound:
        assert not cuda.sticky and 2 in bound.engine.refusals
        assert "2 of 6 units pinned" in bound.notes[0]
        assert torch.equal(module(x), want)
        assert ("host waits", bound.streamer.lanes["blocks.5"].source._ring[0][1].name) in cuda.calls
    assert cuda.registered == {}


def test_a_source_that_is_not_locked_is_refused(cuda):
    engine = OnHost(cuda)
    with pytest.raises(RuntimeError, match="not locked"):
        engine.copy(engine.slot(512), engine.home(512, pin=False).bytes)


@torch.inference_mode()
def test_sleeps_are_put_on_both_streams_for_a_race_hunt(cuda, stack, planned):
    module = stack()
    with bind(module, planned(module), OnHost(cuda, sleeps=1), poison=True):
        for _ in range(5):
            module(torch.randn(3, 8))
    assert {call for call in cuda.calls if call[0] == "sleep"} == {("sleep", "compute"), ("sleep", "copy")}


def test_without_a_gpu_the_way_out_is_named():
    with pytest.raises(Unavailable, match="no CUDA device") as caught:
        CudaEngine(cuda=SimpleNamespace(is_available=lambda: False))
    assert "simulated" in caught.value.fix


def test_a_device_that_is_full_says_how_full(cuda, monkeypatch):
    engine = OnHost(cuda)

    def full(num_bytes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_empty", full)
    with pytest.raises(OutOfMemory, match="no 4,096 bytes for weights: 10 of 20 are free"):
        engine.slot(4096)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_the_table_names_engines(name):
    import importlib

    module, _, attribute = ENGINES[name].partition(":")
    assert getattr(importlib.import_module(module), attribute).name == name


def test_slots_are_aligned_and_ordinary_in_inference_mode():
    with torch.inference_mode():
        slot = SimulatedEngine(1e9).slot(1000)
    assert slot.numel() == 1000 and slot.data_ptr() % 512 == 0 and not slot.is_inference()


@pytest.mark.parametrize(("schedule", "found"), [("late", 0), ("early", 7)])
def test_a_copy_is_done_as_late_or_as_early_as_events_allow(schedule, found):
    engine = SimulatedEngine(1e9, schedule=schedule)
    slot, home, ready = engine.slot(512), engine.home(512, pin=True), engine.event()
    home.bytes.fill_(7)
    engine.copy(slot, home.bytes)
    engine.record_copy(ready)
    assert slot[0] == found
    engine.wait_compute(ready)
    assert slot[0] == 7


def test_an_event_that_was_never_recorded_is_waited_for_by_nobody():
    engine = SimulatedEngine(1e9)
    event = engine.event()
    engine.wait_compute(event)
    engine.wait_copy(event)
    engine.wait_host(event)
    assert engine.elapsed_ms == 0


def test_a_wait_means_the_last_record_before_it():
    engine = SimulatedEngine(1e3)
    slot, other, home, event = engine.slot(512), engine.slot(512), engine.home(512, pin=True), engine.event()
    home.bytes.fill_(7)
    engine.copy(slot, home.bytes)
    engine.record_copy(event)
    engine.wait_compute(event)
    engine.copy(other, home.bytes)
    engine.record_copy(event)
    assert (slot[0], other[0]) == (7, 0)
    assert engine.elapsed_ms == pytest.approx(512.0)


def test_the_clock_is_that_of_two_queues():
    engine = SimulatedEngine(1e6, {"a": 1.0, "": 0.5})
    slot, home, ready = engine.slot(2000), engine.home(2000, pin=True), engine.event()
    with engine.segment(""):
        engine.copy(slot, home.bytes)
        engine.record_copy(ready)
        with engine.segment("a"):
            pass
        engine.wait_compute(ready)
        with engine.segment("b", slot):
            pass
    assert engine.elapsed_ms == pytest.approx(2.5) and engine.stall_ms == pytest.approx(1.0) and engine.copy_ms == pytest.approx(2.0)
    assert (engine.forwards[0].ms, engine.forwards[0].stall_ms) == (pytest.approx(2.5), pytest.approx(1.0))


@pytest.mark.parametrize(
    "bad", [{"link_bytes_per_s": 0}, {"link_bytes_per_s": 1, "disk_bytes_per_s": -1}, {"link_bytes_per_s": 1, "schedule": "never"}]
)
def test_rates_that_move_nothing_and_unknown_schedules_are_refused(bad):
    with pytest.raises(UsageError):
        SimulatedEngine(**bad)


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu_a_stack_gives_the_same_bits_and_locks_what_was_asked(stack, planned):
    module = stack(num_blocks=6, width=256)
    x = torch.randn(64, 8, device="cuda")
    with torch.inference_mode(False):
        whole = stack(num_blocks=6, width=256).cuda()
    want = whole(x)
    for sleeps in (None, 3):
        engine = CudaEngine(sleeps=sleeps)
        with bind(module, planned(module, resident=("blocks.1",)), engine, poison=True, audit=True) as bound:
            assert bound.pinned_units == 5 and all(lane.source.bytes_for_copy(n).is_pinned() for n, lane in bound.streamer.lanes.items())
            for _ in range(1000):
                assert torch.equal(module(x), want)
            assert all(set(sums) == {bound.checksums[name]} for name, sums in bound.streamer.audited().items())
            assert bound.streamer.demand_fetches == 0
        assert next(module.parameters()).device.type == "cpu"
        assert all(torch.equal(a, b.cpu()) for a, b in zip(module.state_dict().values(), whole.state_dict().values()))


@pytest.mark.gpu
def test_on_a_gpu_a_refused_lock_leaves_no_error_behind():
    engine = CudaEngine()
    pages = engine.home(4096, pin=True)
    assert pages.pinned
    assert pages.pin(torch.cuda.cudart(), engine._discard_error) != 0, "locked already"
    assert torch.ones(3, device="cuda").sum().item() == 3
    pages.close()
