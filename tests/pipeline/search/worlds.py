"""Made-up machines that answer the questions of a search: what every candidate would really take, what breaks, and how long trying it lasts.

Everything is drawn from the seed and a candidate's own key, so a world gives the same answer to the same question whoever asks and in whatever order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpuopt.core.result import Status
from gpuopt.core.search import Screened, Search, SearchSpec, Timed
from gpuopt.core.spec import BackendSpec, Candidate, ModelRef, Precision, Transforms
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.questions import Answer, Ask, Explain, Explained, Finalists, Finals, Mend, Mended, Proposal, Screen
from gpuopt.pipeline.search.strategy import search

BASE = Candidate(model=ModelRef(text="model.pt"), dims={"N": 8}, device="cuda:0")


@dataclass(kw_only=True)
class World:
    """`ms(candidate)` is the truth; measurements scatter about it."""

    facts: tune.Facts
    ms: Callable[[Candidate], float]
    base: Candidate = BASE
    seed: int = 0
    noise: float = 0.01
    """Of a screening, in log time; a finalist's is a tenth of it."""
    fails: Callable[[Candidate], str | None] = lambda candidate: None
    """Status of a candidate that breaks while it is screened."""
    why: Callable[[Candidate], str] = lambda candidate: ""
    """And what it says of it."""
    fails_late: Callable[[Candidate], str | None] = lambda candidate: None
    """Of one that passes screening and breaks in full verification."""
    peak: Callable[[Candidate], int | None] = lambda candidate: None
    proposals: Callable[[Candidate], Sequence[Proposal]] = lambda candidate: ()
    explain_s: float = 9.0
    asked: list[Ask] = field(default_factory=list)

    def draw(self, what: str, candidate: Candidate) -> random.Random:
        return random.Random(f"{self.seed} {what} {tune.key(candidate)}")

    def seconds(self, candidate: Candidate, *, stops: bool = False) -> float:
        """Building, verifying and a few blocks; less for what breaks half-way."""
        draw = self.draw("seconds", candidate)
        whole = tune.way_of(candidate).build_s * draw.lognormvariate(0, 0.25) + 2.0
        return whole * draw.uniform(0.3, 1.0) if stops else whole

    def measured_ms(self, candidate: Candidate, what: str, noise: float) -> float:
        return self.ms(candidate) * self.draw(what, candidate).lognormvariate(0, noise)

    def answer(self, question: Ask) -> Answer:
        self.asked.append(question)
        if isinstance(question, Screen):
            return self._screened(question)
        if isinstance(question, Explain):
            known = self.facts if question.candidate == self.base else None
            return Explained(facts=known, proposals=tuple(self.proposals(question.candidate)), seconds=self.explain_s)
        if isinstance(question, Mend):
            return Mended(note="made up: no set of modules helps", seconds=5.0)
        return self._finals(question)

    def _screened(self, question: Screen) -> Screened:
        candidate = question.candidate
        status = self.fails(candidate)
        if status is not None:
            return Screened(status=status, reason=self.why(candidate) or f"made up: {status}", seconds=self.seconds(candidate, stops=True))
        ms, peak = self.measured_ms(candidate, "screen", self.noise), self.peak(candidate)
        seconds = self.seconds(candidate)
        if question.limit_ms is not None and ms > question.limit_ms:
            return Screened(status=Status.SKIPPED.value, reason="not verified", ms=ms, peak_bytes=peak, seconds=seconds)
        return Screened(status=Status.OK.value, ms=ms, peak_bytes=peak, verified=True, seconds=seconds)

    def _finals(self, question: Finals) -> Finalists:
        base, found = question.candidates[0], {}
        sharp = self.noise / 10
        first = self.measured_ms(base, "final", sharp)
        for candidate in question.candidates:
            status = self.fails_late(candidate)
            if status is not None and candidate != base:
                found[tune.key(candidate)] = Timed(status=status, reason=f"made up: {status}")
                continue
            ms = self.measured_ms(candidate, "final", sharp)
            scale = candidate.dims.get("N", 1) / base.dims.get("N", 1)
            ratio = first / ms * scale
            low, high = ratio * math.exp(-3 * sharp), ratio * math.exp(3 * sharp)
            verdict = "faster" if low > 1 and ratio > 1.02 else "slower" if high < 1 and ratio < 1 / 1.02 else "inconclusive"
            found[tune.key(candidate)] = Timed(
                status="ok", ms=ms, ratio=ratio, low=low, high=high, verdict=verdict, peak_bytes=self.peak(candidate)
            )
        return Finalists(timed=found, seconds=8.0 + 4.0 * len(question.candidates))

    def found(self, spec: SearchSpec) -> Search:
        """Drive the strategy to its end."""
        self.asked = []
        steps, answer = search(self.base, spec), None
        while True:
            try:
                question = next(steps) if answer is None else steps.send(answer)
            except StopIteration as ended:
                result: Search = ended.value
                return result
            answer = self.answer(question)

    def candidate(self, key: str) -> Candidate:
        """The one asked about under this key."""
        for question in self.asked:
            for one in question.candidates if isinstance(question, Finals) else (question.candidate,):
                if tune.key(one) == key:
                    return one
        raise KeyError(key)

    def screens(self) -> list[Candidate]:
        return [q.candidate for q in self.asked if isinstance(q, Screen)]


