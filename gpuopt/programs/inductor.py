"""Inductor as the backends `inductor` and `aoti` both drive it: a preset's settings, its C++ compiler, the graphs it generates code from.

Apart from `weigh`, because Inductor takes a second to import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._inductor import cpp_builder, exc
from torch._inductor.custom_graph_pass import CustomGraphPass

from gpuopt.core.errors import UsageError
from gpuopt.core.tally import Tally

QUIET = {"autotune_num_choices_displayed": 0}
"""max-autotune prints a table for every product otherwise."""


def settings(
    backend: str, presets: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any], *, own: Iterable[str], names: str = ""
) -> dict[str, Any]:
    """A preset's settings under those of `options`, but for the keys in `own`, which are not Inductor's.

    `names` says in a message what a user may set besides Inductor's own names. Raises UsageError for an unknown preset or setting.
    """
    preset = options.get("preset") or "default"
    if preset not in presets:
        raise UsageError(f"{backend} has no preset {preset!r}", fix="one of: " + ", ".join(presets))
    asked = {key: value for key, value in options.items() if key not in own}
    known = torch._inductor.config.get_config_copy()
    for key in asked:
        if key not in known:
            raise UsageError(f"{backend} has no option {key!r}", fix=f"{names}a name in torch._inductor.config")
    return {**QUIET, **presets[preset], **asked}


def has_cpp_compiler() -> bool:
    """Inductor writes C++ for a CPU and for every package: asks for the compiler it would use."""
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


class GraphReader(CustomGraphPass):
    """A post-grad pass that looks at each graph and changes nothing."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.num_graphs += 1
        self.tally.add_graph(graph)

    def __deepcopy__(self, memo: Any) -> GraphReader:
        """AOTInductor deep-copies its settings: what a copy reads would be lost."""
        return self

    def uuid(self) -> None:
        """None keeps this compile out of Inductor's graph caches: a hit would skip the reading, and would report a cached compile time as if it were one."""
        return None
