"""A candidate's batches and what the model makes of them -> the verdict on outputs at the candidate's precision. One gate for verification and for the search of
what has to stay in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gpuopt.accuracy import gate
from gpuopt.core.live import Inputs
from gpuopt.core.result import Stage
from gpuopt.core.spec import Tolerance
from gpuopt.pipeline import stress
from gpuopt.pipeline.verification import Named, Reference, Twin


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a candidate is called with, in this order."""

    drawn: Sequence[Inputs]
    """Random data of each seed, or the user's own tensors."""
    seeds: tuple[int, ...]
    real: Sequence[Inputs] = ()
    """From --eval-data and --calib."""
    stressed: Sequence[tuple[str, Inputs]] = ()
    """The first ones at other scales; these alone may be refused by the model."""

    @property
    def every(self) -> list[Inputs]:
        return [*self.drawn, *self.real, *(inputs for _, inputs in self.stressed)]

    @property
    def required(self) -> int:
        """How many of them the model itself has to run on."""
        return len(self.drawn) + len(self.real)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The limits, with what they are held against."""

    material: Material
    found: Reference
    twin: Twin
    limits: Tolerance
    is_cast: bool = False
    """The candidate computes in another precision than the model came in."""

    def judge(
        self, outputs: Sequence[Named], raised: Sequence[str], *, spread: Mapping[str, float] | None = None
    ) -> tuple[list[Stage], tuple[str, ...]]:
        """Outputs of every batch of the material -> the stages `precision`, `real data` and `scales`, as far as there is anything to judge; and notes."""
        drawn, required = len(self.material.drawn), self.material.required
        ours, theirs = self.found.outputs, self.twin.outputs
        stages = [
            gate.judge_stage("precision", ours[:drawn], outputs[:drawn], theirs[:drawn], self.limits, self.material.seeds, spread=spread)
        ]
        if required > drawn:
            part = slice(drawn, required)
            stage = gate.judge_stage("real data", ours[part], outputs[part], theirs[part], self.limits, spread=spread)
            stages.append(replace(stage, seeds=()))
        if self.is_cast:
            stages = [gate.without_lost(stage) for stage in stages]
        refused = [one or other for one, other in zip(self.found.refused, self.twin.refused, strict=True)]
        judged = stress.judge(
            [name for name, _ in self.material.stressed],
            reference=ours[required:],
            twins=theirs[required:],
            refused=refused[required:],
            candidate=outputs[required:],
            raised=raised[required:],
            limits=self.limits,
        )
        return [*stages, *judged.stages], judged.notes
