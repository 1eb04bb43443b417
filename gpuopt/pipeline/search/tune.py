"""The search space as data: which backends, precisions and changes `optimize` tries, what each is expected to do to a call, and what building it takes.

Every number here is a prior: where a search starts from, never what it reports. The first measurements of a search move all predictions
that share a setting with them (`predict.py`), and the journal keeps both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpuopt.core import codec
from gpuopt.core.spec import BackendSpec, Candidate, Precision, Transforms


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a module: a backend with a preset."""

    backend: str
    device: float
    """Expected device time against eager's, at the same precision: what fusion and better kernels leave of it."""
    host: float
    """Expected host time against eager's: launches and Python between them."""
    build_s: float
    """Expected seconds until it can be timed."""
    needs: frozenset[str] = frozenset()
    """Facts of the model or the machine without which it is not tried: `gpu`, `batch_norm`, `products`, `masked_attention`, `unfilled`."""


WAYS: tuple[Way, ...] = (
    Way(backend="eager", device=1.0, host=1.0, build_s=4.0),
    Way(backend="inductor", device=0.8, host=0.6, build_s=25.0),
    Way(backend="inductor:reduce-overhead", device=0.8, host=0.03, build_s=30.0, needs=frozenset({"gpu"})),
    Way(backend="inductor:graphed", device=0.8, host=0.02, build_s=30.0, needs=frozenset({"gpu"})),
    Way(backend="inductor:graphed,wide_rows=true", device=0.78, host=0.02, build_s=30.0, needs=frozenset({"gpu"})),
    Way(backend="inductor:graphed,flex=true", device=0.75, host=0.02, build_s=40.0, needs=frozenset({"gpu", "masked_attention"})),
    Way(backend="inductor:graphed,streams=2", device=0.78, host=0.02, build_s=35.0, needs=frozenset({"gpu", "unfilled"})),
    Way(backend="inductor:freezing", device=0.75, host=0.6, build_s=35.0, needs=frozenset({"batch_norm"})),
    Way(backend="inductor:freezing-reduce-overhead", device=0.75, host=0.03, build_s=40.0, needs=frozenset({"gpu", "batch_norm"})),
    Way(backend="inductor:freezing-graphed", device=0.75, host=0.02, build_s=40.0, needs=frozenset({"gpu", "batch_norm"})),
    Way(backend="inductor:max-autotune", device=0.75, host=0.03, build_s=150.0, needs=frozenset({"gpu", "products"})),
    Way(backend="inductor:max-autotune-no-cudagraphs", device=0.75, host=0.6, build_s=150.0, needs=frozenset({"gpu", "products"})),
    Way(backend="inductor:max-autotune-graphed", device=0.75, host=0.02, build_s=150.0, needs=frozenset({"gpu", "products"})),
    Way(backend="cudagraphs", device=1.0, host=0.02, build_s=6.0, needs=frozenset({"gpu"})),
    Way(backend="cudagraphs:streams=2", device=0.97, host=0.02, build_s=8.0, needs=frozenset({"gpu", "unfilled"})),
    Way(backend="aoti", device=0.8, host=0.2, build_s=45.0),
    Way(backend="ort", device=1.1, host=0.3, build_s=40.0),
    Way(backend="trt", device=0.7, host=0.05, build_s=120.0, needs=frozenset({"gpu"})),
)

PRECISIONS: tuple[Precision, ...] = (Precision.FP32, Precision.TF32, Precision.BF16, Precision.FP16)
"""Tried unasked: what they do to the results is held against plain eager in the same format."""
QUANTISED: tuple[Precision, ...] = (Precision.FP8, Precision.INT8)
"""Tried where they are named, or where a metric of the user's guards them: no eager twin says how much error is theirs by right, and a signal-to-noise ratio
cannot say what an answer is worth. Weight-only formats are for decoding, which is measured by `bench --generate`."""

