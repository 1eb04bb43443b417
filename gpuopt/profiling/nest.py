"""Ops, module ranges and Python frames of a trace, by thread -> ops with their parents, modules, lines and self times; and which op runs at a time."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from operator import itemgetter

from gpuopt.core.trace import CpuOp, ModuleRange
from gpuopt.profiling.rows import MarkRow, OpRow

MODULE = "module::"
"""A mark `module::<qualified name>|<class>` is one forward of one module."""

Open = tuple[int, int | None, int | None, tuple[str, str] | None, str]
"""(end, innermost op, the op that what comes directly below counts for, (module, class), line) of a range that is running."""
Item = tuple[int, int, int, OpRow | MarkRow]
"""(start, minus the duration, external id, row): in the order of nesting."""
_ORDER = itemgetter(0, 1, 2)


def nested(
    ops: list[OpRow], ranges: list[MarkRow], frames: list[MarkRow], origin: float, step_of: Callable[[int], int | None]
) -> tuple[tuple[CpuOp, ...], tuple[ModuleRange, ...], dict[str, range]]:
    """(ops by thread in the order of their starts, module ranges in order, thread -> indices of its ops)."""
    threads: dict[str, list[Item]] = {}
    for op in ops:
        threads.setdefault(op.thread, []).append((round((op.ts - origin) * 1000), -round(op.dur * 1000), op.external_id or 0, op))
    for mark in (*ranges, *frames):
        threads.setdefault(mark.thread, []).append((round((mark.ts - origin) * 1000), -round(mark.dur * 1000), 0, mark))
    found: list[CpuOp] = []
    modules: list[ModuleRange] = []
    by_thread: dict[str, range] = {}
    for thread, items in threads.items():
        first = len(found)
        _thread(thread, items, found, modules, step_of)
        if len(found) > first:
            by_thread[thread] = range(first, len(found))
    return tuple(found), tuple(sorted(modules, key=lambda m: m.start_ns)), by_thread


def _thread(
    thread: str,
    items: list[Item],
    found: list[CpuOp],
    modules: list[ModuleRange],
    step_of: Callable[[int], int | None],
) -> None:
    """One thread's. Long on purpose: it runs a million times."""
    # Ties: the longer encloses the shorter; between equals, the one recorded first (its external id is lower).
    items.sort(key=_ORDER)
    first = len(found)
    drafts: list[tuple[OpRow, int, int, int | None, tuple[str, str] | None, str]] = []
    children: list[int] = []
    counts: list[int] = []
    stack: list[Open] = []
    for start, negative, _, row in items:
        while stack and stack[-1][0] <= start and not (negative == 0 and stack[-1][0] == start):
            stack.pop()
        end = start - negative
        if stack:
            around, parent, owner, module, line = stack[-1]
            if end > around:  # rounding may push a child past its parent's end
                end = around
        else:
            parent, owner, module, line = None, None, None, ""
        if isinstance(row, MarkRow) and not row.name.startswith(
            MODULE
        ):  # a Python frame: it names what is in it, and takes no part otherwise
            stack.append((end, parent, owner, module, row.name))
            continue
        if owner is not None:
            children[owner - first] += end - start
            counts[owner - first] += 1
        if isinstance(row, MarkRow):
            path, _, module_class = row.name[len(MODULE) :].partition("|")
            modules.append(ModuleRange(name=path, module_class=module_class, start_ns=start, dur_ns=-negative, thread=thread))
            # A module called inside an op (a scripted one) still hangs below that op, which has counted it whole.
            stack.append((end, parent, None, (path, module_class), line))
            continue
        index = first + len(drafts)
        drafts.append((row, start, end - start, parent, module, line))
        children.append(0)
        counts.append(0)
        stack.append((end, index, index, module, line))
    for at, (op, start, dur, parent, module, line) in enumerate(drafts):
        found.append(
            CpuOp(
                index=first + at,
                name=op.name,
                start_ns=start,
                dur_ns=dur,
                self_ns=max(0, dur - children[at]),
                num_children=counts[at],
                thread=thread,
                parent=parent,
                module=module[0] if module is not None else None,
                module_class=module[1] if module is not None else "",
                step=step_of(start),
                external_id=op.external_id,
                shapes=op.shapes,
                dtypes=op.dtypes,
                line=line,
            )
        )


class Locator:
    """(thread, time) -> innermost op running then."""

    def __init__(self, ops: tuple[CpuOp, ...], by_thread: dict[str, range]) -> None:
        self._ops = ops
        self._starts = {thread: [ops[i].start_ns for i in indices] for thread, indices in by_thread.items()}
        self._first = {thread: indices.start for thread, indices in by_thread.items()}

    def __call__(self, thread: str, time_ns: int) -> int | None:
        starts = self._starts.get(thread)
        if not starts:
            return None
        at = bisect.bisect_right(starts, time_ns) - 1
        # The last op to start before then is the innermost one or a finished one below it: climb until one still runs.
        op: int | None = self._first[thread] + at if at >= 0 else None
        while op is not None:
            found = self._ops[op]
            if time_ns <= found.start_ns + found.dur_ns:
                break
            op = found.parent
        return op
