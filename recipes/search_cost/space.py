"""A model of this proof -> its input as it stands; the input and its facts -> the declared space, of at most 24 candidates. Pure.

A declared space is a `SearchSpec`, as a user would narrow a search: backends x precisions x rewrites. `tune.space` makes its candidates, here and inside the search, so both
speak of the same ones. The rule that cuts it down looks at nothing that was measured:

1. Ways, precisions and rewrites stand in a fixed order, the most different first; what the facts of the input rule out is left out. Presets that autotune are left out too:
   building one takes longer than several of the others together, and a space full of them would make any search that avoids them look cheap.
2. A space is made of the first few of each. Of all spaces that fit, the rule takes one with at least five ways, three precisions (the input's among them) and two bundles of changes, as far as there
   are so many (ways before precisions before changes, where not all fit); of those the largest; of equals the one with more ways, then more precisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuopt.core.errors import UsageError
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BackendSpec, Candidate, ModelRef, Precision
from gpuopt.pipeline.search import tune

MOST = 24
"""Candidates of a space, the input among them."""
WAYS: tuple[str, ...] = (
    "eager",
    "inductor:graphed",
    "inductor",
    "cudagraphs",
    "aoti",
    "ort",
    "trt",
    "inductor:freezing-graphed",
    "inductor:reduce-overhead",
    "inductor:freezing",
    "inductor:graphed,wide_rows=true",
    "inductor:freezing-reduce-overhead",
)
"""Ways of `tune.WAYS`: one of each library and of each manner to launch first."""
TINY_WAYS: tuple[str, ...] = ("eager", "ort")
"""Of a rehearsal: those that build within seconds."""
PRECISIONS: tuple[Precision, ...] = (Precision.FP16, Precision.TF32, Precision.BF16, Precision.FP32)
"""One of each width first: halves of two kinds take nearly the same time."""
ENOUGH = (5, 3, 2)
"""Ways, precisions and bundles of changes without which a space is not diverse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model at one size."""

    model: str
    dims: dict[str, int]
    tiny: str
    """A model of the same classes for a rehearsal."""
    tiny_dims: dict[str, int] = field(default_factory=dict)

    def base(self, device: str, *, tiny: bool = False) -> Candidate:
        """As it was loaded, in eager."""
        text, dims = (self.tiny, self.tiny_dims) if tiny else (self.model, self.dims)
        return Candidate(model=ModelRef(text=text), dims=dict(dims), device=device)


TEXT = {"N": 2, "S": 16}
IMAGES = {"N": 2}
CASES: dict[str, Case] = {
    "bert_large_b1": Case(model="gpuopt.models:bert_large", dims={"N": 1, "S": 128}, tiny="gpuopt.models:bert_large_tiny", tiny_dims=TEXT),
    "resnet101": Case(model="gpuopt.models:resnet101", dims={"N": 64}, tiny="gpuopt.models:resnet101_tiny", tiny_dims=IMAGES),
    "smollm2_360m": Case(
        model="recipes.zoo.models:smollm2_360m", dims={"N": 1, "S": 128}, tiny="recipes.zoo.tiny:smollm2_360m", tiny_dims=TEXT
    ),
    "vit_base": Case(model="recipes.zoo.models:vit_base", dims={"N": 32}, tiny="recipes.zoo.tiny:vit_base", tiny_dims=IMAGES),
    "mobilenet_v2": Case(model="recipes.zoo.models:mobilenet_v2", dims={"N": 1}, tiny="recipes.zoo.tiny:mobilenet_v2", tiny_dims=IMAGES),
    "whisper_small": Case(model="recipes.zoo.models:whisper_small", dims={"N": 4}, tiny="recipes.zoo.tiny:whisper_small", tiny_dims=IMAGES),
    "bert_large_b64": Case(
        model="gpuopt.models:bert_large", dims={"N": 64, "S": 512}, tiny="gpuopt.models:bert_large_tiny", tiny_dims=TEXT
    ),
}
"""In the order they are measured: six different models first, the dearest case last."""


def chosen(only: str) -> list[str]:
    """Names in the order they are measured. Raises UsageError for one that there is none of."""
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    for word in wanted:
        if word not in CASES:
            raise UsageError(f"no model is called {word!r}", fix="one of " + ", ".join(CASES))
    return [name for name in CASES if not wanted or name in wanted]


def candidates(base: Candidate, facts: tune.Facts, spec: SearchSpec) -> list[Candidate]:
    """What a search with this spec takes into its books, the input first."""
    return tune.space(base, facts, backends=spec.backends, precisions=spec.precisions, rewrites=spec.rewrites)


def declared(base: Candidate, facts: tune.Facts, *, most: int = MOST, ways: Sequence[str] = WAYS) -> SearchSpec:
    """The space of at most `most` candidates. Raises UsageError where not even one besides the input fits."""
    needs = {way.backend: way.needs for way in tune.WAYS}
    here = [way for way in ways if needs[way] <= facts.traits and not facts.cannot.get(BackendSpec.parse(way).name)]
    formats = [
        p.value
        for p in PRECISIONS
        if tune.WIDTH[p] <= tune.WIDTH[facts.own]
        and (p is not Precision.TF32 or (facts.on_gpu and facts.own is Precision.FP32))
        and any(not facts.cannot.get(f"{BackendSpec.parse(way).name}@{p.value}") for way in here)
    ]
    changes = [text for text, why in facts.rewrites.items() if not why]
    best: tuple[Any, SearchSpec] | None = None
    for b, p, r in itertools.product(range(1, len(here) + 1), range(1, len(formats) + 1), range(len(changes) + 1)):
        spec = SearchSpec(backends=tuple(here[:b]), precisions=tuple(formats[:p]), rewrites=tuple(changes[:r]), finalists=2)
        found = candidates(base, facts, spec)
        if not 2 <= len(found) <= most:
            continue
        kinds = (
            len({str(c.backend) + str(c.backend.options) for c in found}),
            len({c.precision or facts.own for c in found}),
            len({c.transforms for c in found}),
        )
        met = tuple(map(min, kinds, ENOUGH))
        score = (sum(met), met, len(found), kinds[0], kinds[1], -(b + p + r))
        if best is None or score > best[0]:
            best = (score, spec)
    if best is None:
        raise UsageError(
            f"nothing besides the input can run here, or not in a space of {most} candidates",
            fix="a larger --most; gpuopt backends shows what can run",
        )
    return best[1]
