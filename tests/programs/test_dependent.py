"""Where Inductor's kernels wait under programmatic dependent launch: before anything else, once asked to."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V

from gpuopt.core.errors import Unsupported
from gpuopt.programs import dependent
from gpuopt.programs import inductor as compiler
from gpuopt.programs.dependent import CHOOSES, ENABLED, wait_first


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own choice, after each test."""
    own = getattr(TritonKernel, CHOOSES)
    assert not getattr(own, "waits_first", False), "somebody before has changed it for the whole process"
    monkeypatch.setattr(TritonKernel, CHOOSES, own)


def written(read: str, *wrote: str, scheduled: bool = True) -> str:
    """What Inductor writes before a kernel reads `read`, the node before it having written `wrote`. Without a schedule: what a template's kernel is asked for."""
    kernel: Any = SimpleNamespace(
        _enable_pdl_codegen=lambda: scheduled,
        inside_reduction=False,
        GDC_WAIT=TritonKernel.GDC_WAIT,
        current_node=SimpleNamespace(mutation_renames={}),
    )
    before = SimpleNamespace(read_writes=SimpleNamespace(writes=[SimpleNamespace(name=name) for name in wrote], reads=[]))
    graph: Any = SimpleNamespace(scheduler=SimpleNamespace(previous_node=before) if scheduled else None)
    buffer = IndentedBuffer()
    with V.set_graph_handler(graph), V.set_kernel_handler(kernel):
        getattr(TritonKernel, CHOOSES)(kernel, buffer, read)
    assert not scheduled or graph.scheduler.previous_node is before
    return buffer.getvalue().strip()


def test_a_kernel_waits_whoever_wrote_what_it_reads() -> None:
    """The first line is Inductor's defect, and the reason for all of this: once it is mended there, the module can go."""
    assert written("buf1", "buf2") == ""
    assert written("buf1", "buf1") == TritonKernel.GDC_WAIT
    wait_first()
    once = getattr(TritonKernel, CHOOSES)
    wait_first()
    assert getattr(TritonKernel, CHOOSES) is once
    assert written("buf1", "buf2") == written("buf1", "buf1") == TritonKernel.GDC_WAIT
    assert written("buf1", scheduled=False) == "", "a template is rendered before there is a schedule"


def test_a_torch_that_waits_elsewhere_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, results would be wrong."""
    monkeypatch.setattr(dependent, "CHOOSES", "_gone")
    with pytest.raises(Unsupported, match="elsewhere"):
        wait_first()


@pytest.mark.parametrize("backend", ["inductor", "aoti"])
def test_whoever_asks_for_it_has_it(backend: str) -> None:
    """Compiled at once, or again at some later call."""
    options = {"triton.enable_pdl": False}
    compiler.settings(backend, {"default": {}}, options, own=("preset",))
    assert written("buf1", "buf2") == ""
    compiler.settings(backend, {"default": {}}, {ENABLED: True}, own=("preset",))
    assert written("buf1", "buf2") == TritonKernel.GDC_WAIT


@pytest.mark.gpu
def test_all_kernels_of_a_graph_wait_before_they_touch_memory() -> None:
    from torch._inductor.utils import run_and_get_code

    from gpuopt.programs.one_row import OneRow
    from tests.programs.test_one_row import Block

    torch.manual_seed(0)
    module = torch.nn.Sequential(Block(), Block()).eval().cuda().half()
    x = torch.randn(1, 1, 64, device="cuda").half()
    rows = OneRow(least_bytes=0)
    torch._dynamo.reset()
    wait_first()
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(torch.compile(module, fullgraph=True, options={**rows.settings, "triton.enable_pdl": True}), x)
    kernels = re.findall(r"^def triton_.*?(?=^''')", code, re.DOTALL | re.MULTILINE)
    assert rows.num_changed == 14 and kernels
    for kernel in kernels:
        touches = min(kernel.find(call) for call in ("tl.load(", "tl.store(") if call in kernel)
        assert -1 < kernel.find("gdc_wait") < touches, kernel
        assert kernel.find("gdc_wait") < kernel.find("gdc_launch_dependents"), kernel
    wanted = module.double()(x.double())
    assert (found - wanted).norm() / wanted.norm() < 2e-3
