"""The child of scripts.py: gpuopt/script/run.py, and the doctor where a model raises. `python -m gpuopt.pipeline.script_child OUT [--trace] [--save-inputs DIR] -- infer.py args`.

Rules about failures read the tensors in the frames of an exception, so they must run where it was raised. Nothing of them is imported before.
"""

from __future__ import annotations

import sys
from typing import Any

from gpuopt.script import run


def diagnosed(error: BaseException) -> list[dict[str, Any]]:
    """Findings about an exception that came out of a model, as plain values. An error of ours in here must not hide the program's."""
    try:
        from gpuopt.core import codec
        from gpuopt.doctor.diagnose import diagnose
        from gpuopt.doctor.evidence import Evidence

        return [codec.dump(finding) for finding in diagnose(Evidence(failure=error))]
    except Exception as broken:  # noqa: BLE001 - the program's own traceback is shown next, whatever happens here
        sys.stderr.write(f"gpuopt: its diagnosis failed: {type(broken).__name__}: {broken}\n")
        return []


def main() -> int:
    """The exit code is the program's."""
    out, traced, folder, program = run.arguments(sys.argv[1:])
    return run.execute(program, out, traced=traced, save_inputs=folder, on_failure=diagnosed)


if __name__ == "__main__":
    sys.exit(main())