MASKED = 0.05
"""Share of a call in attention with a mask from which FlexAttention is tried: a kernel twice as fast is then worth more than the noise."""
UNFILLED = 0.2
"""Share of the multiprocessors' time without a block from which parts of a batch are run side by side: two chains of kernels fill each other's last waves and the gaps between
dependent kernels, and all weights are read twice for it."""
KERNELS_NAMED = "attention"
"""The rewrite that names one attention kernel: no FlexAttention is left to choose then."""

OWN_OPS = frozenset({"fuse_conv", "gelu_epilogue"})
"""Rewrites into operators of gpuopt's own, which no foreign exporter knows."""
FOREIGN = frozenset({"ort", "trt", "torch-trt"})
NOT_QUANTISED = frozenset({"gelu_epilogue"})
"""Rewrites of linear layers into something that is quantised no more: the wider product would cost more than the fused pass saves."""
WIDTH = {
    Precision.FP64: 8,
    Precision.FP32: 4,
    Precision.TF32: 4,
    Precision.BF16: 2,
    Precision.FP16: 2,
    Precision.FP8: 1,
    Precision.INT8: 1,
    Precision.W8: 2,
    Precision.W4: 2,
}
"""Bytes of what is multiplied: weights alone kept in int8 or int4 (`w8`, `w4`) multiply in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the input before anything else is built: everything the space and the predictions depend on."""

    wall_ms: float
    """Of the input as it is, untraced."""
    idle_ms: float = 0.0
    """Of it, the device waits for the host."""
    own: Precision = Precision.FP32
    on_gpu: bool = False
    batch: int = 1
    bounds_ms: dict[str, float] = field(default_factory=dict)
    """Precision -> every op at its own roofline, added up; absent where a ceiling is not known."""
    floors_ms: dict[str, float] = field(default_factory=dict)
    """Precision -> all ops as one: no program of it is faster."""
    has_batch_norm: bool = False
    has_convolutions: bool = False
    has_products: bool = True
    masked_attention: float = 0.0
    """Share of the call in attention, where some of it reads a mask or a bias."""
    unfilled: float = 0.0
    """Share of the multiprocessors' time without a block to run, by the grids in the trace."""
    rewrites: dict[str, str] = field(default_factory=dict)
    """Rewrite -> why it does not apply; "" where it does."""
    cannot: dict[str, str] = field(default_factory=dict)
    """`backend` or `backend@precision` -> why it cannot run here."""
    peak_bytes: int | None = None
    memory_bytes: int | None = None
    """Of the device."""

    @property
    def traits(self) -> frozenset[str]:
        """In the words of `Way.needs`."""
        held = {
            "gpu": self.on_gpu,
            "batch_norm": self.has_batch_norm,
            "products": self.has_products,
            "masked_attention": self.masked_attention >= MASKED,
            "unfilled": self.unfilled >= UNFILLED and self.batch % 2 == 0,
        }
        return frozenset(name for name, holds in held.items() if holds)


def key(candidate: Candidate) -> str:
    """Ten hexadecimal digits of its settings: the same on every machine and in every run."""
    return codec.digest(replace(candidate, device="", dims=dict(sorted(candidate.dims.items())), model=replace(candidate.model, trust=())))[
        :10
    ]


def way_of(candidate: Candidate) -> Way:
    """The row of the table; for a backend that has none, plain expectations."""
    name, spec = str(candidate.backend), candidate.backend
    same = [way for way in WAYS if str(BackendSpec.parse(way.backend)) == name]
    exact = [way for way in same if BackendSpec.parse(way.backend).options == spec.options]
    return next(iter(exact or same), Way(backend=name, device=1.0, host=0.5, build_s=30.0))


