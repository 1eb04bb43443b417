"""The main job on the two reference models: profile, compile, bench. `make demo` runs it; every step is a command to copy.

On a GPU the models run in fp16 at sizes that fill it; on a CPU in fp32 at batch 1. Bundles and reports go to demo-out/.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

OUT = Path("demo-out")


def run(*words: str) -> None:
    """Show a command as it would be typed, run it, stop at the first failure."""
    print(f"\n\033[1m$ gpuopt {shlex.join(words)}\033[0m", flush=True)
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "gpuopt", *words]).returncode
    print(f"({time.monotonic() - began:.0f} s, exit {code})", flush=True)
    if code:
        sys.exit(code)


def main() -> None:
    """Everything in a few minutes on two CPU cores."""
    import torch

    from gpuopt import models

    OUT.mkdir(exist_ok=True)
    is_gpu = torch.cuda.is_available()
    images, texts = ("256", "64") if is_gpu else ("1", "1")
    words = "512" if is_gpu else "128"
    precision = ("--precision", "fp16") if is_gpu else ()
    backend = "inductor:max-autotune-freezing" if is_gpu else "inductor:freezing"
    layout = ("--channels-last", "--fold-bn")
    time_limit = ("--max-time", "4s")

    # A file as people have them: a pickled module.
    file = OUT / "resnet101.pt"
    torch.save(models.resnet101(), file)

    run("device")
    run("profile", str(file), "--batch", images, *precision, *time_limit, "--json", str(OUT / "resnet101-profile.json"))
    run(
        "compile",
        str(file),
        "--backend",
        backend,
        "--batch",
        images,
        *precision,
        *layout,
        *time_limit,
        "-o",
        str(OUT / "resnet101-fast"),
        "--force",
    )
    run("bench", str(OUT / "resnet101-fast"), *time_limit, "--json", str(OUT / "resnet101-fast.json"))
    bert = ("gpuopt.models:bert_large", "--batch", texts, "--dim", f"S={words}")
    run("profile", *bert, *precision, *time_limit, "--json", str(OUT / "bert-large-profile.json"))
    run("bench", *bert, *precision, "--backend", "eager", "--backend", "ort", *time_limit, "--json", str(OUT / "bert-large.json"))
    run("report", str(OUT / "resnet101-profile.json"), "--format", "html", "--output", str(OUT / "resnet101-profile.html"))
    print(f"\nReports and the bundle are in {OUT}/; open {OUT}/resnet101-profile.html in a browser.")


if __name__ == "__main__":
    main()
