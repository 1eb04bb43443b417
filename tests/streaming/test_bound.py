"""A streamed model gives the bits it gives whole, and is whole again afterwards."""

import copy
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gpuopt.core.errors import BadInput, ResourceError, Unsupported, UsageError
from gpuopt.core.streaming import Calibration, StreamSpec
from gpuopt.streaming import planner
from gpuopt.streaming.anatomy import dissect
from gpuopt.streaming.bound import bind
from gpuopt.streaming.disk import Ring
from gpuopt.streaming.engines.simulated import SimulatedEngine
from gpuopt.streaming.owned import Owned
from gpuopt.streaming.packed import pack
from gpuopt.streaming.slabs import Slab
from gpuopt.streaming.timeline import simulate

SCHEDULES = ("late", "early", "random")


def engine(schedule: str = "late", **options) -> SimulatedEngine:
    return SimulatedEngine(1e9, schedule=schedule, **options)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def states_equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_stack_of_blocks_gives_the_same_bits_streamed(stack, planned, schedule, num_slots):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module, num_slots=num_slots), engine(schedule), poison=True) as bound:
        for _ in range(5):
            assert torch.equal(module(x), want)
        assert bound.streamer.demand_fetches == 0
        assert bound.engine.races == []


def test_a_model_made_in_inference_mode_is_streamed_too(planned):
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).eval()
    x = torch.randn(3, 8)
    want = module(x)
    assert module[0].weight.is_inference()
    with bind(module, planned(module), engine(), poison=True):
        for _ in range(3):
            assert torch.equal(module(x), want)
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(module(x.clone()), want)


def test_every_unit_is_copied_once_a_forward(stack, planned):
    module = stack()
    plan = planned(module, resident=("blocks.1", "blocks.4"))
    with bind(module, plan, engine()) as bound:
        before = bound.streamer.copies, bound.streamer.bytes
        module(torch.randn(3, 8))
        assert bound.streamer.copies - before[0] == 4
        assert bound.streamer.bytes - before[1] == plan.streamed_bytes


def test_a_slot_with_one_unit_is_filled_once(stack, planned):
    module = stack(num_blocks=2)
    with bind(module, planned(module, num_slots=2), engine(), poison=True) as bound:
        x = torch.randn(3, 8)
        first = module(x)
        assert torch.equal(module(x), first)
        assert bound.streamer.copies == 2


def test_a_single_forward_copies_nothing_for_a_next_one(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module, once=True), engine(), poison=True) as bound:
        assert torch.equal(module(x), want)
        assert bound.streamer.copies == 6
        assert torch.equal(module(x), want)


@pytest.mark.parametrize(
    ("order", "in_order"),
    [
        ([0, 1, 2, 3, 4, 5] * 2, True),
        ([0, 2, 4], True),  # what follows in their slot
        ([0, 1, 3, 4, 5], False),
        ([5, 4, 3, 2, 1, 0], False),
        ([0, 0, 0, 1, 1], False),
        ([3], False),
    ],
    ids=str,
)
def test_blocks_that_are_skipped_reordered_or_repeated_are_fetched_on_demand(stack, planned, order, in_order):
    module = stack()
    x = torch.randn(3, 8)
    module.order = order
    want = module(x)
    with bind(module, planned(module), engine(), poison=True) as bound:
        for _ in range(3):
            assert torch.equal(module(x), want)
        assert bound.engine.races == []
        assert (bound.streamer.demand_fetches == 0) is in_order


def test_parameters_are_never_pointed_elsewhere(stack, planned):
    module = stack()
    with bind(module, planned(module), engine()):
        addresses = [p.data_ptr() for p in module.parameters()]
        for _ in range(3):
            module(torch.randn(3, 8))
        assert [p.data_ptr() for p in module.parameters()] == addresses
        assert all(address % 512 == 0 for name, address in zip(dict(module.named_parameters()), addresses) if name.startswith("blocks"))