def space(base: Candidate, facts: Facts, *, backends: Sequence[str] = (), precisions: Sequence[str] = (), rewrites: Sequence[str] | None = None) -> list[Candidate]:  # fmt: skip
    """Every candidate worth a prediction, the input first: ways x precisions x bundles of changes. What cannot run here is left out with its reason in `facts.cannot`."""
    ways = [w.backend for w in WAYS if w.needs <= facts.traits] if not backends else list(backends)
    unasked = PRECISIONS + (QUANTISED if base.evaluation.metric is not None else ())
    wanted = [Precision(p) for p in precisions] or [p for p in unasked if WIDTH[p] <= WIDTH[facts.own]]
    changes = list(_changes(base, facts, rewrites))
    found = [base]
    for way, precision, change in itertools.product(ways, wanted, changes):
        spec = BackendSpec.parse(way)
        if facts.cannot.get(spec.name) or facts.cannot.get(f"{spec.name}@{precision.value}"):
            continue
        if precision is Precision.TF32 and (facts.own is not Precision.FP32 or not facts.on_gpu):
            continue
        apart = (OWN_OPS if spec.name in FOREIGN else frozenset()) | (NOT_QUANTISED if precision in QUANTISED else frozenset())
        if spec.options.get("flex"):
            apart |= {KERNELS_NAMED}
        if apart & {text.partition(":")[0] for text in change.rewrites}:
            continue
        made = replace(
            base,
            backend=replace(spec, options={**base.backend.options, **spec.options} if spec.name == base.backend.name else spec.options),
            # Left as it was loaded, without a cast; `trying` holds it to the name all the same, where one was asked for.
            precision=None if precision is facts.own and base.precision is None else precision,
            transforms=change,
        )
        if made not in found:
            found.append(made)
    return found


def _changes(base: Candidate, facts: Facts, asked: Sequence[str] | None) -> Iterable[Transforms]:
    """Bundles of changes, from none to all that apply: each adds one to the bundle before it, so that a bundle differs from its neighbour in one thing."""
    plain = base.transforms
    yield plain
    bundle = plain
    if facts.has_convolutions and (facts.on_gpu or facts.has_batch_norm):
        bundle = replace(bundle, channels_last=facts.on_gpu or bundle.channels_last, fold_batch_norm=facts.has_batch_norm)
        if bundle != plain:
            yield bundle
    names = [n for n, why in facts.rewrites.items() if not why] if asked is None else list(asked)
    chosen = {text.partition(":")[0] for text in bundle.rewrites}
    several = {name for name in (text.partition(":")[0] for text in names) if sum(t.partition(":")[0] == name for t in names) > 1}
    for text in names:
        name = text.partition(":")[0]
        if name not in chosen and name not in several:
            bundle = replace(bundle, rewrites=(*bundle.rewrites, text))
            yield bundle
    for text in names:  # settings of one rewrite are alternatives: each on top of all the others
        if text.partition(":")[0] in several - chosen:
            yield replace(bundle, rewrites=(*bundle.rewrites, text))


_PARTS = ("freezing", "max-autotune")
"""Of presets, where several share them."""


def features(candidate: Candidate, own: Precision) -> dict[str, float]:
    """What this candidate shares with others, and by how much (standard deviation, in log time) such a thing may be off from its prior. `own`: the precision
    of a candidate that names none."""
    backend, library = str(candidate.backend), candidate.backend.name
    precision = candidate.precision or own
    # A GPU's tensor cores multiply bf16 and fp16 at one rate, fp8 and int8 at another: there a precision says little beyond its width. On a CPU one of
    # two is often emulated.
    width = f"width {WIDTH[precision]}" if candidate.device.startswith("cuda") and precision is not Precision.TF32 else None
    found = {
        "all": 0.5,
        f"library {library}": 0.25,
        f"backend {backend}": 0.08,
        f"precision {precision.value}": 0.06 if width else 0.25,
        f"{library} at {precision.value}": 0.03 if width else 0.12,
    }
    for part in _PARTS:
        if part in (candidate.backend.preset or ""):
            found[f"{library} {part}"] = 0.12
    if way_of(candidate).host < 0.1:
        found["replays launches"] = 0.12
    if width:
        found[width] = 0.25
        found[f"{library} at {width}"] = 0.12
    if candidate.backend.options:
        found[f"options of {backend}: {sorted(candidate.backend.options.items())}"] = 0.5
    for name in ("channels_last", "fold_batch_norm"):
        if getattr(candidate.transforms, name):
            found[name] = 0.15
            found[f"{name} in {library}"] = 0.12
    for name in candidate.transforms.rewrites:
        found[f"rewrite {name}"] = 0.08
        # What a compiler makes of a changed module is its own affair: a mask left in the graph sends BERT's attention through fp32 in Inductor, and not in eager.
        found[f"rewrite {name} in {library}"] = 0.05 if library == "eager" else 0.15
    if "N" in candidate.dims:
        found[f"batch {candidate.dims['N']}"] = 0.2
    return found


