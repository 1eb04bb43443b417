"""Batches in host memory -> the same on a device: while one is computed with, the next is copied. What `gpuopt.feed` and `--input-mode overlapped` do.

A copy from memory that is not locked is made by the driver through a small buffer of its own while the host waits, and nothing overlaps it. Here a batch goes through locked
memory (its own where a loader pinned it) and a stream of its own into one of `depth` sets of buffers, and the host waits for nothing but its own copy into locked memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuopt.core.errors import UsageError


class _Slot:
    """Where one batch lies on the device, and where it is staged on the host."""

    def __init__(self, cuda: Any) -> None:
        self.copied, self.used = cuda.Event(), cuda.Event()
        self.targets: dict[int, torch.Tensor] = {}
        self.staged: dict[int, torch.Tensor] = {}
        self.layouts: dict[int, tuple[Any, ...]] = {}
        """Of the leaf that each was made for."""
        self.is_used = False


def feed(batches: Iterable[Any], device: str | torch.device = "cuda", *, depth: int = 2) -> Iterator[Any]:
    """Each batch of `batches` with its tensors on `device`, in order; a tensor is valid until the next batch is asked for.

    batches: nests (tuple, list, mapping) of tensors on the CPU; a mapping comes as a dict; what is no tensor, and tensors that are on a device already, go through as they are; one in locked memory must
    not be written again before `depth` further batches have been asked for. Strides are kept, gradients' history is not. depth: sets of buffers, 2 or more. What `batches` raises
    is raised in its turn, after the batches before it. Compute with a batch on the stream that is current when it is asked for. On a CPU device batches go through untouched.
    Raises UsageError for a depth below 2, and for an object with tensors of its own (anything with a `to`).
    """
    if depth < 2:
        raise UsageError(f"depth is {depth}", fix="2 or more: one is computed with while the next is copied")
    where = torch.device(device)
    return iter(batches) if where.type == "cpu" else Feed(batches, where, depth)


class Feed:
    """The iterator behind `feed`. cuda: torch.cuda, or what stands in for it."""

    def __init__(self, batches: Iterable[Any], device: torch.device, depth: int = 2, cuda: Any = torch.cuda) -> None:
        self._batches = iter(batches)
        self._device = device
        self._cuda = cuda
        self._copying = cuda.Stream(device)
        self._slots = [_Slot(cuda) for _ in range(depth)]
        self._coming: deque[tuple[_Slot, Any]] = deque()
        self._failure: Exception | None = None
        """What the next batch ended in, for when its turn comes."""
        self._is_done = False
        self._home = cuda.current_stream(device)
        self._given: _Slot | None = None
        self._count = 0
        for _ in range(depth - 1):
            self._begin()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        current = self._cuda.current_stream(self._device)
        if self._given is not None:
            self._given.used.record(current)  # whatever was computed with the batch before has been launched by now
            self._given.is_used = True
            self._given = None
        self._begin()
        if not self._coming:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            raise StopIteration
        slot, batch = self._coming.popleft()
        current.wait_event(slot.copied)
        for target in slot.targets.values() if current != self._home else ():
            target.record_stream(current)  # its memory is not given to somebody else before this stream is done with it
        self._given = slot
        return batch

    def join(self) -> None:
        """The current stream waits for every copy that was begun."""
        for slot, _ in self._coming:
            self._cuda.current_stream(self._device).wait_event(slot.copied)

    def _begin(self) -> None:
        if self._is_done or self._failure is not None:
            return
        slot = self._slots[self._count % len(self._slots)]
        try:
            batch = next(self._batches)
            self._count += 1
            self._coming.append((slot, _begun(batch, slot, self._device, self._copying, self._cuda, self._home)))
        except StopIteration:
            self._is_done = True
        except Exception as error:  # noqa: BLE001 - whatever a loader raises is its user's, and after the batches before it
            self._failure = error

    def __del__(self) -> None:
        copying = getattr(self, "_copying", None)  # none where `batches` was nothing to iterate over
        if copying is not None:
            copying.synchronize()  # buffers must outlive the copies into them


def _begun(batch: Any, slot: _Slot, device: torch.device, copying: Any, cuda: Any, home: Any) -> Any:
    """The batch on the device, as it will be when `slot.copied` has happened."""
    # A tokenizer's batch is a mapping of its own class, which a nest would take for one thing that is no tensor.
    leaves, spec = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    opaque = next((leaf for leaf in leaves if hasattr(leaf, "to") and not isinstance(leaf, torch.Tensor)), None)
    if opaque is not None:
        raise UsageError(
            f"a batch holds a {type(opaque).__name__}, whose tensors would stay on the host", fix="give them as a tuple, list or mapping"
        )
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    # Buffers are written again and again: with a history they would keep every batch, and as inference's own they could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor) or leaf.device.type != "cpu":
                continue
            if leaf.layout is not torch.strided:
                leaves[number] = leaf.to(device)  # its parts have sizes of their own, batch by batch
                continue
            layout = (leaf.shape, leaf.dtype, leaf.stride())
            if slot.layouts.get(number) != layout:
                # Of the stream that was there when the feed began, so that what is made of it after us waits for what was computed with it; and what lay there before may
                # still be in use.
                with cuda.stream(home):
                    slot.targets[number] = torch.empty_like(leaf, device=device, requires_grad=False)
                slot.staged.pop(number, None)
                slot.layouts[number] = layout
                copying.wait_stream(home)
            pairs[number] = slot.targets[number], leaf if leaf.is_pinned() else _staged(leaf, number, slot)
        if slot.is_used:
            copying.wait_event(slot.used)
        with cuda.stream(copying):
            for target, source in pairs.values():
                target.copy_(source, non_blocking=True)
            slot.copied.record(copying)
    return pytree.tree_unflatten([pairs[number][0] if number in pairs else leaf for number, leaf in enumerate(leaves)], spec)


def _staged(leaf: torch.Tensor, number: int, slot: _Slot) -> torch.Tensor:
    """The tensor in locked memory of this slot, once the copy out of it before has ended."""
    staged = slot.staged.get(number)
    if staged is None:
        slot.staged[number] = staged = locked(leaf)
    slot.copied.synchronize()
    return staged.copy_(leaf)


def locked(like: torch.Tensor) -> torch.Tensor:
    """Locked host memory for a tensor, with its strides where it fills its memory. Raises torch's own error where the system refuses it."""
    return torch.empty_like(like, device="cpu", pin_memory=True, requires_grad=False)
