"""What ran on a device, in order + what was to be launched, in order -> which belongs to which.

For kernels that carry no module of their own: compiled code, CUDA-graph replays, packages. A kernel is only ever given to a launch that may run it: of exactly its name, of the
op that launched it, or of its kind of work. Order is kept, so repeated layers fall into place; where two equally long matches put a kernel into different modules, it is
left open. Kernels that only prepare or finish a library's op (a memset, a sum over split K) go with the op they stand beside.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from gpuopt.core import kernels as names
from gpuopt.core.launches import Launch, module_of

MAX_CELLS = 400_000_000
"""Kernels times launches of one step that are compared: a tenth of a second for the two thousand of a large model, seconds at this limit; beyond it nothing is aligned."""

_PREPARING = ("memory", "nchw-nhwc", "strided copy", "reformat")
_FINISHING = ("reduction",)
_PRODUCTS = ("product", "convolution")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One kernel of a step."""

    name: str
    op: str | None = None
    """Canonical name of the op that launched it, where the trace says and the launches know it."""
    instance: Hashable = None
    """Which call of that op: its kernels go together."""
    is_foreign: bool = False
    """Launched by an op that is none of the artifact's: a copy into a CUDA graph's inputs."""


def match(ran: Sequence[Ran], launches: Sequence[Launch], canonical: Callable[[str], str]) -> list[int | None]:
    """For each kernel of one step the index of its launch; None where it is nobody's, or could be several modules'.

    canonical: a launch's name -> the name its op has in `Ran.op`.
    """
    groups = _grouped(ran)
    keys = [_key(ran[members[0]]) for members in groups]
    classes = [_class(launch, canonical) for launch in launches]
    mains = [at for at, key in enumerate(keys) if key is not None]
    pairs = common(
        [keys[at] for at in mains], classes, _fits, settled=lambda left, right: module_of(launches[left]) == module_of(launches[right])
    )
    found: list[int | None] = [None] * len(ran)
    for at, launch in zip(mains, pairs, strict=True):
        for member in groups[at]:
            found[member] = launch
    _beside(ran, launches, found)
    return found


def common(
    left: Sequence[Hashable], right: Sequence[Hashable], fits: Callable[[Hashable, Hashable], bool], settled: Callable[[int, int], bool]
) -> list[int | None]:
    """For each of `left` its partner's index in `right`, in one of the longest matches that keep both orders; None where it has none.

    A match that is not the only one stands where `settled` says of its last possible partner and each other one that it makes no difference.
    """
    kinds_left, kinds_right = list(dict.fromkeys(left)), list(dict.fromkeys(right))
    if not left or not right or len(left) * len(right) > MAX_CELLS:
        return [None] * len(left)
    table = np.array([[fits(a, b) for b in kinds_right] for a in kinds_left], dtype=bool)
    at_left, at_right = {k: i for i, k in enumerate(kinds_left)}, {k: i for i, k in enumerate(kinds_right)}
    rows, columns = np.array([at_left[k] for k in left]), np.array([at_right[k] for k in right])
    late = _latest(table, rows, columns)
    early = [None if j is None else len(right) - 1 - j for j in reversed(_latest(table, rows[::-1], columns[::-1]))]
    found: list[int | None] = []
    for row, last, first in zip(rows, late, early, strict=True):
        # Between its first and its last partner any other that fits may be its partner as well.
        is_sure = last is not None and first is not None and (last == first or settled(last, first))
        if is_sure and last is not None and first is not None and last - first > 1:
            between = first + 1 + np.flatnonzero(table[row][columns[first + 1 : last]])
            is_sure = all(settled(last, int(other)) for other in between)
        found.append(last if is_sure else None)
    return found


def _latest(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[int | None]:
    """The longest common subsequence under a table of what fits what, partners as late as they can be."""
    previous = np.zeros(len(columns) + 1, dtype=np.int32)
    same = np.zeros((len(rows), (len(columns) + 8) // 8), dtype=np.uint8)
    for i, row in enumerate(rows):
        fit = table[row][columns]
        current = np.zeros_like(previous)
        np.maximum.accumulate(np.maximum(previous[1:], np.where(fit, previous[:-1] + 1, 0)), out=current[1:])
        same[i] = np.packbits(current == previous)
        previous = current
    found: list[int | None] = [None] * len(rows)
    i, j = len(rows), len(columns)
    while i and j:
        if table[rows[i - 1], columns[j - 1]]:  # a pair at the end of both is in one of the longest matches
            i, j = i - 1, j - 1
            found[i] = j
        elif same[i - 1, j >> 3] >> (7 - (j & 7)) & 1:
            i -= 1
        else:
            j -= 1
    return found


def _grouped(ran: Sequence[Ran]) -> list[list[int]]:
    """Kernels of one call of an op together, where the trace tells."""
    groups: list[list[int]] = []
    for at, kernel in enumerate(ran):
        if groups and kernel.op is not None and ran[groups[-1][0]].op == kernel.op and ran[groups[-1][0]].instance == kernel.instance:
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups


def _key(first: Ran) -> Hashable:
    """(op, name, kind) a group may be matched by; None for what only stands beside others."""
    return None if first.is_foreign else (first.op, first.name, names.kind(first.name))


def _class(launch: Launch, canonical: Callable[[str], str]) -> Hashable:
    if launch.kernels:
        return "kernels", frozenset(launch.kernels)
    if launch.kind != "extern":
        return "name", launch.name
    op = canonical(launch.name)
    return "op", op, group(op)


def group(op: str) -> str:
    """A canonical op -> the kind of kernel that does it: `product`, `attention`, or `` for anything."""
    plain = op.rpartition(".")[2]
    if "attention" in plain:
        return "attention"
    return "product" if plain in _PRODUCTS or plain.endswith(("mm", "mv", "matmul", "linear", "_linear_pointwise")) else ""


def _fits(kernel: Hashable, launch: Hashable) -> bool:
    assert isinstance(kernel, tuple) and isinstance(launch, tuple)
    op, name, kind = kernel
    if launch[0] == "kernels":
        return name in launch[1]
    if launch[0] == "name":
        return bool(op is None and name == launch[1])
    if op is not None:
        return bool(op == launch[1])
    return bool(launch[2] and kind == launch[2] and not name.startswith("triton_"))


def _beside(ran: Sequence[Ran], launches: Sequence[Launch], found: list[int | None]) -> None:
    """Give what is left between two matched kernels to the library's op it belongs to: the only one there, or by whether it prepares or finishes one."""
    before: list[int] = []
    for launch in found:
        before.append(launch if launch is not None else before[-1] if before else -1)
    high = len(launches)
    for at in reversed(range(len(ran))):
        if found[at] is None and not (ran[at].is_foreign or ran[at].op is not None or ran[at].name.startswith("triton_")):
            found[at] = _neighbour(names.kind(ran[at].name), launches, before[at], high)
        placed = found[at]
        high = placed if placed is not None else high


def _neighbour(kind: str, launches: Sequence[Launch], low: int, high: int) -> int | None:
    """Which op a kernel between launches `low` and `high` goes with; both may lie outside."""
    ops = [i for i in range(max(low, 0), min(high, len(launches) - 1) + 1) if launches[i].kind != "triton"]
    if len({module_of(launches[i]) for i in ops}) == 1:
        return ops[0]
    if kind in _FINISHING and low in ops:
        return low
    if kind in _PREPARING and high in ops and not any(low < i < high for i in ops):
        return high
    return None