def product(effects: Mapping[str, float], candidate: Candidate) -> float:
    """Of all effects whose words are all among the candidate's settings."""
    words = {
        str(candidate.backend),
        candidate.backend.name,
        (candidate.precision or Precision.FP32).value,
        *candidate.transforms.rewrites,
        *(name for name in ("channels_last", "fold_batch_norm") if getattr(candidate.transforms, name)),
    }
    words |= {f"not:{name}" for name in ("no_mask", "channels_last", "fuse_linears", "fuse_conv") if name not in words}
    return math.prod(factor for name, factor in effects.items() if set(name.split()) <= words)


# -- worlds like those that were seen on an H200 (docs/evidence); what is declared here is multiplied, and each candidate gets a share of its own ---------------


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A space of up to 24 candidates, as data."""

    name: str
    facts: tune.Facts
    device: Mapping[str, float]
    """Settings -> what they do to the device's time."""
    host: Mapping[str, float]
    """And to the host's."""
    backends: tuple[str, ...]
    precisions: tuple[str, ...]
    rewrites: tuple[str, ...] = ()
    own: float = 0.015
    """Scatter, in log time, that no setting explains: what a kernel's tile or an allocator's luck does."""
    together: float = 0.05
    """And what a backend makes of a change or of a precision, over what both do alone."""
    fails: Mapping[str, str] = field(default_factory=dict)
    """Settings -> how such a candidate ends."""

    def spec(self, **fields: Any) -> SearchSpec:
        return SearchSpec(backends=self.backends, precisions=self.precisions, rewrites=self.rewrites, **fields)

    def world(self, seed: int) -> World:
        def ms(candidate: Candidate) -> float:
            changes = [*candidate.transforms.rewrites, *(["channels_last"] if candidate.transforms.channels_last else [])]
            pairs = [f"{candidate.backend} {other}" for other in (*changes, f"width {tune.WIDTH[candidate.precision or self.facts.own]}")]
            own = random.Random(f"{seed} own {tune.key(candidate)}").lognormvariate(0, self.own)
            own *= math.prod(random.Random(f"{seed} {pair}").lognormvariate(0, self.together) for pair in pairs)
            own = own if candidate != BASE else 1.0
            busy = (self.facts.wall_ms - self.facts.idle_ms) * product(self.device, candidate)
            launched = self.facts.idle_ms * product(self.host, candidate)
            return (busy + launched) * own

        def fails(candidate: Candidate) -> str | None:
            return next((s for words, s in self.fails.items() if product({words: 2.0}, candidate) > 1.0), None)

        return World(facts=self.facts, ms=ms, fails=fails, seed=seed)


