"""What Dynamo and Inductor say, in real compilations and in the words of their logs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch._logging._internal import log_state

from gpuopt.programs import breaks


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        if y.sum() > 0:  # HERE
            y = y * 2
        return y


class Layered(nn.Module):
    """Its break is in a loop: Dynamo gives the whole forward up, and counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branching() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Printing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        print(end="")  # PRINT
        return y * 2


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # COUNT
        return x * self.calls


class Cached(nn.Module):
    """One table a size, as some rotary embeddings keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = int(x.shape[0])
        if size not in self.tables:
            self.tables[size] = torch.ones(size, 1)
        return x * self.tables[size]


class Even(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] % 2 == 0 else x


def line(word: str) -> str:
    with open(__file__, encoding="utf-8") as file:
        return f"test_breaks.py:{next(n for n, text in enumerate(file, 1) if text.rstrip().endswith(f'# {word}'))}"


def heard(module: nn.Module, *sizes: int, into: breaks.Heard | None = None) -> breaks.Heard:
    found = into or breaks.Heard()
    torch._dynamo.reset()  # a function that an earlier test had compiled breaks silently
    compiled = torch.compile(module.eval(), backend=lambda graph, _: graph.forward)
    with found.listening(), torch.no_grad():
        for size in sizes:
            compiled(torch.randn(size, 8))
    return found


def calls(*sizes: int) -> list[list[Callable[[], Any]]]:
    return [[(lambda size=size: ((torch.randn(size, 8),), {})) for size in sizes]]


def test_a_break_is_told_with_the_users_line_and_the_reason_first() -> None:
    ((reason, place),) = heard(Branching(), 4).breaks
    assert place == line("HERE")
    assert reason.startswith("Data-dependent branching\nExplanation: Detected data-dependent branching")


def test_a_break_in_a_loop_is_told_though_dynamo_counts_none() -> None:
    before = counters["graph_break"].total()
    found = heard(Layered(), 4)
    assert counters["graph_break"].total() == before
    assert {place for _, place in found.breaks} == {line("HERE")}
    assert any("its function runs uncompiled" in reason.partition("\n")[0] for reason, _ in found.breaks)


def test_what_could_not_be_traced_is_named() -> None:
    ((reason, place),) = heard(Printing(), 4).breaks
    assert place == line("PRINT") and "`print`" in reason


def test_the_same_break_met_again_is_counted_at_its_line() -> None:
    found = heard(nn.Sequential(Branching(), Branching()), 4)
    assert {place for _, place in found.breaks} == {line("HERE")} and found.breaks.total() >= 2


def test_a_module_compiled_again_in_every_call_says_which_guard_and_where() -> None:
    found = heard(Counting(), 4, 4, 4)
    assert [g for _, g in found.recompiles] == [f"self.calls == {n}, at {line('COUNT')}" for n in (0, 1)]
    assert {f.partition(" (")[0] for f, _ in found.recompiles} == {"forward"}


def test_a_module_called_twice_alike_is_compiled_once() -> None:
    found = heard(Branching(), 4, 4)
    assert not found.recompiles
    compiled = found.num_compiled
    assert compiled >= 1


def test_graphs_of_another_module_of_the_same_class_are_no_recompilation() -> None:
    heard(Even(), 4, 5)
    assert heard(Even(), 4, 4).recompiles == []
    heard(nn.Linear(8, 8), 4)
    assert heard(nn.Linear(8, 8).double().float(), 4, 4).recompiles == []


def test_several_windows_add_up() -> None:
    found = breaks.Heard()
    module = Counting()
    compiled = torch.compile(module, backend=lambda graph, _: graph.forward)
    for _ in range(3):
        with found.listening(), torch.no_grad():
            compiled(torch.randn(4, 8))
    assert len(found.recompiles) == 2


def test_loggers_are_left_as_they_were_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    names = (*breaks._BREAKS, *breaks._RECOMPILES, *breaks._PARTITIONS, *breaks._SKIPS)
    before = {n: (logging.getLogger(n).level, logging.getLogger(n).propagate, list(logging.getLogger(n).handlers)) for n in names}
    artifacts = set(log_state.artifact_names)
    heard(Layered(), 4)
    heard(Counting(), 4, 4)
    with pytest.raises(RuntimeError, match="mine"), breaks.Heard().listening():
        raise RuntimeError("mine")
    assert before == {n: (logging.getLogger(n).level, logging.getLogger(n).propagate, list(logging.getLogger(n).handlers)) for n in names}
    assert log_state.artifact_names == artifacts
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["", ".__cudagraphs", ".__perf_hints"])
def test_a_skipped_cuda_graph_is_caught_with_its_reason_and_its_stack_wherever_it_is_logged(suffix: str) -> None:
    found = breaks.Heard()
    told = 'skipping cudagraphs due to mutated inputs (1 instances). Found from : \n   File "/srv/app/model.py", line 12, in forward\n    x.add_(1)'
    logger = logging.getLogger("torch._inductor.cudagraph_utils" + suffix)
    propagates, logger.propagate = logger.propagate, False
    try:
        with found.listening():
            counters["inductor"]["cudagraph_skips"] += 1
            logger.warning(told)
            logger.warning("something else")
    finally:
        logger.propagate = propagates
    assert found.skips == [told] and found.num_skipped == 1


def test_an_op_between_two_parts_of_a_cuda_graph_is_a_skip_with_its_line() -> None:
    """As torch 2.13 logs it on a GPU: Inductor splits the graph around what cannot be recorded, and skips nothing as a whole."""
    found, log = breaks.Heard(), logging.getLogger("torch._inductor.scheduler.__cudagraphs")
    with found.listening():
        log.debug("Created %d graph partitions: %d cudagraphable, %d non-cudagraphable", 3, 2, 1)
        log.debug("  Partition %d: %d nodes, %s, inputs=%d, outputs=%d", 1, 1, "non-cudagraphable", 1, 1)
        log.debug("    %s: %s", "op7", "reason=cpu ops, ir=ComputedBuffer, fx=aten.mul.Tensor(arg0_1, 2)")
        log.debug("         %s", 'File "/srv/app/model.py", line 31, in forward')
    (only,) = found.skips
    assert (
        only.startswith("skipping cudagraphs due to cpu ops in a part of the graph: aten.mul.Tensor\n")
        and '/srv/app/model.py", line 31' in only
    )


def test_windows_of_two_threads_do_not_overlap_and_leave_the_loggers_as_they_were() -> None:
    logger = logging.getLogger(breaks._RECOMPILES[0])
    before, order = (logger.level, logger.propagate, list(logger.handlers)), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with breaks.Heard().listening():
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        inside.wait(10)
        with breaks.Heard().listening():
            order.append("second")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    assert inside.wait(10)
    leave.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second"]
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_window_that_cannot_be_opened_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger(breaks._BREAKS[0])
    before = (logger.level, logger.propagate, list(logger.handlers))
    monkeypatch.setattr(breaks.callback_handler, "register_start_callback", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), breaks.Heard().listening():
        pass
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_graph_that_nobody_wanted_recorded_is_no_skip() -> None:
    """As torch 2.11 logs it on a GPU of every op of a plain torch.compile."""
    found, log = breaks.Heard(), logging.getLogger("torch._inductor.scheduler.__cudagraphs")
    with found.listening():
        reason = "partition includes all ops when cudagraphs is disabled"
        log.debug("    %s: %s", "op7", f"reason={reason}, ir=ExternKernelOut, fx=aten.addmm.default(arg0_1, arg1_1, permute)")
        log.debug("         %s", 'File "/srv/app/model.py", line 31, in forward')
    assert found.skips == []


def test_a_break_inside_torch_is_placed_in_the_users_code_around_it() -> None:
    text = (
        f"Graph break in user code at {breaks._LIBRARY}nn/functional.py:99\nGraph Break Reason: Unsupported thing\n  Explanation: why\n\n"
        f'User code traceback:\n  File "{breaks._OURS}backends/inductor.py", line 3, in call\n  File "/srv/app/model.py", line 12, in forward\n    y = f(x)\n'
        f'  File "{breaks._LIBRARY}nn/functional.py", line 99, in f\n'
    )
    again = f"Graph break (user stack suppressed due to duplicate graph break) in user code at {breaks._LIBRARY}nn/functional.py:99\nGraph Break Reason: Unsupported thing\n  Explanation: why"
    found, log = breaks.Heard(), logging.getLogger(breaks._BREAKS[0])
    with found.listening():
        log.debug(text)
        log.debug(again)
    assert dict(found.breaks) == {("Unsupported thing\nExplanation: why", "model.py:12"): 2}


def test_a_package_whose_name_begins_like_torch_is_the_users() -> None:
    assert (
        breaks._place('File "/srv/app/model.py", line 1, in f', (f"{breaks._LIBRARY.removesuffix('/')}vision/models/resnet.py", "7"))
        == "resnet.py:7"
    )


def test_a_frame_given_up_as_a_whole_is_read_from_the_exception_it_is_logged_with() -> None:
    found, log = breaks.Heard(), logging.getLogger(breaks._BREAKS[1])
    with found.listening():
        try:
            raise torch._dynamo.exc.TorchRuntimeError("something odd\nmore")
        except RuntimeError:
            log.debug(
                'Graph break: torch.compile cannot properly resume from this graph break, which results in a skip.\nThe graph break occurred in the following user code:\n  File "/srv/app/model.py", line 5, in forward\n',
                exc_info=True,
            )
    assert dict(found.breaks) == {("something odd\nmore", "model.py:5"): 1}


def test_what_is_counted_and_not_logged_is_told_without_a_line() -> None:
    found = breaks.Heard()
    with found.listening():
        counters["graph_break"]["Some reason\n  Explanation: …"] += 2
    assert dict(found.breaks) == {("Some reason\nExplanation: …", ""): 2}


def test_other_sizes_of_a_model_that_takes_them_compile_nothing_further() -> None:
    assert breaks.probe(nn.Linear(8, 8).eval(), calls(4, 5, 6, 7)) == ()
    assert breaks.probe(nn.Linear(8, 8).eval(), calls(1, 2, 3, 4)) == ()


def test_a_model_that_keeps_a_table_a_size_is_compiled_again_for_each() -> None:
    found = breaks.probe(Cached().eval(), calls(4, 5, 6, 7))
    assert len(found) == 2 and all("size mismatch at index 0" in guard for _, guard in found)


def test_a_branch_on_a_size_is_told_with_its_condition() -> None:
    ((function, guard),) = breaks.probe(Even().eval(), calls(4, 5, 6, 8))
    assert "% 2)" in guard and function.startswith("forward (test_breaks.py:")


def test_a_size_the_model_refuses_ends_the_probe_of_that_dimension() -> None:
    fixed = nn.Sequential(nn.Flatten(0), nn.Linear(32, 2)).eval()
    assert breaks.probe(fixed, [*calls(4, 5, 6, 7), *calls(4, 3, 2, 5)]) == ()


def test_a_probe_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaks, "PROBE_S", -1.0)
    module = Counting()
    assert breaks.probe(module, calls(4, 5, 6)) == () and module.calls == 0
