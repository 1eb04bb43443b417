"""Passes over Inductor's graphs that are asked afterwards what they saw or did: what all of them need, whatever they do."""

from __future__ import annotations

from typing import Any, Self

import torch._inductor.config
from torch._inductor.custom_graph_pass import CustomGraphPass


class Asked(CustomGraphPass):
    """A pass whose attributes tell of what was compiled with it."""

    def __deepcopy__(self, memo: Any) -> Self:
        """Settings are copied deeply in places (AOTInductor does): what a copy read or did would be lost."""
        return self

    def uuid(self) -> None:
        """None keeps this compile out of Inductor's graph caches: a hit would skip the pass, and would report a cached compile time as if it were one."""
        return None


class PreGrad(Asked):
    """One that changes the graph as it was traced."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of Inductor, to be compiled with."""
        # Newer versions ask a pass without a uuid to say that it runs before caches are looked into, and warn where it does not.
        is_asked = "pre_grad_pass_timing" in torch._inductor.config.get_config_copy()
        return {"pre_grad_custom_pass": self, **({"pre_grad_pass_timing": "early"} if is_asked else {})}
