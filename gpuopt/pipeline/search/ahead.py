"""Candidates that will be asked for next -> their children, loading and building beside the one that is tried, and standing still while anything is timed.

What is built ahead changes when a search is done and nothing of what it asks or finds: a candidate that is never asked for was built in vain, one that failed for
memory beside others is built again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from gpuopt.core.result import Device
from gpuopt.core.spec import BenchSpec, Candidate
from gpuopt.pipeline.cores import cores
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.seats import PASSING, Seat

MOST_JOBS = 4
"""Candidates that a search builds at once on a GPU: each holds its weights, and the work of its compiler, on the same device."""
CORES_A_JOB = 4
MOST_THREADS = 32
"""They wait for their children and do nothing else."""


def jobs_of_search(spec: BenchSpec, device: Device) -> int:
    """How many candidates of a search build at once. On a CPU one, unless more are asked for: its cores are what is timed."""
    if spec.build_jobs is not None:
        return spec.build_jobs
    return 1 if device.kind == "cpu" else max(1, min(MOST_JOBS, cores() // CORES_A_JOB))


@dataclass(slots=True)
class Coming:
    """A seat that is being built."""

    seat: Seat
    stack: ExitStack
    built: Future[None]


@dataclass(slots=True)
class Ahead:
    """Those that are built now. Children are started by the thread that calls (the kernel ends a child with the thread that started it) and built by others."""

    seated: Callable[[Candidate, ExitStack], Seat]
    """Starts a child that ends with the stack."""
    build: Callable[[Seat], None]
    coming: dict[str, Coming] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = None

    def expect(self, candidates: Sequence[Candidate], *, known: Mapping[str, object], most: int) -> None:
        """Start the first of these that nobody builds and that are not `known`, until there are `most`; end those that are not among them any more."""
        wanted = {tune.key(candidate): candidate for candidate in candidates}
        for key in [key for key in self.coming if key not in wanted]:
            self.drop(key)
        for key, candidate in wanted.items():
            if len(self.coming) >= most:
                return
            if key not in self.coming and key not in known:
                self._start(key, candidate)

    def take(self, key: str) -> tuple[Seat, ExitStack] | None:
        """The seat of this candidate once it is built, handed over; None where it has to be built by whoever asks."""
        coming = self.coming.get(key)
        if coming is None:
            return None
        try:
            coming.built.result()
        except BaseException:  # Ctrl-C while waiting, or a bug in a step: its child must not be left behind
            self.drop(key)
            raise
        del self.coming[key]
        if not coming.seat.ok and coming.seat.run.status in PASSING:
            coming.stack.close()
            return None
        return coming.seat, coming.stack

    def drop(self, key: str) -> None:
        """End one that is not wanted."""
        coming = self.coming.pop(key)
        coming.seat.child.kill()
        wait([coming.built])  # whoever builds it reads from pipes that closing would give to others
        coming.stack.close()

    @contextmanager
    def still(self) -> Iterator[None]:
        """All of them stand still inside: nothing else runs on the device that is timed, or on many of the cores that launch its work."""
        stopped = [coming.seat.child for coming in self.coming.values()]
        try:
            for child in stopped:
                child.pause()
            yield
        finally:
            for child in stopped:
                child.resume()

    def close(self) -> None:
        """End them all."""
        for key in list(self.coming):
            self.drop(key)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _start(self, key: str, candidate: Candidate) -> None:
        self._pool = self._pool or ThreadPoolExecutor(max_workers=MOST_THREADS)
        stack = ExitStack()
        try:
            seat = self.seated(candidate, stack)
        except BaseException:
            stack.close()
            raise
        self.coming[key] = Coming(seat=seat, stack=stack, built=self._pool.submit(self.build, seat))
