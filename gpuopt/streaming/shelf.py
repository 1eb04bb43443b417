"""Units -> their bytes in host memory, each once: one plan after the other is bound to the same slabs, and nothing is written, summed or locked twice."""

from __future__ import annotations

from collections.abc import Collection

from gpuopt.core.streaming import Unit
from gpuopt.streaming.engines import HostBuffer


class Shelf:
    """Slabs that stay while bindings come and go. Between two bindings the module's parameters are views of them; after `close` too, of memory that is not locked any more."""

    def __init__(self, *, keep_residents: bool = True) -> None:
        """keep_residents: what stays on the device lies here as well, so that giving it back copies nothing. False where the host has no room for that."""
        self.keep_residents = keep_residents
        self.checksums: dict[str, int] = {}
        """Of what lies here, as `slabs.checksum`."""
        self._homes: dict[str, HostBuffer] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def find(self, unit: Unit) -> HostBuffer | None:
        """A unit's slab; None: it is not here."""
        home = self._homes.get(unit.name)
        assert home is None or home.bytes.numel() == unit.num_bytes, "a shelf is of one anatomy"
        return home

    def put(self, unit: Unit, home: HostBuffer, checksum: int) -> None:
        """From now on it lies here."""
        self._homes[unit.name] = home
        self.checksums[unit.name] = checksum

    def drop(self, name: str) -> None:
        """Let go of one. No copy from it may be under way."""
        home = self._homes.pop(name, None)
        self.checksums.pop(name, None)
        if home is not None:
            home.close()

    def unlock_others(self, names: Collection[str]) -> None:
        """Only these may stay locked: a plan that leaves some pageable is at the limit of what may be locked. No copy may be under way."""
        for name, home in self._homes.items():
            if name not in names:
                home.unpin()

    def close(self) -> None:
        """Unlock and let go of all. Harmless twice."""
        for name in list(self._homes):
            self.drop(name)