GRAPHS = {
    "inductor": 0.6,
    "inductor:reduce-overhead": 0.06,
    "inductor:max-autotune": 0.06,
    "cudagraphs": 0.03,
    "aoti": 0.3,
    "ort": 0.4,
    "trt": 0.05,
}
GPU = tune.Facts(wall_ms=100.0, on_gpu=True, has_products=True)


def facts(wall_ms: float, idle_ms: float, bounds: Mapping[str, float], **fields: Any) -> tune.Facts:
    floors = {name: value * 0.7 for name, value in bounds.items()}
    return tune.Facts(
        wall_ms=wall_ms, idle_ms=idle_ms, on_gpu=True, batch=8, bounds_ms=dict(bounds), floors_ms=floors, memory_bytes=139 * 2**30, **fields
    )


DECLARED: tuple[Declared, ...] = (
    Declared(  # compiled attention with a mask made inside the graph: the trap; without it, the best there is
        name="bert b64, from fp32",
        facts=facts(464.0, 2.0, {"fp32": 420.0, "tf32": 60.0, "bf16": 31.0, "fp16": 31.0}, rewrites={"no_mask": ""}),
        device={
            "fp16": 0.1,
            "bf16": 0.1,
            "inductor": 0.92,
            "inductor not:no_mask": 2.2,
            "inductor:max-autotune": 0.97,
            "ort": 2.4,
            "trt": 0.98,
        },
        host=GRAPHS,
        backends=("eager", "inductor", "inductor:reduce-overhead", "inductor:max-autotune", "ort", "trt"),
        precisions=("bf16", "fp16"),
        rewrites=("no_mask",),
    ),
    Declared(  # nothing but launches
        name="bert b1, from fp16",
        facts=facts(7.1, 6.0, {"fp16": 0.5, "bf16": 0.5}, own=Precision.FP16, rewrites={"no_mask": "", "fuse_linears": ""}),
        device={"inductor": 0.8, "inductor not:no_mask": 1.3, "fuse_linears": 0.9, "ort": 1.5, "trt": 0.8},
        host=GRAPHS,
        backends=("eager", "inductor", "inductor:reduce-overhead", "inductor:max-autotune", "cudagraphs", "ort", "aoti", "trt"),
        precisions=("fp16",),
        rewrites=("no_mask", "fuse_linears"),
    ),
    Declared(  # memory layout decides
        name="resnet b256, from fp32",
        facts=facts(110.5, 1.0, {"fp32": 80.0, "tf32": 20.0, "fp16": 11.0, "bf16": 11.0}, has_batch_norm=True, has_convolutions=True),
        device={
            "fp16": 0.35,
            "tf32": 0.48,
            "channels_last fp16": 0.6,
            "channels_last tf32": 0.85,
            "inductor channels_last": 0.6,
            "inductor:freezing": 0.94,
            "ort": 1.1,
            "trt": 0.6,
        },
        host=GRAPHS,
        backends=("eager", "inductor", "inductor:freezing", "inductor:max-autotune", "ort", "trt"),
        precisions=("tf32", "fp16"),
    ),
    Declared(
        name="resnet b1, from fp32",
        facts=facts(4.83, 4.2, {"fp32": 0.9, "tf32": 0.5, "fp16": 0.35}, has_batch_norm=True, has_convolutions=True),
        device={"fp16": 0.6, "tf32": 0.8, "channels_last": 0.9, "inductor": 0.75, "inductor:freezing-reduce-overhead": 0.85, "trt": 0.7},
        host={**GRAPHS, "fp16 eager": 1.4, "inductor:freezing-reduce-overhead": 0.05},
        backends=("eager", "inductor", "inductor:reduce-overhead", "inductor:freezing-reduce-overhead", "cudagraphs", "ort"),
        precisions=("fp32", "fp16"),
    ),
    Declared(  # quantised products win where they are accurate enough, and here they are not
        name="vit b128, fp8 fails the gate",
        facts=facts(40.0, 0.5, {"fp16": 26.0, "bf16": 26.0, "fp8": 16.0, "int8": 16.0}, own=Precision.FP16, rewrites={"fuse_linears": ""}),
        device={
            "fp8": 0.75,
            "bf16": 1.01,
            "inductor": 0.85,
            "inductor fp8": 0.9,
            "eager fp8": 1.6,
            "fuse_linears": 0.96,
            "trt": 0.8,
            "inductor:max-autotune": 0.96,
        },
        host=GRAPHS,
        backends=("eager", "inductor", "inductor:reduce-overhead", "inductor:max-autotune", "aoti", "trt"),
        precisions=("fp16", "fp8"),
        rewrites=("fuse_linears",),
        fails={"fp8": "accuracy_fail", "trt": "compile_error"},
    ),
    Declared(  # a compiler slower than eager everywhere, a runtime that is not
        name="small recommender b8",
        facts=facts(1.2, 0.9, {"fp32": 0.12, "tf32": 0.1, "fp16": 0.06}, rewrites={"fuse_linears": ""}),
        device={"fp16": 0.7, "inductor": 1.3, "ort": 0.8, "trt": 0.9, "fuse_linears": 0.95},
        host={"inductor": 1.1, "inductor:reduce-overhead": 0.4, "cudagraphs": 0.1, "ort": 0.2, "aoti": 0.5, "trt": 0.3, "fp16": 1.1},
        backends=("eager", "inductor", "inductor:reduce-overhead", "cudagraphs", "ort", "trt"),
        precisions=("fp32", "fp16"),
        rewrites=("fuse_linears",),
    ),
    Declared(  # nothing helps: eager is what its libraries can do
        name="one big product",
        facts=facts(50.0, 0.1, {"fp16": 46.0, "bf16": 46.0}, own=Precision.FP16, rewrites={"fuse_linears": ""}),
        device={"inductor": 1.02, "inductor:max-autotune": 0.99, "ort": 1.2, "trt": 1.05, "aoti": 1.03, "fuse_linears": 1.01},
        host=GRAPHS,
        backends=("eager", "inductor", "inductor:reduce-overhead", "inductor:max-autotune", "aoti", "trt"),
        precisions=("fp16", "bf16"),
        rewrites=("fuse_linears",),
        own=0.004,
        together=0.004,
    ),
    Declared(  # a diffusion UNet: half convolutions, half attention
        name="unet b2, from fp16",
        facts=facts(52.0, 14.0, {"fp16": 18.0, "bf16": 18.0}, own=Precision.FP16, has_convolutions=True, rewrites={"attention:cudnn": ""}),
        device={
            "inductor": 0.75,
            "channels_last": 0.85,
            "inductor channels_last": 0.92,
            "attention:cudnn": 0.95,
            "ort": 1.4,
            "trt": 0.7,
            "inductor:max-autotune": 0.95,
        },
        host=GRAPHS,
        backends=("eager", "inductor", "inductor:reduce-overhead", "inductor:max-autotune", "cudagraphs", "ort", "aoti", "trt"),
        precisions=("fp16",),
        rewrites=("attention:cudnn",),
    ),
)


