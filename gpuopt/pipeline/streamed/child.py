"""The child of `gpuopt stream`: JSON requests in, one StreamSession, JSON answers out. Started by isolate.py as `python -m gpuopt.pipeline.streamed.child IN OUT`."""

from __future__ import annotations

from typing import Any

from gpuopt.core.spec import Candidate
from gpuopt.core.streamed import StreamRequest
from gpuopt.core.streaming import StreamSpec
from gpuopt.pipeline import worker

ARGUMENTS: dict[str, Any] = {"candidate": Candidate, "request": StreamRequest, "spec": StreamSpec}
"""How arguments that are values are read back, by name; every other argument is a plain JSON type."""


def serve(requests: int, replies: int) -> None:
    """Answer until the requests end."""
    from gpuopt.pipeline.streamed.session import StreamSession

    worker.answer(requests, replies, lambda progress: StreamSession(progress=progress), ARGUMENTS)


def main() -> None:
    """Entry point of the child."""
    worker.main(serve)


if __name__ == "__main__":
    main()
