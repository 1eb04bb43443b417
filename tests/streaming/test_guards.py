"""What reads weights while they are streamed reads the true ones; what would lose, move or copy them raises and says what to do."""

import copy
import io
import pickle
import threading

import pytest
import torch

from gpuopt.core.errors import UsageError
from gpuopt.streaming.bound import bind
from gpuopt.streaming.engines.simulated import SimulatedEngine


@pytest.fixture
def streamed(stack, planned):
    module = stack()
    with torch.no_grad(), bind(module, planned(module, resident=("blocks.1",)), SimulatedEngine(1e9), poison=True) as bound:
        module(torch.randn(3, 8))
        yield bound


def equal(state, true):
    return state.keys() == true.keys() and all(torch.equal(state[key], true[key]) for key in true)


def test_state_dict_is_the_true_weights_at_any_level(streamed, stack):
    true, module = stack(), streamed.module
    assert not torch.equal(dict(module.named_parameters())["blocks.0.0.weight"], true.blocks[0][0].weight), "or this test shows nothing"
    assert equal(module.state_dict(), true.state_dict())
    assert equal(module.blocks[3].state_dict(), true.blocks[3].state_dict())
    assert equal(module.blocks[3][0].state_dict(prefix="a."), true.blocks[3][0].state_dict(prefix="a."))
    assert equal(module.state_dict(keep_vars=True), true.state_dict())


def test_a_saved_state_is_the_true_weights(streamed, stack):
    file = io.BytesIO()
    torch.save(streamed.module.state_dict(), file)
    file.seek(0)
    assert equal(torch.load(file, weights_only=True), stack().state_dict())


def test_a_state_dict_stays_true_while_forwards_go_on_and_after_closing(streamed, stack):
    state = streamed.module.state_dict()
    streamed.module(torch.randn(3, 8))
    streamed.close()
    assert equal(state, stack().state_dict())


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("meta"),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.cpu(),
        lambda m: m.float(),
        lambda m: m.blocks.double(),
        lambda m: m.blocks[0].half(),
        lambda m: m.blocks[0][0].half(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.share_memory(),
    ],
)
def test_weights_are_not_moved_or_cast_and_nothing_has_changed(streamed, stack, act):
    x = torch.randn(3, 8)
    want = streamed.module(x)
    with pytest.raises(UsageError, match="cannot be moved or cast") as caught:
        act(streamed.module)
    assert "close()" in caught.value.fix
    assert torch.equal(streamed.module(x), want) and torch.equal(want, stack()(x))


def test_moving_to_where_the_model_is_passes(streamed):
    assert streamed.module.to("cpu") is streamed.module
    assert streamed.module.blocks[0].to(device="cpu") is streamed.module.blocks[0]


@pytest.mark.parametrize(
    "act",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda m: torch.save(m, io.BytesIO()),
        lambda m: copy.deepcopy(m.blocks),
        lambda m: pickle.dumps(m.blocks[0][0]),
        lambda m: copy.deepcopy({"model": [m]}),
    ],
)
def test_a_streamed_model_is_not_copied_or_pickled(streamed, act):
    with pytest.raises(UsageError, match="copied or pickled") as caught:
        act(streamed.module)
    assert "state_dict()" in caught.value.fix


def test_loading_weights_while_streamed_raises_before_any_is_written(streamed, stack):
    other = {key: value + 1 for key, value in stack().state_dict().items()}
    for module, state in (
        (streamed.module, other),
        (streamed.module.blocks[0][0], {"weight": torch.zeros(16, 16), "bias": torch.zeros(16)}),
    ):
        with pytest.raises(UsageError, match="load_state_dict"):
            module.load_state_dict(state)
    assert equal(streamed.module.state_dict(), stack().state_dict())


def test_after_closing_everything_is_allowed(streamed):
    streamed.close()
    module = streamed.module
    copy.deepcopy(module)
    pickle.dumps(module)
    module.load_state_dict(module.state_dict())
    module.to(torch.float64).train()
    module(torch.randn(3, 8, dtype=torch.float64))


def test_training_and_gradients_are_refused(streamed):
    x = torch.randn(3, 8)
    with torch.enable_grad(), pytest.raises(UsageError, match="gradients") as caught:
        streamed.module(x)
    assert "inference_mode" in caught.value.fix
    with torch.enable_grad(), pytest.raises(UsageError, match="gradients"):
        streamed.module.blocks[0](torch.randn(3, 16))
    streamed.module.train()
    with pytest.raises(UsageError, match="training mode"):
        streamed.module(x)
    streamed.module.eval()
    streamed.module(x)
    assert streamed.streamer.generation == 0


def test_a_model_in_training_mode_is_not_bound(stack, planned):
    module = stack().train()
    with pytest.raises(UsageError, match="training mode"):
        bind(module, planned(module), SimulatedEngine(1e9))


def test_a_weight_written_while_streamed_is_noticed(streamed):
    streamed.module.blocks[2][0].weight.mul_(2)
    with pytest.raises(UsageError, match=r"blocks\.2\.0\.weight was changed"):
        streamed.module(torch.randn(3, 8))


def test_a_resident_weight_may_be_written(streamed):
    streamed.module.outlet.weight.mul_(2)
    streamed.module(torch.randn(3, 8))


def test_a_second_forward_at_the_same_time_is_refused_and_the_first_is_right(streamed, stack):
    module, x = streamed.module, torch.randn(3, 8)
    inside, go_on, results = threading.Event(), threading.Event(), []

    def hook(*_):
        inside.set()
        assert go_on.wait(20)

    handle = module.blocks[2].register_forward_pre_hook(hook)

    def run():
        with torch.no_grad():
            results.append(module(x))

    first = threading.Thread(target=run)
    first.start()
    assert inside.wait(20)
    for call in (lambda: module(x), lambda: module.blocks[0](torch.randn(3, 16))):
        with pytest.raises(UsageError, match="second forward") as caught:
            call()
        assert "one forward at a time" in caught.value.fix
    go_on.set()
    first.join(20)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(results[0], stack()(x))
        assert torch.equal(module(x), results[0])
    assert streamed.streamer.generation == 0 and streamed.engine.races == []


def test_forwards_in_turns_from_several_threads_are_right(streamed, stack):
    x, results = torch.randn(3, 8), []
    for _ in range(3):

        def run():
            with torch.inference_mode():
                results.append(streamed.module(x).clone())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
    want = stack()(x)
    assert len(results) == 3 and all(torch.equal(each, want) for each in results)
