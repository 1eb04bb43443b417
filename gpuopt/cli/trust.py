"""`gpuopt trust FILE`: a person's consent -> the file's hash, remembered."""

from __future__ import annotations

import sys
from pathlib import Path

from gpuopt.cli import options as o
from gpuopt.cli.streams import confirmed, emit, is_terminal, tell
from gpuopt.core.errors import BadInput, UsageError
from gpuopt.reports.figures import clean


def trust(
    files: o.TrustedArg = None,
    list_: o.ListOpt = False,
    forget: o.ForgetOpt = False,
    no_input: o.NoInputOpt = False,
) -> int:
    """Let a model file run its code from now on: its sha256 is remembered, and nothing else of that name.

    At a terminal, shows first what the file is and what it would run, and asks. Takes a file, a folder, a bundle, or a hash.

    Example: gpuopt trust model.pt
    """
    from gpuopt.trust import consent

    if list_:
        if files:
            raise UsageError("--list takes no file", fix="gpuopt trust --list")
        emit("".join(f"sha256:{entry.sha256}  {clean(entry.path, 4096)}\n" for entry in consent.entries()))
        return 0
    if not files:
        raise UsageError("no file is named", fix="gpuopt trust FILE, gpuopt trust --list")
    for file in files:
        if forget:
            was_known = consent.forget(file)
            emit(f"{'forgotten' if was_known else 'was not trusted'}: {clean(file, 4096)}\n")
            continue
        if not no_input and is_terminal(sys.stdin) and is_terminal(sys.stderr) and consent.parse_hash(file) is None:
            tell(_described(Path(file)))
            if not confirmed(f"Let {clean(file, 200)} run its code from now on?"):
                tell("not trusted\n")
                return 1
        emit(f"trusted: sha256:{consent.record(file)}  {clean(file, 4096)}\n")
    return 0


def _described(path: Path) -> str:
    """What the file is, and what it would run, as far as that can be read without running it."""
    from gpuopt.trust import policy

    try:
        found = policy.classify(path)
    except BadInput as error:
        return f"{clean(error.message, 600)}\n"
    rule = policy.POLICY[found]
    lines = [f"{clean(path, 200)} is {rule.is_a}: {rule.why}."]
    if found is policy.Format.CHECKPOINT:
        from gpuopt.trust import gate

        lines += [f"  it names {clean(name, 200)}" for name in gate.inspect_checkpoint(path).refused[:20]]
    return "\n".join(lines) + "\n"
