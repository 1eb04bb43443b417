"""GPU702: forward() met tensors of different dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import failure, frames
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

_WANTS_INTEGERS = re.compile(r"scalar types: Long, Int|tensors used as indices must be|expected target dtype")
_NO_KERNEL = re.compile(r"\"?(?P<op>[\w:]+)\"? not implemented for '(?P<dtype>\w+)'")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the module, the tensors of another dtype than the model's parameters, and where to cast them."""
    error = evidence.failure
    if error is None or failure.kind(error) != "dtype":
        return
    failed = failure.locate(evidence.module, evidence.inputs, error)
    if failed is None:
        yield Finding(
            code="",
            severity="error",
            message=f"forward() raised: {failure.first_line(error)}",
            fix="give the model and its floating inputs one dtype: model.half() with x.half(), or --precision fp16, which casts both",
        )
        return
    home = failed.usual("dtype", floats=True) or "float32"
    missing, wants_integers = _NO_KERNEL.search(str(error)), _WANTS_INTEGERS.search(str(error)) is not None
    odd = [t for t in failed.tensors if t.dtype.startswith(("float", "bfloat"))]
    if wants_integers:
        odd = [t for t in odd if t.kind != "parameter"]
    elif missing is None:

        def is_odd(tensor: failure.Seen) -> bool:
            return tensor.dtype.startswith(("float", "bfloat")) and tensor.dtype != home

        odd = list(dict.fromkeys(t.cause(is_odd) for t in odd if is_odd(t)))
    shown = "; ".join(t.text for t in odd[:3]) or failure.first_line(error)
    if missing is not None:
        message = (
            f"{failed.where}: {missing['op']} has no kernel for {missing['dtype']} on {failed.usual('device') or 'this device'}: {shown}"
        )
        fix = f"keep {failed.module_name or 'this module'} in float32 (--keep-fp32), or run on the GPU, or in bfloat16"
    elif wants_integers:
        message = f"{failed.where} takes whole numbers, and gets {shown}"
        fix = "; ".join(
            f"{t.name}.long()" + (" before the call" if t.kind == "input" else f" at {t.made_at}" if t.made_at else "") for t in odd[:3]
        )
        fix = fix or "pass integers: .long()"
    else:
        message = f"{failed.where} meets tensors of different dtypes: " + (
            f"{failed.most} in {home}, but {shown} {'is' if len(odd) == 1 else 'are'} not" if odd else shown
        )
        fix = (
            "; ".join(dict.fromkeys(_fix(t, home, failed) for t in odd[:3]))
            or f"cast every tensor of {failed.code or 'that line'} to torch.{home}"
        )
    yield Finding(
        code="",
        severity="error",
        message=message,
        fix=fix,
        module=failed.module_name,
        line=failed.line,
        op=failed.code or None,
        count=len(odd) or None,
    )


def _fix(tensor: failure.Seen, home: str, failed: failure.Failed) -> str:
    owner, _, leaf = tensor.name.rpartition(".")
    if tensor.kind == "input":
        whole = "model.float(), or " if home == "float64" else ""
        return f"{whole}{tensor.name}.to(torch.{home}) before the call"
    if tensor.kind == "parameter":
        return f"model.to(torch.{home}) casts {owner or tensor.name} with the rest" + (
            "; cast at its border what must stay in another dtype" if tensor.dtype == "float32" else ""
        )
    if tensor.kind == "buffer":
        return (
            f"self.register_buffer('{leaf}', ….to(torch.{home})) in {owner or 'the model'}: numpy and Python numbers make float64"
            if tensor.dtype == ("float64")
            else f"model.to(torch.{home}) after {tensor.name} is set"
        )
    if tensor.kind == "attribute":
        made = f"….to(torch.{home})" if tensor.dtype == "float64" else "…"
        return f"self.register_buffer('{leaf.partition('[')[0]}', {made}, persistent=False) in {owner or 'the model'}, so that model.to(dtype) casts it"
    near = next((t.name for t in failed.tensors if t.dtype == home and t.name.isidentifier()), None)
    wanted = f"{near}.dtype" if near else f"torch.{home}"
    factory = frames.factory(tensor.made_by or "")
    if factory is not None:
        return f"torch.{factory}(…, dtype={wanted})" + (
            f" at {tensor.made_at}" if tensor.made_at else f" at {failed.line}" if failed.line else ""
        )
    return f"{tensor.operand}.to({wanted})" + (f" where it is made, {tensor.made_at}" if tensor.made_at else "")


RULE = Rule(
    code="GPU702",
    name="dtype-mismatch",
    what="forward() failed because its tensors have different dtypes.",
    why="A product takes one dtype: where half of a model was cast, or a float64 constant slipped in, two meet and torch does not choose for you.",
    before="self.freq = torch.tensor(np.linspace(0, 1, d))  # float64",
    after="self.register_buffer('freq', torch.linspace(0, 1, d), persistent=False)",
    safe=False,
    needs=frozenset({"failure"}),
    find=find,
    source="the exception, its traceback and the tensors in its frames",
    explains=frozenset({"GPU201", "GPU204"}),
)
