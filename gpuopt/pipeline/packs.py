"""Reference outputs <-> a small file in a bundle, so that whoever opens it can verify it again without the model's source.

At most SAMPLES elements of each output are kept, evenly spread. They are compared exactly as full outputs are: against the reference, with the
error of eager at the same dtype on the same elements as the yardstick.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs
from gpuopt.pipeline.verification import Named

FILE = "reference.safetensors"
INPUTS = "inputs.safetensors"
SAMPLES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Sampled outputs: `reference[seed][output]`, and eager's at the candidate's dtype, with the full shapes."""

    seeds: tuple[int, ...]
    kind: str
    """`fp64`, or `fp32: why`."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    reference: tuple[Named, ...]
    twins: tuple[Named, ...]

    @classmethod
    def sampled(cls, reference: list[Named], twins: list[Named], seeds: tuple[int, ...], kind: str) -> Pack:
        """Keep a sample of each."""
        tensors = [(n, v) for n, v in reference[0] if isinstance(v, torch.Tensor)]
        return cls(
            seeds=seeds,
            kind=kind,
            names=tuple(n for n, _ in tensors),
            shapes=tuple(tuple(v.shape) for _, v in tensors),
            reference=tuple([(n, sample(v)) for n, v in named if isinstance(v, torch.Tensor)] for named in reference),
            twins=tuple([(n, sample(v)) for n, v in named if isinstance(v, torch.Tensor)] for named in twins),
        )

    def of(self, outputs: Named) -> tuple[Named, str]:
        """The same elements of a candidate's outputs; and a reason when the shapes do not even agree."""
        tensors = [(n, v) for n, v in outputs if isinstance(v, torch.Tensor)]
        if len(tensors) != len(self.shapes):
            return [], f"{len(tensors)} outputs instead of {len(self.shapes)}"
        for (name, value), shape in zip(tensors, self.shapes, strict=True):
            if tuple(value.shape) != shape:
                return [], f"output {name} has the shape {tuple(value.shape)} instead of {shape}"
        return [(name, sample(value)) for name, value in tensors], ""


def sample(value: torch.Tensor) -> torch.Tensor:
    """At most SAMPLES elements, evenly spread over the flat tensor, on the CPU."""
    flat = value.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device, dtype=torch.float64).long()]
    return flat.cpu()


def write(pack: Pack, folder: Path) -> str:
    """Into `folder`; returns the file's name."""
    tensors: dict[str, torch.Tensor] = {}
    for role, sides in (("reference", pack.reference), ("twin", pack.twins)):
        for seed, named in zip(pack.seeds, sides, strict=True):
            for index, (_, value) in enumerate(named):
                tensors[f"{role}.{seed}.{index}"] = value.clone(
                    memory_format=torch.contiguous_format
                )  # a file's twin is its reference: safetensors refuses shared memory
    facts = {"seeds": pack.seeds, "kind": pack.kind, "names": pack.names, "shapes": pack.shapes}
    save_file(tensors, folder / FILE, metadata={"pack": json.dumps(facts)})
    return FILE


def write_inputs(inputs: Inputs, folder: Path) -> str:
    """The tensors a user gave, so that the bundle can be verified on them; returns the file's name."""
    names = [spec.name or str(i) for i, spec in enumerate(inputs.specs)]
    values = [*inputs.args, *inputs.kwargs.values()]
    save_file({n: v.cpu().clone(memory_format=torch.contiguous_format) for n, v in zip(names, values, strict=True)}, folder / INPUTS)
    return INPUTS


def read(folder: Path, name: str | None) -> Pack | None:
    """From a bundle whose hashes were checked; None where it has none (nothing was verified). Raises BadInput when it is malformed."""
    if name is None:
        return None
    try:
        with safe_open(folder / name, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["pack"])
            names, seeds = tuple(facts["names"]), tuple(facts["seeds"])

            def side(role: str) -> tuple[Named, ...]:
                return tuple([(n, file.get_tensor(f"{role}.{seed}.{i}")) for i, n in enumerate(names)] for seed in seeds)

            return Pack(
                seeds=seeds,
                kind=facts["kind"],
                names=names,
                shapes=tuple(tuple(s) for s in facts["shapes"]),
                reference=side("reference"),
                twins=side("twin"),
            )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / name} is not a reference file: {error}", fix="compile the bundle again") from error
