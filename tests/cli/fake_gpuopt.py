"""gpuopt with its jobs replaced: the last word before `--` says how they behave. Run as a script, in a process of its own.

python fake_gpuopt.py BEHAVIOUR WORDS...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "reports"


def act(job: Any, progress: Any) -> Any:
    """What BEHAVIOUR says, in place of every job."""
    from gpuopt.core import codec, errors
    from gpuopt.core.result import Report

    behaviour = sys.modules["__main__"].BEHAVIOUR
    report = replace(codec.read_json(Report, GOLDEN / f"{job.verb}.json"), command=job.command, gates=())
    progress.start("one", "building one")
    match behaviour.split("="):
        case ["ok"]:
            progress.warn("the model was in training mode")
            progress.done("one", "built")
        case ["slow", seconds]:
            for step in range(int(float(seconds) * 20)):
                progress.update("one", step / (float(seconds) * 20), "compiling")
                time.sleep(0.05)
            progress.done("one")
        case ["gate"]:
            report = codec.read_json(Report, GOLDEN / "bench.json")
        case ["error", name]:
            raise errors.error_types()[name]("what happened", fix="what to do")
        case ["bug"]:
            raise RuntimeError("a surprise\nof two lines")
        case ["partial", how]:
            progress.so_far(report)
            print("PARTIAL", file=sys.stderr, flush=True)
            if how == "hang":
                time.sleep(60)
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(5)
        case ["stubborn"]:
            try:
                print("PARTIAL", file=sys.stderr, flush=True)
                time.sleep(60)
            finally:
                time.sleep(60)
        case ["untrusted"]:
            from gpuopt.trust import consent

            path = job.candidates[0].model.text
            if not consent.is_trusted(consent.sha256_of(path)):
                raise errors.Untrusted(f"{path} names os.system", fix=f"gpuopt trust {path}")
    return report


if __name__ == "__main__":
    BEHAVIOUR = sys.argv[1]
    sys.argv = ["gpuopt", *sys.argv[2:]]
    verbs = ("profile", "bench", "convert", "compile", "backends", "device")
    fake = SimpleNamespace(**dict.fromkeys(verbs, act))
    sys.modules["gpuopt.pipeline.jobs"] = fake  # type: ignore[assignment]
    import gpuopt.pipeline

    gpuopt.pipeline.jobs = fake  # type: ignore[attr-defined]
    from gpuopt.cli.app import main

    main()
