"""Report and Manifest -> their JSON schemas, published in docs/. `python -m gpuopt.reports.schema docs` writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.result import Manifest, Report

SCHEMAS = {"report.schema.json": Report, "manifest.schema.json": Manifest}


def texts() -> dict[str, str]:
    """File name -> the schema's text, ending in a newline."""
    return {
        name: json.dumps({"title": cls.__name__, **codec.schema(cls)}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        for name, cls in SCHEMAS.items()
    }


def write(folder: Path) -> None:
    """Both files into an existing folder."""
    for name, text in texts().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