def test_closing_gives_everything_back(stack, planned):
    module = stack()
    twin = copy.deepcopy(module)
    attributes = {name: sorted(each.__dict__) for name, each in module.named_modules()}
    bound = bind(module, planned(module, resident=("blocks.0",)), engine(), poison=True)
    module(torch.randn(3, 8))
    bound.close()
    bound.close()
    assert states_equal(module.state_dict(), twin.state_dict())
    assert {name: sorted(each.__dict__) for name, each in module.named_modules()} == attributes
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(module).double()(x.double()), twin.double()(x.double()))
    with pytest.raises(UsageError, match="not streamed any more"):
        bound.read("blocks.0.0.weight")


def test_a_model_can_be_bound_again_after_closing(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    for _ in range(2):
        with bind(module, planned(module), engine()):
            assert torch.equal(module(x), want)


def test_binding_that_fails_leaves_the_model_whole(stack, planned):
    module = stack()
    twin = copy.deepcopy(module)
    x = torch.randn(3, 8)

    class Small(SimulatedEngine):
        made = 0

        def slot(self, num_bytes):
            self.made += 1
            if self.made > 2:
                raise ResourceError("no room")
            return super().slot(num_bytes)

    with pytest.raises(ResourceError, match="no room"):
        bind(module, planned(module, resident=("blocks.0",)), Small(1e9))
    assert torch.equal(module(x), twin(x))
    assert states_equal(module.state_dict(), twin.state_dict())


@pytest.mark.parametrize("where", ["within", "between"])
def test_the_forward_after_one_that_broke_off_is_right(stack, planned, where):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module), engine("late"), poison=True) as bound:
        for at in (0, 2, 5):
            if where == "between":
                module.fail_after = at
            else:
                handle = module.blocks[at][1].register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises((RuntimeError, ZeroDivisionError)):
                module(x)
            module.fail_after = None
            if where == "within":
                handle.remove()
            assert torch.equal(module(x), want)
        assert bound.streamer.generation == 3
        assert bound.streamer.demand_fetches == 0
        assert bound.engine.races == []


