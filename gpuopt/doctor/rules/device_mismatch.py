"""GPU701: forward() met tensors on different devices."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuopt.core.result import Finding
from gpuopt.doctor import failure, frames, mismatch
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import Rule


def find(evidence: Evidence) -> Iterator[Finding]:
    """One finding: the module, the tensors that lie elsewhere than the model's parameters, and how each gets there."""
    default = evidence.device.id if evidence.device is not None else "cuda:0"
    return mismatch.finding(
        evidence,
        "device",
        lambda failed, error: _judged(failed, error, default),
        otherwise="bring the model and every input to one device: model.to('cuda'), x.to('cuda')",
    )


def _judged(failed: failure.Failed, error: BaseException, default: str) -> mismatch.Verdict:
    home = failed.usual("device") or default

    def is_stray(tensor: failure.Seen) -> bool:
        # A tensor of one number may stay on the CPU: torch allows it.
        return tensor.device != home and not (tensor.device == "cpu" and bool(tensor.dtype) and not tensor.shape)

    strays = mismatch.causes(failed, is_stray)
    if not strays:  # what the frames hold is not what was compared: the exception alone knows the devices
        home = next(iter(re.findall(r"cuda:\d+", str(error))), home)
    shown = mismatch.named(strays, error)
    others = f"{failed.most} on {home}, but {shown} {'is' if len(strays) == 1 else 'are'} not" if strays else shown
    return mismatch.Verdict(
        message=f"{failed.where} meets tensors on different devices: {others}",
        fix=mismatch.each(strays, lambda t: _fix(t, home, failed)) or f"bring every tensor of {failed.code or 'that line'} to {home}",
        num_tensors=len(strays),
    )


def _fix(tensor: failure.Seen, home: str, failed: failure.Failed) -> str:
    owner, _, leaf = tensor.name.rpartition(".")
    if tensor.kind == "input":
        if home == "cpu" and tensor.device.startswith("cuda"):
            return f"model.to('{tensor.device}'): its parameters are still on the CPU"
        return f"{tensor.name} = {tensor.name}.to('{home}') before the call"
    if tensor.kind in ("parameter", "buffer"):
        if tensor.device == "meta":  # nothing is there that .to() could move
            return f"load its weights: {owner or tensor.name} was built on meta and holds no data (load_state_dict(…, assign=True))"
        return f"model.to('{home}') after everything is set: {owner or tensor.name} was left on {tensor.device}"
    if tensor.kind == "attribute":
        return (
            f"in __init__ of {_class(failed, owner)}: self.register_buffer('{leaf.partition('[')[0]}', …, persistent=False), "
            f"so that model.to() moves it"
        )
    made = frames.factory(tensor.made_by or "")
    if made is not None:
        at = f" at {tensor.made_at}" if tensor.made_at else f" at {failed.line}" if failed.line else ""
        return f"torch.{made}(…, device={_sibling(tensor, failed, home)}){at}"
    return f"{tensor.operand}.to('{home}')" + (f" where it is made, {tensor.made_at}" if tensor.made_at else "")


def _sibling(tensor: failure.Seen, failed: failure.Failed, home: str) -> str:
    """`x.device` of a named tensor of the same expression that is in the right place."""
    near = next((t.name for t in failed.tensors if t.device == home and t.kind in ("input", "value") and t.name.isidentifier()), None)
    return f"{near}.device" if near else f"'{home}'"


def _class(failed: failure.Failed, owner: str) -> str:
    modules = dict(failed.root.named_modules()) if failed.root is not None else {}
    return type(modules[owner]).__name__ if owner in modules else failed.module_class


RULE = Rule(
    code="GPU701",
    name="device-mismatch",
    what="forward() failed because its tensors lie on different devices.",
    why="A kernel reads one device's memory. model.to() moves parameters and registered buffers alone: inputs, plain attributes and tensors made in forward() stay where they are.",
    before="self.scale = torch.ones(d)  # stays on the CPU",
    after="self.register_buffer('scale', torch.ones(d), persistent=False)",
    safe=False,
    needs=frozenset({"failure"}),
    find=find,
    source="the exception, its traceback and the tensors in its frames",
    explains=frozenset({"GPU103"}),
)
