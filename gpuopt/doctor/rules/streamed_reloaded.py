"""GPU112: weights that travel in every call are read or made anew on the host before each copy."""

from __future__ import annotations

from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import streamed, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the time the host takes between two copies for something that is neither a copy, nor a wait, nor a launch."""
    found = streamed.streamed(evidence)
    if found is None or not streamed.is_told(found, "reload_ms"):
        return
    finding = Finding(
        code="",
        severity="info",
        message=f"the host takes {words.ms(found.reload_ms)} a call before it can copy weights: it reads, unpickles or touches them anew, {words.times(found.num_runs)} a call. "
        f"The GPU waits {words.ms(found.stall.total_ms)} in all: {found.stall}",
        fix="first of the steps: read the weights once into host memory and keep them there; gpuopt stream run does, and --disk DIR reads ahead where they do not fit",
        count=round(found.num_runs),
        bytes=found.bytes,
        time_ms=found.reload_ms,
    )
    yield priced(finding, found.reload_ms, low=0.7, high=1.05, wall_ms=evidence.wall_ms)


RULE = Rule(
    code="GPU112",
    name="streamed-weights-reloaded",
    what="Weights that travel to the GPU in every call are read, unpickled or paged in again before each copy.",
    why="A file gives a few gigabytes a second and a page fault less, where the link takes fifty: the GPU waits for the host, and a profile says only that copies are slow.",
    before="for layer in layers:\n    layer.load_state_dict(load_file(layer.path))\n    x = layer(x)",
    after="held = [load_file(layer.path) for layer in layers]  # once\nfor layer, weights in zip(layers, held):\n    layer.load_state_dict(weights)\n    x = layer(x)",
    safe=False,
    needs=frozenset({"trace", "device"}),
    find=find,
    source="the stretches of the trace in which no kernel runs, and the rate of pinned copies measured here (gpuopt device)",
)
