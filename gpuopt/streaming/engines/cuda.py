"""A CUDA device -> its own copy stream, slots, locked host memory and events, for streaming. Nothing here waits on the host but `drain` and `wait_host`."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gpuopt.core.errors import OutOfMemory, Unavailable
from gpuopt.core.streaming import ALIGNMENT
from gpuopt.streaming.hostpages import Pages, near

SLEEP_CYCLES = 200_000
"""At most, of a sleep in a race hunt: 0.1 ms, many times the gap between two kernels."""
_NOTHING: AbstractContextManager[Any] = nullcontext()


class CudaEngine:
    """One GPU. `compute` is torch's current stream, looked up at each call: a caller may change it between two."""

    name = "cuda"
    simulated = False
    listens = False

    def __init__(self, device: str | torch.device = "cuda", *, sleeps: int | None = None, cuda: Any = torch.cuda) -> None:
        """Raises Unavailable without a GPU.

        Parameters
        ----------
        sleeps: a seed. Both streams then sleep at random moments: a wait that is missing shows as wrong numbers.
        cuda: torch.cuda, or what stands in for it.
        """
        if not cuda.is_available():
            raise Unavailable("no CUDA device here", fix="--device simulated")
        asked = torch.device(device)
        self.device = torch.device("cuda", cuda.current_device() if asked.index is None else asked.index)
        self._cuda = cuda
        self._stream = cuda.Stream(self.device)
        self._sleeps = random.Random(sleeps) if sleeps is not None else None
        self.pinned_bytes = 0
        """Locked now."""
        self._locked: set[int] = set()
        """Addresses of homes that this engine locked: to ask the driver takes longer than all the rest of a copy's checks."""
        self.refusals: list[int] = []
        """CUDA's error number, each time it would not lock."""
        properties = cuda.get_device_properties(self.device)
        # Attributes are torch's, whose older versions have none: then pages lie where they lie.
        domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
        self._address = None if domain is None or bus is None or slot is None else f"{domain:04x}:{bus:02x}:{slot:02x}.0"

    def slot(self, num_bytes: int) -> torch.Tensor:
        """uint8 on the device, 512-aligned, an ordinary tensor even in inference mode. Raises OutOfMemory."""
        try:
            with torch.inference_mode(False):
                found = self._empty(num_bytes)
        except torch.OutOfMemoryError as error:
            free, total = self._cuda.mem_get_info(self.device)
            raise OutOfMemory(
                f"the device has no {num_bytes:,} bytes for weights: {free:,} of {total:,} are free",
                fix="lower --budget, or --slots, or try --granularity sub",
            ) from error
        assert found.data_ptr() % ALIGNMENT == 0, "torch's allocator hands out multiples of 512 bytes"
        return found

    def _empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def home(self, num_bytes: int, pin: bool) -> Pages:
        """In the memory next to the GPU. Where locking is refused, the pages are as good as any and `.pinned` is false. Raises OutOfMemory."""
        pages = Pages(num_bytes)
        if pin:
            self.lock(pages)
        else:
            with near(self._address) as node:
                if node is not None:  # whoever touches a page first says where it lies
                    pages.touch()
        return pages

    def lock(self, home: Any) -> bool:
        """`cudaHostRegister` of exactly these pages."""
        if home.pinned:
            return True
        address, size = home.bytes.data_ptr(), home.num_bytes

        def unlocked() -> None:
            self.pinned_bytes -= size
            self._locked.discard(address)

        # Locking touches the pages, from this thread; and it makes a context on the current device, which another one would keep for nothing.
        with near(self._address), self._cuda.device(self.device):
            code = home.pin(self._cuda.cudart(), self._discard_error, unlocked, self.drain)
        if code:
            self.refusals.append(code)
            return False
        self.pinned_bytes += size
        self._locked.add(address)
        return True

    def _discard_error(self) -> None:
        """CUDA keeps the error of a refused lock and hands it to the next launch that looks: this one looks. An error that is not cleared by that is a broken device."""
        try:
            self._launch()
        except RuntimeError:
            self._launch()

    def _launch(self) -> None:
        torch.ones(1, device=self.device).add_(1)  # a kernel: setting memory to zero asks for no error
        self._cuda.synchronize(self.device)

    def event(self) -> Any:
        """Without timing, which would cost a write of the clock at each record."""
        return self._cuda.Event(enable_timing=False)

    def record_compute(self, event: Any) -> None:
        """On the caller's stream."""
        event.record(self._cuda.current_stream(self.device))

    def record_copy(self, event: Any) -> None:
        """On the copy stream."""
        event.record(self._stream)

    def wait_compute(self, event: Any) -> None:
        """The caller's stream waits; the host does not."""
        stream = self._cuda.current_stream(self.device)
        self._doze(stream)
        stream.wait_event(event)

    def wait_copy(self, event: Any) -> None:
        """The copy stream waits; the host does not."""
        self._stream.wait_event(event)

    def wait_host(self, event: Any) -> None:
        """The host waits."""
        event.synchronize()

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, home: str = "pinned") -> None:
        """One copy by the copy engine. Raises RuntimeError for a source that is not locked: the driver would copy it piece by piece while the host waits, out of order with events."""
        if source.data_ptr() not in self._locked and not source.is_pinned():
            raise RuntimeError("a weight's source is not locked memory: its copy would block the host")
        self._doze(self._stream)
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def drain(self) -> None:
        """The host waits for all streams: a caller may have computed on several."""
        self._cuda.synchronize(self.device)

    def poison(self, slot: torch.Tensor) -> None:
        """NaN bytes, on the caller's stream."""
        slot.fill_(255)

    def segment(self, unit: str, slot: torch.Tensor | None = None) -> AbstractContextManager[Any]:
        """Nothing: the device has a clock of its own."""
        return _NOTHING

    def _doze(self, stream: Any) -> None:
        if self._sleeps is not None and self._sleeps.random() < 0.3:
            with self._cuda.stream(stream):
                self._cuda._sleep(self._sleeps.randrange(SLEEP_CYCLES))