@dataclass(frozen=True)
class Cost:
    """A search beside measuring everything. Times are shares of what all candidates, the trace and the finals would take together."""

    share: float
    """Of the whole search."""
    reached: float
    """The least time of any candidate that works / the chosen one's, by the truth."""
    until: float
    """When a candidate within 2% of the best had been screened; more than 1 where that never came."""
    screened: int
    of: int


def cost(declared: Declared, seed: int, share: float | None = None) -> Cost:
    """`share`: as time budget."""
    world = declared.world(seed)
    everything = tune.space(world.base, world.facts, backends=declared.backends, precisions=declared.precisions, rewrites=declared.rewrites)
    whole = sum(world.seconds(c, stops=world.fails(c) is not None) for c in everything) + world.explain_s + 8.0 + 4.0 * 4
    best = min(world.ms(c) for c in everything if world.fails(c) is None)
    found = world.found(declared.spec(time_budget_s=None if share is None else share * whole))
    assert found.choice is not None
    taken = {t.key: t.seconds or 0.0 for t in found.trials}
    spent, until = world.explain_s, 2.0
    for candidate in world.screens():
        spent += taken[tune.key(candidate)]
        if world.fails(candidate) is None and world.ms(candidate) * 0.98 <= best:
            until = min(until, spent / whole)
    chosen = world.candidate(found.choice.key)
    return Cost(
        share=found.seconds / whole, reached=best / world.ms(chosen), until=until, screened=len(world.screens()), of=len(everything)
    )