def test_ctrl_c_within_a_block_is_an_abort_too(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    with bind(module, planned(module), engine(), poison=True) as bound:
        handle = module.blocks[3].register_forward_hook(interrupt)
        inner = module.blocks[2][0].register_forward_hook(interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                module(x)
            inner.remove()
        handle.remove()
        assert torch.equal(module(x), want)
        assert bound.streamer.generation == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("lockable", "pinned"), [(6, 6), (5, 3), (3, 1), (2, 0)])
def test_units_the_system_will_not_lock_go_through_a_locked_ring_and_are_counted(stack, planned, schedule, lockable, pinned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    plan = planned(module)
    device = engine(schedule, max_pinned_bytes=lockable * plan.anatomy.units[0].num_bytes)
    with bind(module, plan, device, poison=True) as bound:
        assert (bound.pinned_units, bound.num_units) == (pinned, 6)
        assert bound.notes == () if pinned == 6 else f"{pinned} of 6 units pinned" in bound.notes[0]
        assert sorted(bound.plan.homes.values()) == ["pageable"] * (6 - pinned) + ["pinned"] * pinned
        assert device.pinned_bytes == plan.anatomy.units[0].num_bytes * (pinned if pinned == 6 else pinned + 2)
        for _ in range(4):
            assert torch.equal(module(x), want)
        assert device.races == []
        assert states_equal(module.state_dict(), stack().state_dict())
    assert device.pinned_bytes == 0
    assert torch.equal(module(x), want)


def test_a_system_that_locks_nothing_is_an_error_and_the_model_is_whole(stack, planned):
    module = stack()
    with pytest.raises(ResourceError, match="locks not even"):
        bind(module, planned(module), engine(max_pinned_bytes=0))
    assert states_equal(module.state_dict(), stack().state_dict())


def test_slabs_a_plan_leaves_unlocked_are_no_refusal(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    with bind(module, planned(module, homes={"blocks.2": "pageable"}), engine()) as bound:
        assert torch.equal(module(x), want)
        assert bound.notes == () and bound.pinned_units == 5


def test_a_unit_on_disk_needs_a_source(stack, planned):
    module = stack()
    with pytest.raises(UsageError, match="blocks.2 from a disk"):
        bind(module, planned(module, homes={"blocks.2": "disk"}), engine())


def test_the_plan_of_another_model_is_refused_by_name(stack, planned):
    plan = planned(stack(num_blocks=6))
    with pytest.raises(BadInput, match=r"it lacks: blocks\.4\.0\.bias"):
        bind(stack(num_blocks=4), plan, engine())
    with pytest.raises(BadInput, match=r"the plan lacks: blocks\.6\.0\.bias"):
        bind(stack(num_blocks=8), plan, engine())
    with pytest.raises(BadInput, match=r"float32\[16, 16\] in the plan|float16"):
        bind(stack().half(), plan, engine())
    with pytest.raises(BadInput, match="in the plan"):
        bind(stack(width=32), plan, engine())


def test_graphs_are_refused_and_not_left_out_silently(stack, planned):
    module = stack()
    with pytest.raises(Unsupported, match="CUDA graphs"):
        bind(module, planned(module, graphs=True), engine())


def test_an_embedding_kept_on_the_host_gathers_there_and_is_not_moved(planned):
    with torch.inference_mode(False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Embedding(50, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))).eval()
    tokens = torch.randint(0, 50, (2, 3))
    want = module(tokens)
    plan = planned(module, embed="cpu")
    assert plan.anatomy.host
    address = module[0].weight.data_ptr()
    with bind(module, plan, engine()):
        assert torch.equal(module(tokens), want) and module[0].weight.data_ptr() == address


def test_a_model_on_meta_is_filled_by_name(stack, planned):
    true = stack()
    true.register_buffer("shift", torch.ones(3))
    values = true.state_dict()
    x = torch.randn(3, 8)
    want = true(x)
    with torch.inference_mode(False):
        module = copy.deepcopy(true).to("meta")
    plan = planned(module, resident=("blocks.1",))
    with pytest.raises(UsageError, match="meta device"):
        bind(module, plan, engine())
    asked = []

    def fill(name, target):
        asked.append(name)
        target.copy_(values[name])

    with bind(module, plan, engine(), fill=fill, poison=True):
        for _ in range(3):
            assert torch.equal(module(x), want)
        assert sorted(asked) == sorted(values)
        assert states_equal(module.state_dict(), values)
    assert torch.equal(module(x), want)
    assert states_equal(module.state_dict(), values)


class FromDisk:
    """A source that has the bytes of some units, as a disk would."""

    def __init__(self, plan, values) -> None:
        self.slabs = {}
        for unit in plan.anatomy.units:
            self.slabs[unit.name] = torch.zeros(unit.num_bytes, dtype=torch.uint8)
            for place in unit.places:
                Slab(unit, self.slabs[unit.name]).view(place).copy_(values[place.name])

    def bytes_for_copy(self, unit):
        return self.slabs[unit]

    def release(self, unit):
        pass

    def abort(self):
        pass

    def read(self, unit):
        return self.slabs[unit].clone()

    def close(self):
        raise AssertionError("a given source stays the caller's")


@pytest.mark.parametrize("on_meta", [False, True])
def test_units_from_a_source_of_their_own_are_never_held_here(stack, planned, on_meta):
    true = stack()
    values = {key: value.clone() for key, value in true.state_dict().items()}
    x = torch.randn(3, 8)
    want = true(x)
    plan = planned(true, homes={"blocks.2": "disk", "blocks.5": "disk"})
    source = FromDisk(plan, values)
    with torch.inference_mode(False):
        module = copy.deepcopy(true).to("meta") if on_meta else true

    class Weights:
        """As `meta.Weights`."""

        asked: list[str] = []

        def fill(self, name, target):
            self.asked.append(name)
            target.copy_(values[name])

        def fill_unit(self, unit, target):
            self.asked.append(unit.name)
            target.copy_(source.slabs[unit.name])

    with bind(module, plan, engine(), {"blocks.2": source, "blocks.5": source}, Weights() if on_meta else None, poison=True) as bound:
        for _ in range(3):
            assert torch.equal(module(x), want)
        assert states_equal(module.state_dict(), values)
        assert bound.checksums.keys() == {f"blocks.{i}" for i in (0, 1, 3, 4)}
    if on_meta:
        assert sorted(Weights.asked) == sorted([*(f"blocks.{i}" for i in (0, 1, 3, 4)), *plan.anatomy.fixed])
    assert {name for name, p in module.named_parameters() if p.is_meta} == (
        {f"blocks.{i}.0.{each}" for i in (2, 5) for each in ("weight", "bias")} if on_meta else set()
    )
    if not on_meta:
        assert torch.equal(module(x), want)
    # And once more, with nothing to fill but what has a source.
    with bind(module, plan, engine(), {"blocks.2": source, "blocks.5": source}, poison=True):
        assert torch.equal(module(x), want)


class Tied(nn.Module):
    """The same block object twice, a weight shared by two blocks, and a head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.blocks[3].weight = self.blocks[1].weight
        self.blocks[4].weight = nn.Parameter(self.blocks[0].weight.detach().t())  # one storage, another view
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.blocks[2](x))


def test_weights_that_share_memory_are_streamed_or_stay_together(planned):
    torch.manual_seed(0)
    with torch.inference_mode(False):
        module = Tied().eval()
    tokens = torch.randint(0, 11, (2, 5))
    want = module(tokens)
    with bind(module, planned(module), engine(), poison=True) as bound:
        for _ in range(3):
            assert torch.equal(module(tokens), want)
        assert bound.engine.races == []
        assert module.head.weight is module.table.weight
    assert torch.equal(module(tokens), want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_simulated_clock_is_the_timeline_of_the_plan(stack, planned, schedule):
    module = stack(num_blocks=7)
    names = [f"blocks.{i}" for i in range(7)]
    compute = {name: 0.7 + 0.3 * i for i, name in enumerate(names)} | {"": 0.25}
    homes = {"blocks.2": "pageable", "blocks.5": "disk"}
    for num_slots, resident in ((2, ()), (3, ("blocks.3",)), (2, ("blocks.0", "blocks.4"))):
        for rate in (4e5, 1e6, 4e6):
            plan = planned(module, num_slots=num_slots, resident=resident, homes={k: v for k, v in homes.items() if v != "disk"})
            device = SimulatedEngine(rate, compute, schedule, pageable_bytes_per_s=rate / 6)
            with bind(module, plan, device):
                for _ in range(60):
                    module(torch.randn(3, 8))
            predicted = simulate(
                plan.anatomy.units, plan.resident, plan.binding, plan.slots, compute, rate, homes=plan.homes, pageable_bytes_per_s=rate / 6
            )
            late = device.forwards[20:]
            assert sum(f.ms for f in late) / len(late) == pytest.approx(predicted.total_ms, rel=0.01)
            assert sum(f.stall_ms for f in late) / len(late) == pytest.approx(predicted.stall_ms, rel=0.01, abs=0.01)
            # From slots that are empty, forward by forward, to the last digit.
            cold = simulate(
                plan.anatomy.units,
                plan.resident,
                plan.binding,
                plan.slots,
                compute,
                rate,
                homes=plan.homes,
                pageable_bytes_per_s=rate / 6,
                forwards=3,
            )
            assert sum(f.ms for f in device.forwards[:3]) / 3 == pytest.approx(cold.total_ms, rel=1e-9)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_compiled_after_binding_have_no_hook_in_them(stack, planned, backend: str):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    with bind(module, planned(module, resident=("blocks.2",)), engine("random"), poison=True) as bound:
        bound.compile(backend=backend, fullgraph=True)
        for _ in range(3):
            assert torch.equal(module(x), want)
        torch._dynamo.config.error_on_recompile = True
        try:
            assert torch.equal(module(x), want)
        finally:
            torch._dynamo.config.error_on_recompile = False
        assert bound.engine.races == []
    assert torch._dynamo.config.recompile_limit == limit
    assert torch.equal(module(x), want)


def test_a_plan_that_says_compile_compiles(stack, planned, monkeypatch):
    module = stack(num_blocks=3)
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: asked.append(call.__self__) or call)
    with bind(module, planned(module, compile=True, resident=("blocks.1",)), engine()):
        assert asked == list(module.blocks)


def test_somebody_compiling_the_whole_model_gets_the_same_bits(stack, planned):
    module = stack()
    x = torch.randn(3, 8)
    want = module(x)
    torch._dynamo.reset()
    with bind(module, planned(module), engine(), poison=True) as bound:
        compiled: Callable[..., torch.Tensor] = torch.compile(module, backend="eager")
        for _ in range(3):
            assert torch.equal(compiled(x), want)
        assert bound.engine.races == [] and bound.streamer.demand_fetches == 0


def test_an_audit_finds_the_bytes_that_were_loaded(stack, planned):
    module = stack()
    with bind(module, planned(module), engine(), audit=True) as bound:
        for _ in range(3):
            module(torch.randn(3, 8))
        assert bound.streamer.audited() == {name: [bound.checksums[name]] * 3 for name in bound.plan.binding}
        lane = bound.streamer.lanes["blocks.2"]
        lane.source.bytes_for_copy("blocks.2")[3] ^= 1
        module(torch.randn(3, 8))
        module(torch.randn(3, 8))
        assert bound.checksums["blocks.2"] not in bound.streamer.audited()["blocks.2"][1:]


def packed_stack(stack, tmp_path, budget: float, **spec):
    """A stack, its plan by the planner, and its packed folder."""
    module = stack(num_blocks=8)
    anatomy = dissect(module, small_bytes=1)
    known = Calibration(
        device="simulated",
        link_bytes_per_s=4e6,
        pageable_bytes_per_s=1e6,
        disk_bytes_per_s=2e6,
        compute_ms={unit.name: 0.4 for unit in anatomy.units} | {"": 0.2},
    )
    pack(Owned(module, free=False), anatomy, tmp_path / "packed")
    made = planner.plan(
        anatomy, StreamSpec(budget_share=budget, disk=str(tmp_path / "packed"), **spec), known, available_host_bytes=1 << 30
    )
    return module, made


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("budget", "lockable"), [(0.5, 8000), (0.7, 5000)])
def test_a_planned_model_with_units_on_a_disk_runs_as_predicted(stack, tmp_path, budget, lockable, schedule):
    module, made = packed_stack(stack, tmp_path, budget, pin_limit_bytes=lockable)
    on_disk = [unit for unit in made.anatomy.units if made.homes.get(unit.name) == "disk"]
    assert on_disk
    x = torch.randn(3, 8)
    want = module(x)
    known = made.calibration
    device = SimulatedEngine(
        known.link_bytes_per_s,
        known.compute_ms,
        schedule,
        pageable_bytes_per_s=known.pageable_bytes_per_s,
        disk_bytes_per_s=known.disk_bytes_per_s,
    )
    with (
        Ring(device, tmp_path / "packed", on_disk) as ring,
        bind(module, made, device, {u.name: ring for u in on_disk}, poison=True) as bound,
    ):
        for _ in range(40):
            assert torch.equal(module(x), want)
        assert device.races == [] and bound.streamer.demand_fetches == 0
    late = device.forwards[20:]
    assert sum(f.ms for f in late) / len(late) == pytest.approx(made.predicted_ms, rel=0.01)
    assert torch.equal(module(x), want)


def test_threads_that_read_the_true_weights_at_once_read_them(stack, planned):
    """Each of a unit's parameters is asked for after the other, by several at once, and a forward forgets what was read last."""
    module, x = stack(), torch.randn(3, 8)
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    wrong: list[str] = []

    def read() -> None:
        for _ in range(60):
            found = module.state_dict()
            wrong.extend(name for name, value in wanted.items() if not torch.equal(found[name], value))

    interval = sys.getswitchinterval()
    with bind(module, planned(module), engine()):
        sys.setswitchinterval(1e-6)
        try:
            readers = [threading.Thread(target=read) for _ in range(3)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            module(x)
        finally:
            sys.setswitchinterval(interval)
    assert wrong == []
