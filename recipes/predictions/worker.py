"""The child: JSON requests in, one Desk, JSON answers out. Started by run.py as `python -m recipes.predictions.worker IN OUT`, spoken to by gpuopt.pipeline.isolate.Child."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import Any

from gpuopt.core import codec
from gpuopt.core.result import Device
from gpuopt.pipeline import worker


def serve(requests: int, replies: int) -> None:
    """Answer until the requests end."""
    from recipes.predictions.desk import Desk

    desk = Desk()
    with os.fdopen(replies, "w", encoding="utf-8") as out, os.fdopen(requests, encoding="utf-8") as lines:

        def send(frame: dict[str, Any]) -> None:
            out.write(json.dumps(frame, allow_nan=False) + "\n")
            out.flush()

        for line in lines:
            frame = json.loads(line)
            if frame["do"] == "close":
                break
            # `device` is an id in every call but `explain`, which needs the ceilings.
            given = {k: codec.from_plain(Device, v) if isinstance(v, dict) else v for k, v in frame["args"].items()}
            try:
                send({"ok": codec.dump(getattr(desk, frame["do"])(**given))})
            except Exception as error:  # noqa: BLE001 - whatever a pair raises is its result; the others go on
                send({"error": codec.dump(worker.describe(error, {"time": "build", "explain": "profile"}.get(frame["do"], frame["do"])))})
        desk.close()


if __name__ == "__main__":
    faulthandler.enable()
    serve(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # exit handlers of native libraries have been seen to hang after the work was done
