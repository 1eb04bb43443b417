"""Backend and preset -> how tokens are generated. A table of settings; light, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpuopt.core.errors import UsageError
from gpuopt.core.spec import BackendSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a prefill and a decode step are run. All but `shipped` have a cache of fixed length and keep every tensor of the loop on the device."""

    words: str
    """Without what `told` adds."""
    shipped: bool = False
    """The model's own generate()."""
    compiles: bool = False
    records: bool = False
    """Each on a GPU as one CUDA graph, recorded by hand; a decode step is then one launch."""
    mode: str | None = None
    """torch.compile's, for both."""
    options: dict[str, Any] = field(default_factory=dict)
    """Inductor's settings for the decode step."""
    own_rows: bool = False
    """A decode step's products of one row, and its attention, run in gpuopt's own kernels (programs/one_row.py, programs/ops/attend_one.py)."""

    def told(self, device: str) -> str:
        """How it runs there: on a CPU nothing is recorded."""
        return self.words + (", in CUDA graphs" if self.records and self.compiles and device.startswith("cuda") else "")


TUNED = {"coordinate_descent_tuning": True}
"""Products of one row become reductions in Triton, tuned one by one: cuBLAS's own read weights at 60% of the bandwidth (torch/_inductor/decomposition.py, mm).

gpt-fast's other settings (unique kernel names, the cache of graphs, epilogues fused) are torch's own by now, and so are not repeated here.
"""

DEPENDENT = {**TUNED, "triton.enable_pdl": True}
"""And a kernel begins while the one before it ends (programmatic dependent launch; Inductor leaves it out where the GPU has none)."""

WAYS: dict[tuple[str, str | None], Way] = {
    ("eager", None): Way(words="generate() as shipped", shipped=True),
    ("eager", "static"): Way(words="static cache, eager steps"),
    ("cudagraphs", None): Way(words="static cache, eager steps recorded as CUDA graphs", records=True),
    ("inductor", None): Way(words="static cache, compiled steps", compiles=True, records=True),
    ("inductor", "reduce-overhead"): Way(
        words="static cache, torch.compile(mode='reduce-overhead')", compiles=True, mode="reduce-overhead"
    ),
    ("inductor", "tuned"): Way(
        words="static cache, compiled steps with tuned matrix-vector products", compiles=True, records=True, options=TUNED
    ),
    ("inductor", "gemv"): Way(
        words="static cache, compiled steps with gpuopt's kernels for one row",
        compiles=True,
        records=True,
        options=DEPENDENT,
        own_rows=True,
    ),
    ("inductor", "max-autotune"): Way(
        words="static cache, compiled steps with every product autotuned",
        compiles=True,
        records=True,
        options={**TUNED, "max_autotune": True},
    ),
}
"""(backend, preset) -> way."""

UNASKED = {"cuda": ("eager", "cudagraphs", "inductor", "inductor:tuned"), "cpu": ("eager", "eager:static", "inductor")}
"""What is compared where no --backend is given, by the kind of device. The model as it comes is first: the others are held against it."""


UNASKED_ALONE = {"cuda": ("inductor:gemv",)}
"""And where there is one sequence."""


def unasked(kind: str, batch: int | None, dtype: str | None) -> tuple[str, ...]:
    """What is compared on this kind of device for this many sequences (None: as many as the inputs have) in this dtype (None: the model's own) where nobody said."""
    alone = UNASKED_ALONE.get(kind, ()) if batch == 1 and dtype in (None, "float16", "bfloat16") else ()
    return (*UNASKED.get(kind, UNASKED["cpu"]), *alone)


def resolve(backend: BackendSpec) -> Way:
    """Raises UsageError for a backend, preset or option that does not generate."""
    preset = None if backend.preset == "default" else backend.preset
    way = WAYS.get((backend.name, preset))
    if way is None:
        known = ", ".join(f"{name}:{preset}" if preset else name for name, preset in WAYS)
        raise UsageError(f"{backend} does not generate", fix=f"--backend one of: {known}")
    if backend.options:
        raise UsageError(f"{backend} takes no options to generate: {', '.join(backend.options)}", fix="leave them away")
    return way
