"""The child of `gpuopt stream`: JSON requests in, one StreamSession, JSON answers out. Started by isolate.py as `python -m gpuopt.pipeline.streamed.child IN OUT`."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import Any

from gpuopt.core import codec
from gpuopt.core.spec import Candidate
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline.worker import describe, die_with_parent

ARGUMENTS: dict[str, Any] = {"candidate": Candidate, "request": StreamRequest, "spec": StreamSpec}
"""How arguments that are values are read back, by name; every other argument is a plain JSON type."""


def serve(requests: int, replies: int) -> None:
    """Answer until the requests end."""
    from gpuopt.pipeline.streamed.session import StreamSession

    out = os.fdopen(replies, "w", encoding="utf-8")

    def send(frame: dict[str, Any]) -> None:
        out.write(json.dumps(frame, allow_nan=False) + "\n")
        out.flush()

    session = StreamSession(progress=lambda fraction, note: send({"progress": [fraction, note]}))
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            frame = json.loads(line)
            if frame["do"] == "close":
                break
            try:
                given = {k: codec.from_plain(ARGUMENTS[k], v, what=k) if k in ARGUMENTS else v for k, v in frame["args"].items()}
                send({"ok": codec.dump(getattr(session, frame["do"])(**given))})
            except Exception as error:  # noqa: BLE001 - every failure of a model is a result; the parent decides what it means
                send({"error": codec.dump(describe(error, frame["do"]))})
    session.close()


def main() -> None:
    """Entry point of the child."""
    faulthandler.enable()  # a crash in native code then says which Python line called it
    die_with_parent()
    serve(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    # Native libraries' exit handlers have been seen to hang or abort after the work was done and answered.
    os._exit(0)


if __name__ == "__main__":
    main()
