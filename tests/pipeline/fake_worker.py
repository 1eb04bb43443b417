"""A child that misbehaves on request: `python -m` target of the isolation tests."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time


def main() -> None:
    requests, replies = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")

    def send(frame: dict) -> None:
        replies.write(json.dumps(frame) + "\n")
        replies.flush()

    for line in requests:
        frame = json.loads(line)
        verb = frame["do"]
        if verb == "close":
            return
        if verb == "echo":
            print("this is not a frame")
            send({"progress": [0.5, "half"]})
            send({"ok": {"samples": {"samples_ns": frame["args"]["ns"], "clock": "fake"}}})
        elif verb == "look":
            torch = sys.modules.get("torch")
            seen = {
                "environment": dict(os.environ),
                "group": os.getpgid(0) == os.getpid() == os.getsid(0),
                "threads": torch.get_num_threads() if torch else None,
                "modules": sorted(sys.modules),
                "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
                "collects": gc.isenabled(),
            }
            send({"progress": [None, json.dumps(seen)]})
            send({"ok": {"samples": {"samples_ns": [1], "clock": "fake"}}, "imported": frame["args"].get("imported", [])})
        elif verb == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif verb == "abort":
            print("terminate called after throwing", file=sys.stderr, flush=True)
            os.abort()
        elif verb == "exit0":
            os._exit(0)
        elif verb == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif verb == "count":
            for _ in range(frame["args"]["steps"]):
                time.sleep(0.02)
                send({"progress": [None, "one more"]})
            send({"ok": {"samples": {"samples_ns": [1], "clock": "fake"}}})
        elif verb == "hang":
            time.sleep(600)
        elif verb == "ignore_sigterm":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen([sys.executable, "-c", "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
            time.sleep(600)
        elif verb == "flood":
            for _ in range(20_000):
                sys.stderr.write("x" * 1023 + "\n")
            sys.stderr.write("the last line\n")
            sys.stderr.flush()
            os._exit(7)
        elif verb == "grandchild":
            # Leaves a process behind that holds every inherited end of the pipes.
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
            os._exit(3)


if __name__ == "__main__":
    main()