def causes(candidate: Candidate, own: Precision) -> tuple[str, ...]:
    """Settings that a failure may be put down to."""
    precision, library = (candidate.precision or own).value, candidate.backend.name
    options = f" {sorted(candidate.backend.options.items())}" if candidate.backend.options else ""
    return (
        f"backend {candidate.backend}{options}",
        f"{library}{options} at {precision}",
        f"precision {precision}",
        *(f"{name} in {library}" for name in ("channels_last", "fold_batch_norm") if getattr(candidate.transforms, name)),
        *(f"rewrite {name}" for name in candidate.transforms.rewrites),
    )


def prior_ms(candidate: Candidate, facts: Facts) -> float:
    """Expected time of a call before anything but the input was measured: the device's share shrinks with the precision's roofline and the backend's
    fusion, the host's with the backend's launches."""
    way = way_of(candidate)
    precision = (candidate.precision or facts.own).value
    own = facts.bounds_ms.get(facts.own.value)
    here = facts.bounds_ms.get(precision)
    scale = here / own if own and here else WIDTH[Precision(precision)] / WIDTH[facts.own]
    batch = candidate.dims.get("N", facts.batch) / max(1, facts.batch)
    busy = max(facts.wall_ms - facts.idle_ms, 0.02 * facts.wall_ms)
    rewritten = 0.97 ** len(candidate.transforms.rewrites)
    if candidate.transforms.channels_last or candidate.transforms.fold_batch_norm:
        rewritten *= 0.8
    # What a roofline leaves no room for, no compiler takes away: fusion and layouts act on what lies above the floor.
    floor = min(facts.floors_ms.get(precision, 0.0), busy * scale)
    device = (floor + (busy * scale - floor) * way.device * rewritten) * batch
    # While the device is busy the host works ahead: what shows of it is what the device does not cover.
    host = max(facts.idle_ms, 0.02 * facts.wall_ms) * way.host
    return max(device + host, bound_ms(candidate, facts) or 0.0)


def bound_ms(candidate: Candidate, facts: Facts) -> float | None:
    """No program of this precision is faster at this batch: compute grows with it, and the floor is kept to that."""
    floor = facts.floors_ms.get((candidate.precision or facts.own).value)
    larger = candidate.dims.get("N", facts.batch) / max(1, facts.batch)
    return floor * larger if floor is not None and larger >= 1 else None


def batch_of(candidate: Candidate) -> int:
    """Samples of a call; 1 where no size is called so."""
    return candidate.dims.get("N", 1)


def share(candidate: Candidate, goal: str) -> int:
    """Samples among which the time of a call is divided: 1 where its latency is what counts."""
    return batch_of(candidate) if goal == "throughput" else 1


def words(candidate: Candidate, base: Candidate | None = None) -> str:
    """Its settings in a line; dimensions where they differ from `base`."""
    parts = [*([candidate.precision.value] if candidate.precision else []), str(candidate.backend)]
    parts += [f"{k}={v}" for k, v in candidate.backend.options.items()]
    parts += [n for n in ("channels_last", "fold_batch_norm") if getattr(candidate.transforms, n)]
    parts += list(candidate.transforms.rewrites)
    parts += [f"keep_fp32:{name}" for name in candidate.transforms.keep_fp32]
    dims: Mapping[str, int] = candidate.dims
    parts += [f"{k}={v}" for k, v in dims.items() if base is None or base.dims.get(k) != v]
    extra = candidate.inputs.tensors[len(base.inputs.tensors) :] if base is not None else ()
    parts += [f"with {tensor.name}" for tensor in extra]
    return " ".join(parts)
