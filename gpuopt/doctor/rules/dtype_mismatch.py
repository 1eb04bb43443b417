"""GPU702: forward() met tensors of different dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import failure, frames, mismatch
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule

_WANTS_INTEGERS = re.compile(r"scalar types: Long, Int|tensors used as indices must be|expected target dtype")
_NO_KERNEL = re.compile(r"\"?(?P<op>[\w:]+)\"? not implemented for '(?P<dtype>\w+)'")


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the module, the tensors of another dtype than the model's parameters, and where to cast them."""
    return mismatch.finding(
        evidence,
        "dtype",
        _judged,
        otherwise="give the model and its floating inputs one dtype: model.half() with x.half(), or --precision fp16, which casts both",
    )


def _judged(failed: failure.Failed, error: BaseException) -> mismatch.Verdict:
    home = failed.usual("dtype", floats=True) or "float32"
    missing = _NO_KERNEL.search(str(error))
    floats = [t for t in failed.tensors if t.dtype.startswith(("float", "bfloat"))]
    if _WANTS_INTEGERS.search(str(error)) is not None and missing is None:
        odd = [t for t in floats if t.kind != "parameter"]
        message = f"{failed.where} takes whole numbers, and gets {mismatch.named(odd, error)}"
        fix = mismatch.each(odd, _whole) or "pass integers: .long()"
    elif missing is not None:
        odd = floats
        message = f"{failed.where}: {missing['op']} has no kernel for {missing['dtype']} on {failed.usual('device') or 'this device'}: {mismatch.named(odd, error)}"
        fix = f"keep {failed.module_name or 'this module'} in float32 (--keep-fp32), or run on the GPU, or in bfloat16"
    else:
        odd = mismatch.causes(failed, lambda t: t.dtype.startswith(("float", "bfloat")) and t.dtype != home)
        shown = mismatch.named(odd, error)
        others = f"{failed.most} in {home}, but {shown} {'is' if len(odd) == 1 else 'are'} not" if odd else shown
        message = f"{failed.where} meets tensors of different dtypes: {others}"
        fix = mismatch.each(odd, lambda t: _fix(t, home, failed)) or f"cast every tensor of {failed.code or 'that line'} to torch.{home}"
    return mismatch.Verdict(message=message, fix=fix, num_tensors=len(odd))


def _whole(tensor: failure.Seen) -> str:
    return f"{tensor.name}.long()" + (" before the call" if tensor.kind == "input" else f" at {tensor.made_at}" if tensor.made_at else "")


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
