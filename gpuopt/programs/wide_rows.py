"""Inductor's choice how to reduce a row -> in one piece up to 8,192 elements, where it loops over pieces beyond 1,024.

A loop reads a row once for the reduction and once more for what depends on it, and computes what lies before the reduction twice: for a GELU that is quantised by
its row's largest magnitude that is two error functions an element, which cost more than the memory's share of the kernel. A row in one piece stays in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST = 8192
"""Elements: 32 a thread of the largest block that Inductor gives a row. Beyond it registers spill."""


class WideRows(InductorChoices):
    """At the top level of a module: Inductor pickles the class into its cache keys."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Inductor's own answer, or yes for rows that lie in memory as they are reduced and are not too long."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        if cooperative_reduction or features.get_reduction_hint() != ReductionHint.INNER:
            return False
        return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST))


@contextmanager
def wide_rows(wanted: bool) -> Iterator[None]:
    """What is compiled inside, by this thread, has wide rows if `wanted`."""
    if not wanted:
        yield
        return
    with V.set_choices_handler(WideRows()):
        yield
