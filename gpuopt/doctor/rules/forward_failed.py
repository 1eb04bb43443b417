"""GPU706: forward() raised something no other rule knows."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import failure, modules
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

_REMEDIES = (
    (r"missing \d+ required (?:positional|keyword-only) arguments?: (?P<what>.+)", "pass {what}: --input 'NAME:float32[N,…]' for each"),
    (r"unexpected keyword argument (?P<what>'\w+')", "leave out {what}: forward() does not take it"),
    (r"takes (?P<what>.+ positional arguments? but .+) given", "forward() takes {what}: see its signature"),
    (r"not compiled with CUDA enabled", "the code asks for CUDA, and this torch has none: GPU609 says which to install"),
    (r"Could not run '(?P<what>[\w:.]+)'", "{what} has no kernel for this device: write it with other ops, or keep that part on the CPU"),
    (
        r"CUDA error: (?P<what>[\w ]+)",
        "CUDA_LAUNCH_BLOCKING=1 names the op that failed; on the CPU (--device cpu) the same call often says why",
    ),
    (
        r"CUDNN_STATUS_\w+|CUBLAS_STATUS_\w+",
        "often the GPU is out of memory, or tensors overlap: try a smaller batch, then --device cpu for a clearer error",
    ),
    (r"'NoneType' object", "something forward() needs is None: pass the optional input, or set the attribute before the call"),
    (r"not enough values to unpack", "an input has fewer dimensions than forward() unpacks: add the batch dimension, x.unsqueeze(0)"),
    (r"maximum recursion depth", "forward() calls itself without end"),
)
"""(pattern of the message, what helps)."""


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the innermost module, the user's own line, the exception."""
    error = evidence.failure
    if error is None or failure.kind(error) != "other":
        return
    failed = failure.locate(evidence.module, evidence.inputs, error)
    said = f"{type(error).__name__}: {failure.first_line(error)}"
    line = None if failed is None else failed.user_line or failed.line or modules.line(failed.root, failed.module_name)
    fix = next((text.format(**match.groupdict()) for pattern, text in _REMEDIES if (match := re.search(pattern, str(error)))), None)
    if fix is None:
        held = "; ".join(t.text for t in failed.tensors[:4]) if failed is not None else ""
        fix = f"see {line or 'the traceback'}" + (f": the tensors there are {held}" if held else "")
    yield Finding(
        code="",
        severity="error",
        message=f"forward() raised in {failed.where}: {said}" if failed is not None else f"forward() raised {said}",
        fix=fix,
        module=None if failed is None else failed.module_name,
        line=line,
        op=None if failed is None else failed.code or None,
    )


RULE = Rule(
    code="GPU706",
    name="forward-failed",
    what="forward() raised an exception.",
    why="Nothing can be measured before a call goes through.",
    before="model(x)  # forward() takes x and mask",
    after="model(x, mask)",
    safe=False,
    needs=frozenset({"failure"}),
    find=find,
    source="the exception and its traceback",
)
