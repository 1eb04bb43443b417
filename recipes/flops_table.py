"""recipes/architectures -> docs/flops.md: each architecture's FLOPs by hand, by `gpuopt`, as published, and by PyTorch's own counter. `--check` says whether it is up to date."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers
from architectures import Architecture, table
from torch.utils.flop_counter import FlopCounterMode

from gpuopt.core.live import Inputs
from gpuopt.core.result import Count
from gpuopt.profiling.count import count

PAGE = Path(__file__).parent.parent / "docs" / "flops.md"

HEAD = """# FLOPs against hand counts

Made by `make flops` ([`recipes/flops_table.py`](../recipes/flops_table.py)); the hand counts are formulas over the configuration's numbers in
[`recipes/architectures`](../recipes/architectures), never a walk over the module, and the same table is a test. No weights exist: modules live on the meta device.

The convention: 2 FLOPs a multiply-add; products alone (matrix products, convolutions, attention, recurrent cells, Fourier transforms at 5·n·log2 n); attention
counted full whatever its mask or window; norms, softmax, activations, rotary angles and pooling are 0 and known. Coverage is the share of memory traffic in ops whose
count is known; what is not known is named.

"""

TAIL = """
Published: {published}.

## Where `torch.utils.flop_counter` differs

On the meta device, where every fused op comes apart, PyTorch's counter agrees with the hand count of {agreed} of these {total}. Elsewhere:

| what | PyTorch's `FlopCounterMode` | `gpuopt` |
|---|---|---|
| a mixture of experts in float32 or float16 without weights | cannot run: the shape rule of `_grouped_mm` knows bfloat16 alone; no formula for it either, so 0 where it runs | 2·rows·k·n |
| a model that reads values in its forward (a mask's `.all()`, `.item()`) or makes tensors on the CPU, without weights | cannot run on the meta device | fake tensors stand in for a CPU's; failing that, one real run, and the report says so |
| Fourier transforms | 0 | 5·n·log2 n |
| `nn.LSTM` on a CPU under `inference_mode`, or cuDNN's on a GPU | 0 | every gate of every step |
| `nn.TransformerEncoder` and `nn.MultiheadAttention` on the fast path | 0 | as their parts |
| attention on a CPU (its fused op) | 0 up to torch 2.14 | full |
| `mv`, `addmv`, `dot`, `addbmm`, `bilinear`, `cdist`, `_int_mm`, int4 and int8 weights | 0 | counted |
| `map`, `scan`, `while_loop` | 0, and `NotImplemented` in the place of their result (torch 2.13) | each step; a trip count that is data needs a real run |
| `torch.cond` | the dearer branch | the branch that runs, in a real run |
| `flex_attention` called outside `torch.compile` | raises | full, block mask or not |
| attention over packed sequences (`varlen_attn`, flash attention) on fake tensors | each as long as the longest | their lengths, in a real run; unknown without values |
| an op nobody has a formula for, a Triton kernel, a tensor handed to NumPy | 0, silently | unknown: named, and missing from the coverage |
"""


def theirs(architecture: Architecture, module: torch.nn.Module) -> float | None:
    """FLOPs by PyTorch's counter on the meta device; None where the model does not run there."""
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*architecture.args, **architecture.kwargs)
    except RuntimeError:
        return None
    return float(counter.get_total_flops())


def ours(architecture: Architecture, module: torch.nn.Module) -> Count:
    """The same by `gpuopt`."""
    return count(module, Inputs(args=architecture.args, kwargs=dict(architecture.kwargs)))


def row(architecture: Architecture, counted: Count, other: float | None) -> str:
    """One line of the table."""
    known = f"{counted.coverage:.0%}" if not counted.unknown_ops else f"{counted.coverage:.1%}, not {', '.join(counted.unknown_ops)}"
    published = f"{architecture.published / 1e9:.3f}" if architecture.published else ""
    pytorch = "cannot run" if other is None else f"{other / architecture.hand - 1:+.2%}"
    return (
        f"| {architecture.name} | {architecture.shows} | {architecture.hand / 1e9:.3f} | {counted.flops / 1e9:.3f} "
        f"| {counted.flops / architecture.hand - 1:+.2%} | {known} | {published} | {pytorch} |"
    )


def page() -> str:
    """The whole page."""
    lines = [
        "| architecture | what can go wrong | by hand, GFLOP | counted, GFLOP | difference | coverage | published, GFLOP | PyTorch's counter |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    agreed, rows = 0, table().values()
    for architecture in rows:
        module = architecture.module()
        other = theirs(architecture, module)
        agreed += other == architecture.hand
        lines.append(row(architecture, ours(architecture, module), other))
        print(lines[-1], file=sys.stderr)
    sources = " and ".join(sorted({a.source for a in rows if a.source}))
    made = f"\nMade with torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}."
    return HEAD + "\n".join(lines) + "\n" + made + TAIL.format(published=sources, agreed=agreed, total=len(rows))


def main() -> int:
    """0: written, or up to date."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text = page()
    if "--check" in sys.argv[1:]:
        is_same = PAGE.read_text() == text
        print("docs/flops.md is up to date" if is_same else "docs/flops.md is not what `make flops` makes", file=sys.stderr)
        return 0 if is_same else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
