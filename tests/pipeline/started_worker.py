"""A child that says how long ago it began: `main` of the tests of forking."""

from __future__ import annotations

import json
import os
import sys
import time

from gpuopt.pipeline import worker


def main() -> None:
    requests, replies = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
    for line in requests:
        if json.loads(line)["do"] == "close":
            return
        replies.write(json.dumps({"progress": [None, str(time.monotonic() - worker.STARTED)]}) + "\n")
        replies.write(json.dumps({"ok": {"samples": {"samples_ns": [1], "clock": "fake"}}}) + "\n")
        replies.flush()
