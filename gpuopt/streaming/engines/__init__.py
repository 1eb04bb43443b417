"""What a device offers to streaming: memory, two queues of work and events between them. One file a device; this one says what each must do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from gpuopt.core.streaming import Unit

ENGINES = {"cuda": "gpuopt.streaming.engines.cuda:CudaEngine", "simulated": "gpuopt.streaming.engines.simulated:SimulatedEngine"}


class HostBuffer(Protocol):
    """Host memory of exactly the size asked for, on pages of its own."""

    @property
    def pinned(self) -> bool:
        """Locked, and known to the device, which copies from it without the host's help."""

    @property
    def bytes(self) -> torch.Tensor:
        """uint8 on the CPU, page-aligned. Valid until `close`, and beyond it for whoever still holds it, unlocked."""

    def unpin(self) -> None:
        """Unlock, and keep the bytes. No copy may be under way."""

    def close(self) -> None:
        """Unlock, then let go. No copy may be under way. Harmless twice."""


class Engine(Protocol):
    """A device. `compute` is the queue the caller's kernels go to (looked up at each call), `copy` one of the engine's own.

    No method waits on the host but `drain` and `wait_host`.
    """

    name: str
    device: torch.device
    simulated: bool
    listens: bool
    """To be told of forwards (`segment`) also where nothing is streamed: it keeps time."""
    pinned_bytes: int
    """Locked now."""

    def slot(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the device, at a multiple of 512 bytes. Raises OutOfMemory."""

    def home(self, num_bytes: int, pin: bool) -> HostBuffer:
        """Near the device. With `pin`, locked where the system allows it: look at `.pinned`. Raises OutOfMemory."""

    def lock(self, home: HostBuffer) -> bool:
        """Lock a home of this kind of engine; whether it is locked now. Harmless twice."""

    def event(self) -> Any:
        """Reusable. A wait for one that was never recorded waits for nothing."""

    def record_compute(self, event: Any) -> None:
        """Happens when what is queued for computing now is done."""

    def record_copy(self, event: Any) -> None:
        """Happens when the copies queued now are done."""

    def wait_compute(self, event: Any) -> None:
        """What is computed from here on begins after the event as it was last recorded."""

    def wait_copy(self, event: Any) -> None:
        """What is copied from here on begins after the event as it was last recorded."""

    def wait_host(self, event: Any) -> None:
        """The host waits for the event: for those who write host buffers that a copy reads. Any thread may call it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, home: str = "pinned") -> None:
        """Queue a copy; both uint8 of one size. Raises RuntimeError for a source that is not locked, which would be copied while the host waits.

        `home` says where the bytes came from (`pinned`, `pageable`, `disk`), which only a simulated clock looks at.
        """

    def drain(self) -> None:
        """The host waits for both queues."""

    def poison(self, slot: torch.Tensor) -> None:
        """Fill with NaN bytes as part of what is computed: whoever reads a slot that was freed shows it."""

    def segment(self, unit: str, slot: torch.Tensor | None = None) -> AbstractContextManager[Any]:
        """Around a unit's compute, which reads `slot`; `""` is what lies outside units. A simulated engine advances its clock here."""


class Source(Protocol):
    """Where the bytes of streamed units come from. One thread calls it, in the order of copies."""

    def bytes_for_copy(self, unit: str) -> torch.Tensor:
        """uint8, locked, all bytes of the unit's slab. May wait until they are read."""

    def release(self, unit: str) -> None:
        """The copy is queued, not done: who overwrites the buffer waits for an event recorded on the copy queue here (`record_copy`, `wait_host`)."""

    def read(self, unit: str) -> torch.Tensor:
        """The true bytes as an uint8 CPU tensor that nobody overwrites: for `state_dict()`, saving and `close()`."""

    def abort(self) -> None:
        """A forward broke off, nothing runs any more: what was handed out and not released is free."""

    def close(self) -> None:
        """Let go of memory, files and threads. No copy may be under way."""


Fill = Callable[[str, "torch.Tensor"], None]
"""Writes the true values of the tensor of this name into a CPU tensor of its dtype and shape."""


class Filler(Protocol):
    """The same, and a unit at once."""

    def fill(self, name: str, target: torch.Tensor) -> None:
        """As `Fill`."""

    def fill_unit(self, unit: Unit, target: torch.Tensor) -> None:
        """Write a unit's slab: its tensors, and zeros between them."""
