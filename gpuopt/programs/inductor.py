"""Inductor as the backends `inductor` and `aoti` both drive it: a preset's settings, its C++ compiler, the graphs it generates code from and the code itself.

Apart from `weigh`, because Inductor takes a second to import.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._inductor import cpp_builder, exc

from gpuopt.core.errors import UsageError
from gpuopt.core.tally import Tally
from gpuopt.programs import generated
from gpuopt.programs.passes import Asked

QUIET = {"autotune_num_choices_displayed": 0}
"""max-autotune prints a table for every product otherwise."""


PICKING = frozenset(
    {
        "max_autotune",
        "max_autotune_gemm",
        "max_autotune_pointwise",
        "coordinate_descent_tuning",
        "triton.cudagraphs",
        "triton.enable_pdl",
        "wide_rows",
        "streams",
    }
)
"""Settings that leave a program what it is, and pick its kernels or replay them."""


def settings(
    backend: str, presets: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any], *, own: Iterable[str], names: str = ""
) -> dict[str, Any]:
    """A preset's settings under those of `options`, but for the keys in `own`, which are not Inductor's.

    `names` says in a message what a user may set besides Inductor's own names. Raises UsageError for an unknown preset or setting, Unsupported for one that is not safe with this torch.
    """
    preset = options.get("preset") or "default"
    if preset not in presets:
        raise UsageError(f"{backend} has no preset {preset!r}", fix="one of: " + ", ".join(presets))
    asked = {key: value for key, value in options.items() if key not in own}
    known = torch._inductor.config.get_config_copy()
    for key in asked:
        if key not in known:
            raise UsageError(f"{backend} has no option {key!r}", fix=f"{names}a name in torch._inductor.config")
    found = {**QUIET, **presets[preset], **asked}
    if found.get("triton.enable_pdl"):
        from gpuopt.programs.dependent import wait_first  # with Inductor's code generator, which takes seconds

        wait_first()
    return found


def has_cpp_compiler() -> bool:
    """Inductor writes C++ for a CPU and for every package: asks for the compiler it would use."""
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


_ONE_READER = threading.RLock()
_TRIED = "benchmark_"
"""Names of graphs that a choice of max-autotune consists of (torch/_inductor/codegen/subgraph.py)."""


@contextmanager
def reading(into: list[generated.Generated]) -> Iterator[None]:
    """What Inductor generates inside: one entry a graph, in the order they are compiled. Costs milliseconds a graph; nothing of the graphs stays alive.

    Wrapped around `GraphLowering.codegen`, which Python and C++ wrappers both go through and caches do not (GraphReader keeps compiles out of them). One block at a time in
    a process: the method is put back as it was.
    """
    with _ONE_READER:
        # Here and not above: it brings in every lowering and template, three seconds that whoever only asks what a backend can do would wait for.
        from torch._inductor.graph import GraphLowering

        original = GraphLowering.codegen
        places: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

        def codegen(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, *args, **kwargs)
            # A constants' graph runs when the weights are loaded, one that autotuning tries out while it compiles: neither in a call.
            if not self.is_const_graph and not str(self.name).startswith(_TRIED):
                wrapper = found[0] if isinstance(found, tuple) else found
                told = generated.Generated(code=str(getattr(wrapper, "value", "")), nodes=generated.nodes_of(self.module.graph))
                if self in places:  # a package may be generated twice, first to try its kernels out
                    into[places[self]] = told
                else:
                    places[self] = len(into)
                    into.append(told)
            return found

        GraphLowering.codegen = codegen  # type: ignore[method-assign]
        try:
            yield
        finally:
            GraphLowering.codegen = original  # type: ignore[method-assign]


def class_names(module: Any) -> dict[str, str] | None:
    """Qualified name -> class name of its submodules; None for an exported program's, whose graph has names and no classes."""
    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.fx.GraphModule):
        return None
    return {name: type(child).__name__ for name, child in module.named_modules()}


class GraphReader(Asked):
    """A post-grad pass that looks at each graph and changes nothing."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.num_graphs += 1
        self.tally.add_graph(graph)
