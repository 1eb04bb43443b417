"""Rows of several processes in one file (traces of several ranks, merged), or of one file twice -> those of one process, once, and what was left out."""

from __future__ import annotations

import bisect
from typing import TypeVar

from gpuopt.profiling.rows import CallRow, MarkRow, OpRow, Rows, WorkRow

Row = TypeVar("Row", OpRow, CallRow, WorkRow, MarkRow)


def process_of(thread: str) -> str:
    """`12/13` -> `12`."""
    return thread.partition("/")[0]


def keep_process(rows: Rows, process: str) -> list[str]:
    """Drop what other processes did, in place; notes.

    Ranks count correlations on their own, so equal ones meet in one file: work on a device belongs to the last launch before it with its correlation and op.
    """
    launches: dict[tuple[int | None, int | None], list[tuple[float, str]]] = {}
    for call in sorted(rows.calls, key=lambda call: call.ts):
        launches.setdefault((call.correlation, call.external_id), []).append((call.ts, process_of(call.thread)))

    def is_ours(work: WorkRow) -> bool:
        known = launches.get((work.correlation, work.external_id), [])
        # A file without correlations has all of its launches under one key: no walk through them for every kernel.
        at = bisect.bisect_right(known, work.ts, key=lambda launch: launch[0])
        return at > 0 and known[at - 1][1] == process

    others = {process_of(op.thread) for op in rows.ops} - {process}
    rows.ops = [op for op in rows.ops if process_of(op.thread) == process]
    rows.calls = [call for call in rows.calls if process_of(call.thread) == process]
    rows.marks = [mark for mark in rows.marks if process_of(mark.thread) in (process, "")]
    rows.frames = [frame for frame in rows.frames if process_of(frame.thread) == process]
    num_works = len(rows.kernels) + len(rows.memsets) + len(rows.copies)
    rows.kernels, rows.memsets, rows.copies = ([w for w in works if is_ours(w)] for works in (rows.kernels, rows.memsets, rows.copies))
    dropped = num_works - len(rows.kernels) - len(rows.memsets) - len(rows.copies)
    return [
        f"ops of {len(others) + 1} processes in one file (several ranks?): process {process} is explained, "
        f"{dropped} device events of the others are left out; explain each rank's own file"
    ]


def once(rows: Rows) -> list[str]:
    """Drop events that stand twice, in place; notes. A device runs no two kernels of one launch at one time on one stream."""
    works = [*rows.kernels, *rows.memsets, *rows.copies]
    keys = {(w.ts, w.device, w.stream, w.correlation, w.name) for w in works}
    if len(keys) == len(works) and (works or len({(o.ts, o.thread, o.external_id, o.name) for o in rows.ops}) == len(rows.ops)):
        return []
    before = len(rows)
    rows.kernels, rows.memsets, rows.copies = _unique(rows.kernels), _unique(rows.memsets), _unique(rows.copies)
    rows.ops, rows.calls, rows.marks = _unique(rows.ops), _unique(rows.calls), _unique(rows.marks)
    dropped = before - len(rows)
    return [f"{dropped} events stand in the file twice and were read once"] if dropped else []


def _unique(rows: list[Row]) -> list[Row]:
    return list(dict.fromkeys(rows))
