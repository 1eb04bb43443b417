"""Inductor's kernels under programmatic dependent launch -> each waits for the kernels before it, and only then touches memory.

With `triton.enable_pdl` (torch 2.11 to 2.13) Inductor lets a kernel wait only before it reads or writes what the node just before it in the schedule wrote, by that buffer's
name. That is too little behind an operator with several outputs: the node before is one of them, and the others are read while the operator still computes. Nor does a name
say that memory was reused. A kernel that waits first still has its launch, and the one behind it the first elements of its weights, for free.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.virtualized import V

from gpuopt.core.errors import Unsupported

ENABLED = "triton.enable_pdl"
"""Inductor's setting."""
CHOOSES = "_handle_pdl_before_access"
"""Inductor's method that writes a wait into a kernel, or does not."""


def wait_first() -> None:
    """From now on, what Inductor compiles in this process with that setting waits so: a model may be compiled again at any call, for other shapes. Harmless twice.

    Raises Unsupported for a torch that places the waits elsewhere.
    """
    chosen = getattr(TritonKernel, CHOOSES, None)
    if chosen is None:
        raise Unsupported("this version of torch places the waits of dependent launches elsewhere", fix=f"leave {ENABLED} out")
    if getattr(chosen, "waits_first", False):
        return

    def always(kernel: Any, buffer: Any, *dependencies: Any, **more: Any) -> None:
        scheduler = V.graph.scheduler
        if scheduler is None:  # a template's kernel, before there is a schedule: it has no part in dependent launch
            chosen(kernel, buffer, *dependencies, **more)
            return
        before = scheduler.previous_node
        scheduler.previous_node = None  # as for the first kernel of a graph, of whose predecessor nothing is known
        try:
            chosen(kernel, buffer, *dependencies, **more)
        finally:
            scheduler.previous_node = before

    always.waits_first = True  # type: ignore[attr-defined]
    setattr(TritonKernel, CHOOSES, always)
