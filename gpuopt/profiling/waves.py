"""Trace + records -> what matrix products lose to their shapes: tiles that hang over the edge, and a last wave that leaves SMs idle. Pure.

A library cuts a product into tiles and gives each to an SM. Both losses follow from the tile's size (in the kernel's name) and from how many blocks fit on the device at once
(from the kernel's registers, shared memory and threads), so they are known without another measurement; the kernel may lose less where it splits work more finely than its
name says (stream-K, split-K), never more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gpuopt.core import kernels
from gpuopt.core.result import OpRecord, RooflinePoint
from gpuopt.core.spec import DTYPE_BYTES
from gpuopt.core.trace import Kernel, Trace
from gpuopt.profiling import formulas

WORTH_A_NOTE = 0.03
"""Share of a kernel's time under which a loss is not named."""
_TILE = re.compile(r"(?:tilesize|_)(\d{1,3})x(\d{1,3})(?=[x_])")
_LIMITS = {
    # capability: (shared memory of an SM, threads, blocks), CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
    "7.0": (96 << 10, 2048, 32),
    "7.5": (64 << 10, 1024, 16),
    "8.0": (164 << 10, 2048, 32),
    "8.6": (100 << 10, 1536, 16),
    "8.9": (100 << 10, 1536, 24),
    "9.0": (228 << 10, 2048, 32),
    "10.0": (228 << 10, 2048, 32),
    "12.0": (100 << 10, 1536, 24),
}
_REGISTERS = 65536
_RESERVED = 1 << 10
"""Shared memory the system takes of each block, from capability 8.0 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What one product loses to its shape."""

    kernel: str
    op: str
    module: str
    m: int
    n: int
    k: int
    batch: int
    tile: tuple[int, int]
    """Rows and columns of the product (not of the kernel's own, transposed view) that a block computes."""
    tile_share: float
    """Of its time spent beyond the matrix's edge, 0..1."""
    wave_share: float
    """Of its time in which SMs idle because the last wave is not full, 0..1."""
    waves: float | None
    """Tiles over what fits at once; None where that is not known."""
    time_ns: float
    loss_ns: float
    misaligned: tuple[str, ...] = ()
    """Row lengths that are no multiple of 16 bytes: the kernel reads them element by element. What that costs is not known from the shape."""

    @property
    def note(self) -> str:
        """For RooflinePoint.note; "" when nothing is worth naming."""
        said = []
        tile = f"{self.tile[0]}x{self.tile[1]}"
        if self.tile_share >= WORTH_A_NOTE:
            said.append(f"tile alignment: {self.m}x{self.n} in tiles of {tile} wastes {100 * self.tile_share:.0f}%")
        if self.wave_share >= WORTH_A_NOTE and self.waves is not None:
            said.append(
                f"wave quantisation: its tiles of {tile} fill {self.waves:.2f} waves, {100 * self.wave_share:.0f}% of the time SMs idle"
            )
        if self.misaligned:
            said.append(
                f"{' and '.join(self.misaligned)} {'is no multiple' if len(self.misaligned) == 1 else 'are no multiples'} of 16 bytes"
            )
        return "; ".join(said)


def losses(trace: Trace, records: Iterable[OpRecord], *, num_sms: int | None, capability: str | None) -> tuple[Loss, ...]:
    """Of the matrix products among the records whose kernel names its tile, largest loss first. Convolutions are left out: their output is not in the record.

    Parameters
    ----------
    num_sms, capability: of the device (`Device.num_sms`, `.capability`); None leaves the waves unknown.
    """
    launched: dict[str, list[Kernel]] = {}
    for kernel in trace.kernels:
        if kernel.step is not None:
            launched.setdefault(kernel.name, []).append(kernel)
    found = []
    for record in records:
        name = next((n for n in record.kernels if kernels.is_product(n)), None)
        shape = product_shape(record)
        if name is None or shape is None or not record.time_ns:
            continue
        loss = _loss(name, _launch_of(trace, launched.get(name, ()), record), shape, record, num_sms, capability)
        if loss is not None:
            found.append(loss)
    return tuple(sorted(found, key=lambda x: -x.loss_ns))


def total_ms(found: Iterable[Loss]) -> dict[str, float]:
    """`tile alignment`, `wave quantisation` -> milliseconds a call over all products."""
    rows = list(found)
    return {
        "tile alignment": math.fsum(x.time_ns * x.tile_share for x in rows) / 1e6,
        "wave quantisation": math.fsum(x.time_ns * (1.0 - x.tile_share) * x.wave_share for x in rows) / 1e6,
    }


