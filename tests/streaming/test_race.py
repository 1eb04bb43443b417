"""The race hunt: nothing is found in the protocol, and each wait that is taken out of it is found."""

import random

import pytest
import torch

from gpuopt.streaming.bound import bind
from gpuopt.streaming.engines.simulated import SimulatedEngine
from gpuopt.streaming.slabs import Staged


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_a_thousand_forwards_in_shuffled_orders_under_random_schedules_are_right(stack, planned):
    module = stack(num_blocks=5, width=8)
    x = torch.randn(2, 8)
    rng = random.Random(7)
    wanted: dict[tuple[int, ...], torch.Tensor] = {}
    orders = [list(range(5))] * 4 + [rng.choices(range(5), k=rng.randint(1, 8)) for _ in range(24)]
    for order in orders:
        module.order = order
        wanted[tuple(order)] = module(x)
    done = 0
    for seed, (num_slots, homes) in enumerate([(1, {}), (2, {}), (3, {}), (2, {"blocks.1": "pageable", "blocks.4": "pageable"})]):
        device = SimulatedEngine(1e9, schedule="random", seed=seed)
        with bind(module, planned(module, num_slots=num_slots, homes=homes), device, poison=True) as bound:
            for _ in range(250):
                module.order = rng.choice(orders)
                if rng.random() < 0.02:
                    module.fail_after = rng.randrange(len(module.order))
                    with pytest.raises(RuntimeError, match="between two blocks"):
                        module(x)
                    module.fail_after = None
                assert torch.equal(module(x), wanted[tuple(module.order)])
                done += 1
            assert device.races == []
            assert bound.streamer.demand_fetches > 0
    assert done == 1000


class Deaf(SimulatedEngine):
    """Leaves out one kind of call, once everything is bound."""

    def __init__(self, left_out: str, schedule: str) -> None:
        super().__init__(1e9, schedule=schedule, seed=1)
        self.left_out = left_out
        self.is_deaf = False

    def _hears(self, call: str) -> bool:
        return not (self.is_deaf and call == self.left_out)

    def wait_compute(self, event):
        if self._hears("computing waits for the copy"):
            super().wait_compute(event)

    def wait_copy(self, event):
        if self._hears("the copy waits for the slot"):
            super().wait_copy(event)

    def record_compute(self, event):
        if self._hears("the slot is marked free after its reader"):
            super().record_compute(event)

    def record_copy(self, event):
        if self._hears("the slot is marked ready after the copy"):
            super().record_copy(event)

    def wait_host(self, event):
        if self._hears("the host waits before it writes a locked buffer again"):
            super().wait_host(event)


WAITS = [
    "computing waits for the copy",
    "the copy waits for the slot",
    "the slot is marked free after its reader",
    "the slot is marked ready after the copy",
]


def hunt(stack, planned, device, order, homes=None, num_blocks=6) -> tuple[bool, bool]:
    """Whether bytes were wrong, and whether the engine knew of a race."""
    module = stack(num_blocks=num_blocks)
    module.order = order
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module, homes=homes), device, poison=True):
        module(x)
        device.is_deaf = True
        wrong = any(not torch.equal(module(x), want) for _ in range(8))
        device.is_deaf = False
        return wrong, bool(device.races)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 0]], ids=["in order", "fetched on demand"])
@pytest.mark.parametrize("schedule", ["late", "random"])
@pytest.mark.parametrize("left_out", WAITS)
def test_each_wait_that_is_left_out_gives_wrong_bytes(stack, planned, left_out, schedule, order):
    wrong, known = hunt(stack, planned, Deaf(left_out, schedule), order)
    assert wrong and known


@pytest.mark.parametrize("left_out", WAITS)
def test_even_where_every_copy_is_early_the_engine_knows_of_the_race(stack, planned, left_out):
    assert hunt(stack, planned, Deaf(left_out, "early"), [0, 1, 2, 3, 4, 5])[1]


@pytest.mark.parametrize("schedule", ["late", "early", "random"])
def test_with_all_of_them_nothing_is_found(stack, planned, schedule):
    assert hunt(stack, planned, Deaf("nothing", schedule), [0, 1, 2, 3, 4, 5]) == (False, False)


def test_a_locked_buffer_that_is_written_before_its_copy_is_done_gives_wrong_bytes(stack, planned):
    homes = {f"blocks.{i}": "pageable" for i in range(8)}
    left_out = "the host waits before it writes a locked buffer again"
    # Three copies are under way at a time where there are three slots, and the ring has two buffers.
    module = stack(num_blocks=8)
    x = torch.randn(3, 8)
    want = module(x)
    for call, is_right in (("nothing", True), (left_out, False)):
        device = Deaf(call, "late")
        with bind(module, planned(module, homes=homes, num_slots=4), device, poison=True) as bound:
            assert isinstance(bound.streamer.lanes["blocks.0"].source, Staged)
            device.is_deaf = True
            assert all(torch.equal(module(x), want) for _ in range(4)) is is_right
            device.is_deaf = False


def test_an_abort_that_does_not_drain_is_found(stack, planned, monkeypatch):
    module = stack()
    x = torch.randn(3, 8)
    device = SimulatedEngine(1e9, schedule="late")
    with bind(module, planned(module), device, poison=True):
        for drains in (True, False):
            if not drains:
                monkeypatch.setattr(device, "drain", lambda: None)
            handle = module.blocks[2][1].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                module(x)
            handle.remove()
            module(x)
            assert (device.races == []) is drains
        monkeypatch.undo()
