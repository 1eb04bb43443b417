"""GPU301: dropout or batch norm is in training mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from gpuopt.core.result import Finding
from gpuopt.doctor import modules, recast, words
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.price import priced
from gpuopt.doctor.rule import Rule

_RANDOM_OPS = ("dropout", "native_dropout", "bernoulli", "_fused_dropout", "rrelu_with_noise")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding for all modules that behave differently in training mode; a training flag that changes nothing is none."""
    root = evidence.module
    assert root is not None
    parts = modules.parts(root)
    # Loading switches to eval and says so: what runs here is right, what the user's own program runs may not be.
    is_switched = bool(evidence.flags.get("was_training")) and not any(part.training for part in parts.values())
    active = {name: what for name, part in parts.items() if (part.training or is_switched) and (what := _active(part))}
    if not active:
        return
    kinds = Counter(active.values())
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(4))
    random = sum(n for kind, n in kinds.items() if not _is_batch(kind))
    batch = len(active) - random
    harm = " and ".join(
        text
        for text, n in (("results are random", random), ("batch norms normalise by the batch and overwrite their statistics", batch))
        if n
    )
    whole = "the model" if root.training or is_switched else "part of the model"
    state = "came in training mode and was switched to eval to measure it" if is_switched else "is in training mode"
    first = next(iter(active))
    # Switched to eval, dropout is measured without its cost.
    rows = [r for r in evidence.records if not is_switched and recast.short_name(r) in _RANDOM_OPS and r.time_ns]
    taken = recast.total_ms(rows)
    finding = Finding(
        code="",
        severity="warning" if is_switched else "error",
        message=f"{whole} {state}: {counts} active ({words.listed(active)}); {harm}" + (f"; {words.ms(taken)} in dropout" if rows else ""),
        fix="model.eval() before the first call"
        if root.training or is_switched
        else "model.eval() after the last change: a later .train() or a new layer is in training mode",
        module=first,
        line=modules.line(root, first),
        count=len(active),
        time_ms=taken if rows else None,
    )
    yield priced(finding, taken, wall_ms=evidence.wall_ms)


def _active(part: Any) -> str:
    """What about it differs in training mode, as a class name; "" where nothing does."""
    kind = type(part).__name__
    if modules.is_a(part, "_BatchNorm"):
        return kind if part.track_running_stats and part.running_mean is not None else ""
    if modules.is_a(part, "_InstanceNorm"):
        return kind if part.track_running_stats else ""
    if modules.is_a(part, "_DropoutNd"):
        return kind if part.p > 0 else ""
    if kind in ("StochasticDepth", "DropPath"):
        return kind if (getattr(part, "p", None) or getattr(part, "drop_prob", None) or 0.0) > 0 else ""
    if modules.is_a(part, "RNNBase"):
        return f"dropout of {kind}" if part.dropout > 0 and part.num_layers > 1 else ""
    # F.dropout(x, self.dropout, self.training): a probability kept as a plain number.
    rates = [v for k, v in vars(part).items() if "drop" in k and isinstance(v, float) and 0 < v <= 1]
    return f"dropout of {kind}" if rates else ""


def _is_batch(kind: str) -> bool:
    return "Norm" in kind


RULE = Rule(
    code="GPU301",
    name="train-mode",
    what="Dropout or batch norm is active in inference: the model is in training mode.",
    why="Dropout makes every answer random, batch norm answers by the other samples of the batch and overwrites its statistics; both also launch kernels of their own, and nothing "
    "can be folded.",
    before="model = build()\ny = model(x)",
    after="model = build().eval()\ny = model(x)",
    safe=False,
    needs=frozenset({"module"}),
    find=find,
    source="torch.nn.Module.eval",
)