def annotate(points: Iterable[RooflinePoint], records: Iterable[OpRecord], found: Iterable[Loss]) -> tuple[RooflinePoint, ...]:
    """The points with their losses in `note`. `records` are those the points were made of, in the same order."""
    notes = {(x.op, x.module, x.m, x.n, x.k, x.batch): x.note for x in found if x.note}
    changed = []
    for point, record in zip(points, records, strict=True):
        shape = product_shape(record)
        note = notes.get((record.op, record.module, *shape), "") if shape is not None else ""
        changed.append(replace(point, note="; ".join(n for n in (point.note, note) if n)) if note else point)
    return tuple(changed)


def product_shape(record: OpRecord) -> tuple[int, int, int, int] | None:
    """(m, n, k, batch) of a matrix product by its input shapes; None for anything else."""
    plain = formulas.family(record.op.replace(".", "::", 1))
    shapes = [tuple(int(n) for n in text.split("x")) for text in record.shapes.split(", ") if text]
    match plain:
        case "aten::mm" | "aten::bmm" | "aten::_int_mm" | "aten::_scaled_mm":
            first = 0
        case "aten::addmm" | "aten::baddbmm" | "aten::_addmm_activation":
            first = 1
        case _:
            return None
    if len(shapes) < first + 2 or len(shapes[first]) < 2 or len(shapes[first + 1]) < 2:
        return None
    *batch, m, k = shapes[first]
    return m, shapes[first + 1][-1], k, math.prod(batch)


def tile_of(name: str) -> tuple[int, int] | None:
    """`nvjet_hsh_128x256_64x4_…` -> (128, 256), in the kernel's own view; None where the name has none."""
    for match in _TILE.finditer(name):
        tile = int(match[1]), int(match[2])
        if all(n >= 8 and n % 8 == 0 for n in tile):
            return tile
    return None


def resident_blocks(kernel: Kernel, capability: str | None) -> int | None:
    """How many blocks of a kernel an SM holds at once; None where the launch or the device is not described."""
    limits = _LIMITS.get(capability or "")
    if limits is None or kernel.block is None or kernel.registers is None or kernel.shared_bytes is None:
        return None
    shared, threads, blocks = limits
    warps = math.ceil(math.prod(kernel.block) / 32)
    if not warps:
        return None
    # Registers are given to a warp in units of 256.
    a_warp = math.ceil(kernel.registers * 32 / 256) * 256
    by_registers = _REGISTERS // (a_warp * warps) if a_warp else blocks
    by_shared = shared // (kernel.shared_bytes + _RESERVED)
    return max(1, min(blocks, by_registers, by_shared, threads // (warps * 32)))


def _launch_of(trace: Trace, launched: Sequence[Kernel], record: OpRecord) -> Kernel | None:
    """A launch of this kernel for this record: in its module, else any, where all are launched alike."""
    own = [k for k in launched if any(o.module == record.module for o in trace.chain(k.op))] if record.module not in ("", "?") else []
    candidates = own or launched
    return candidates[0] if len({k.grid for k in candidates}) == 1 else None


def _loss(
    name: str, kernel: Kernel | None, shape: tuple[int, int, int, int], record: OpRecord, num_sms: int | None, capability: str | None
) -> Loss | None:
    m, n, k, batch = shape
    tile = tile_of(name)
    if tile is None or not (m and n and k and batch):
        return None
    blocks = math.prod(kernel.grid) if kernel is not None and kernel.grid is not None else None
    # cuBLAS computes the transposed product (it thinks in columns), so its first number usually runs along n; where the grid shows otherwise, the grid is right.
    views = [(tile[1], tile[0]), tile]
    view = next((v for v in views if blocks is not None and _tiles(m, n, v) * batch == blocks), views[0])
    tiles = _tiles(m, n, view) * batch
    covered = _tiles(m, n, view) * view[0] * view[1]
    tile_share = 1.0 - m * n / covered
    waves = None
    if kernel is not None and blocks and num_sms and (resident := resident_blocks(kernel, capability)) is not None:
        slots = num_sms * resident
        # Fewer blocks than tiles: they stay and take one tile after another. More: the products are split along k as well.
        waves = tiles / min(slots, blocks) if blocks < tiles else blocks / slots
    wave_share = 1.0 - waves / math.ceil(waves) if waves else 0.0
    elements = 16 // DTYPE_BYTES.get(record.dtype or "", 4)
    misaligned = tuple(f"{label} = {size}" for label, size in (("n", n), ("k", k)) if size % elements)
    time_ns = record.time_ns or 0.0
    return Loss(
        kernel=name,
        op=record.op,
        module=record.module,
        m=m,
        n=n,
        k=k,
        batch=batch,
        tile=view,
        tile_share=tile_share,
        wave_share=wave_share,
        waves=waves,
        time_ns=time_ns,
        loss_ns=time_ns * (1.0 - (1.0 - tile_share) * (1.0 - wave_share)),
        misaligned=misaligned,
    )


def _tiles(m: int, n: int, tile: tuple[int, int]) -> int:
    return math.ceil(m / tile[0]) * math.ceil(n / tile[1])