def random_world(seed: int) -> World:
    """Anything: effects without reason, a few kinds of failure, sometimes no ceilings at all."""
    draw = random.Random(seed)
    on_gpu = draw.random() < 0.7
    own = draw.choice([Precision.FP32, Precision.FP32, Precision.FP16])
    bounds = {p.value: 10.0 * tune.WIDTH[p] / tune.WIDTH[own] for p in tune.PRECISIONS} if draw.random() < 0.7 else {}
    names = ["no_mask", "fuse_linears", "fuse_conv"]
    known = tune.Facts(
        wall_ms=draw.uniform(10.0, 40.0),
        idle_ms=draw.uniform(0.0, 8.0),
        own=own,
        on_gpu=on_gpu,
        batch=8,
        bounds_ms=bounds,
        floors_ms={k: v * 0.1 for k, v in bounds.items()},
        has_batch_norm=draw.random() < 0.3,
        has_convolutions=draw.random() < 0.3,
        rewrites={n: "" for n in draw.sample(names, draw.randint(0, 3))},
        memory_bytes=draw.choice([None, 8 * 2**30]),
    )
    spread, broken, late = draw.uniform(0.02, 0.6), draw.choice([0.0, 0.2, 0.6, 1.0]), draw.choice([0.0, 0.0, 0.4, 1.0])
    per_sample, fixed = draw.uniform(0.2, 1.0), draw.uniform(0.0, 1.0)

    def ms(candidate: Candidate) -> float:
        mine = random.Random(f"{seed} {tune.key(replace(candidate, dims={}))}").lognormvariate(0, spread) if candidate != BASE else 1.0
        batch = candidate.dims.get("N", 8) / 8
        return max(known.wall_ms * mine * (fixed + per_sample * batch) / (fixed + per_sample), tune.bound_ms(candidate, known) or 0.0)

    def fails(candidate: Candidate) -> str | None:
        mine = random.Random(f"{seed} fails {tune.key(candidate)}")
        kinds = ["accuracy_fail", "nan", "crash", "oom_device", "compile_error", "timeout", "unsupported"]
        return mine.choice(kinds) if candidate != BASE and mine.random() < broken else None

    def fails_late(candidate: Candidate) -> str | None:
        mine = random.Random(f"{seed} late {tune.key(candidate)}")
        return mine.choice(["accuracy_fail", "nan", "crash"]) if candidate != BASE and mine.random() < late else None

    def proposals(candidate: Candidate) -> list[Proposal]:
        from gpuopt.core.spec import Change

        mine = random.Random(f"{seed} proposals {tune.key(candidate)}")
        some = [
            Change(channels_last=True),
            Change(rewrites=("gelu_epilogue:tanh",)),
            Change(dims={"N": 16}),
            Change(precision=Precision.BF16),
        ]
        return [
            Proposal(change=c, origin="GPO101", gain_low_ms=0.1, gain_high_ms=mine.uniform(0.1, 5.0))
            for c in mine.sample(some, mine.randint(0, 4))
        ]

    return World(
        facts=known, ms=ms, seed=seed, noise=draw.choice([0.0, 0.01, 0.05]), fails=fails, fails_late=fails_late, proposals=proposals,
        peak=lambda c: round(2**28 * c.dims.get("N", 8)),
    )  # fmt: skip


def plain(backend: str = "eager", precision: str | None = None, batch: int = 8, rewrites: Sequence[str] = ()) -> Candidate:
    """A candidate in short."""
    return replace(
        BASE,
        backend=BackendSpec.parse(backend),
        precision=Precision(precision) if precision else None,
        dims={"N": batch},
        transforms=Transforms(rewrites=tuple(rewrites)),
    )
