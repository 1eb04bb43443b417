"""One model -> its record: every candidate of its declared space built, timed and verified by the children of `gpuopt optimize`, written anew after each.

`run.py` starts it once a model: `python -m recipes.search_cost.measure NAME --output FILE.json`. The input is tried and traced first, which gives the facts that the space is
made from; then the candidates are asked for as a search asks (`trying.tried`), those that build longest first, without a limit above which verification is left out. A few
build ahead of the one that is timed, and stand still meanwhile.

Each candidate begins with empty caches of compiled kernels, so that its cost depends on nobody who came before it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from gpuopt.core.errors import BadInput, GpuoptError, ResourceError, UsageError
from gpuopt.core.progress import Silent
from gpuopt.core.result import Status
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import BenchSpec, Candidate, Job
from gpuopt.pipeline import facts, forking, isolate, machine, seats
from gpuopt.pipeline.cores import share_of_cores
from gpuopt.pipeline.search import explaining, trying, tune
from gpuopt.pipeline.search.ahead import jobs_of_search
from gpuopt.pipeline.search.crew import Crew, gathered
from gpuopt.pipeline.search.questions import Explained, Screen
from recipes.search_cost import record as records
from recipes.search_cost.record import Record, Row
from recipes.search_cost.space import CASES, MOST, TINY_WAYS, WAYS, declared

T = TypeVar("T")
Say = Callable[[str], None]
AHEAD = 8
STEP_TIMEOUT_S = 150.0
"""Of a child's slowest step."""
BUILDING, VERIFYING = frozenset({"load", "build"}), frozenset({"verify"})
"""Steps of a child; all others time it."""
ENDS_WITH = frozenset({Status.BUG, Status.CANCELLED, Status.DISK_FULL, Status.ENV_MISSING})
"""Ends that are none of the candidate's doing: a record with one in it would be wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every candidate of the space has a row, 1 where it was ended before, 2 for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m recipes.search_cost.measure", description="Every candidate of one model's space.")
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--most", type=int, default=MOST)
    parser.add_argument("--build-jobs", type=int, default=None)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cores", default="", metavar="FROM-TO", help="of this process and its children")
    parser.add_argument("--command", default="", help="what is written into the record")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if asked.cores:
        first, _, last = asked.cores.partition("-")
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[int(first) : int(last) + 1]))
    try:
        found = measured(
            asked.name,
            asked.output,
            device=asked.device,
            tiny=asked.tiny,
            most=asked.most,
            build_jobs=asked.build_jobs,
            resume=asked.resume,
            command=asked.command,
        )
    except GpuoptError as error:
        print(f"{error.message}: {error.fix}" if error.fix else error.message, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended; the record has what was measured", file=sys.stderr)
        return 1
    return 1 if found.missing() else 0


def measured(
    name: str,
    output: Path,
    *,
    device: str,
    tiny: bool = False,
    most: int = MOST,
    build_jobs: int | None = None,
    resume: bool = False,
    command: str = "",
    say: Say = print,
) -> Record:
    """Written to `output` after each candidate. `resume`: with the rows it has. Raises GpuoptError where the input itself cannot be measured or traced, or the
    record cannot be kept or is of something else."""
    began = time.monotonic()
    bench = BenchSpec(max_time_s=2.0, energy_s=0.0, timeout_s=STEP_TIMEOUT_S, build_jobs=build_jobs)
    base = CASES[name].base(device, tiny=tiny)
    job = Job(verb="optimize", candidates=(base,), bench=bench, search=SearchSpec(finalists=2))
    here = machine.surveyed(job, _Warnings(say))
    base = replace(base, device=here.device.id)
    before = _before(output, name, base, here, tiny, jobs_of_search(bench, here.device)) if resume and output.exists() else None
    with tempfile.TemporaryDirectory(prefix="search-cost-") as caches:
        crew = Timekeeping(job=job, machine=here, base=base, progress=_Warnings(say))
        crew.caches = Path(caches)
        with forking.kept({**os.environ, **isolate.child_environment()}, forking.expected_of([job])), gathered(crew):
            say(f"{name}: {here.device.name}, {crew.jobs} at once ({time.monotonic() - began:.0f} s)")
            if before is None:
                row = _row(crew, base, ())
                if row.status != Status.OK:
                    crew.raise_if_base_failed()
                    raise ResourceError(f"{name}: the input cannot be measured: {row.status}: {row.reason}")
                explained = _explained(crew, name)
                assert explained.facts is not None
                found = Record(
                    name=name,
                    command=command,
                    tiny=tiny,
                    device=here.device,
                    environment=here.found.environment,
                    jobs=crew.jobs,
                    base=base,
                    spec=declared(base, explained.facts, most=most, ways=TINY_WAYS if tiny else WAYS),
                    explained=explained,
                    rows=(row,),
                )
                say(_line(row))
            else:
                found, began = before, began - before.seconds
                crew.keep({tune.key(base): _peak_of(base, found)})
            waiting = sorted(found.missing(), key=lambda c: -tune.way_of(c).build_s)
            say(f"{name}: {len(waiting)} of {len(found.space())} candidates to measure ({time.monotonic() - began:.0f} s)")
            records.write(replace(found, seconds=time.monotonic() - began), output)
            for number, candidate in enumerate(waiting, 1):
                row = _row(crew, candidate, waiting[number : number + AHEAD])
                if row.status in ENDS_WITH:
                    raise BadInput(f"{name}: {row.label}: {row.status}: {row.reason}", fix="mend what it says, then --resume")
                found = replace(found, rows=(*found.rows, row), seconds=time.monotonic() - began)
                records.write(found, output)
                say(f"{_line(row)} ({time.monotonic() - began:.0f} s)")
    return found


def _before(output: Path, name: str, base: Candidate, here: machine.Machine, tiny: bool, jobs: int) -> Record:
    found = records.read(output)
    ours = (name, base, tiny, jobs, here.device.name, here.device.driver, here.found.environment.packages)
    if (found.name, found.base, found.tiny, found.jobs, found.device.name, found.device.driver, found.environment.packages) != ours:
        raise UsageError(
            f"{output.name} is of another model, machine or version, or built with more or fewer at once",
            fix="leave --resume away: all is measured anew",
        )
    return found


def _explained(crew: Timekeeping, name: str) -> Explained:
    began = time.monotonic()
    answer, run = explaining.explained(crew, crew.base)
    crew.keep({tune.key(crew.base): run})
    if answer.facts is None:
        raise ResourceError(f"{name}: the input cannot be traced: {answer.reason}")
    return replace(answer, seconds=time.monotonic() - began, reason=_plain(answer.reason))


def _row(crew: Timekeeping, candidate: Candidate, later: Sequence[Candidate]) -> Row:
    """Try one, whatever its time."""
    key = tune.key(candidate)
    question = Screen(candidate=candidate, ahead=tuple(later))
    crew.learn(question)
    answer, run = trying.tried(crew, question)
    crew.keep({key: run})
    crew.hear(question, answer)
    watch = crew.watches[key]
    return Row(
        candidate=candidate,
        label=tune.words(candidate, crew.base) or "as is",
        status=str(answer.status),
        reason=_plain(answer.reason),
        ms=answer.ms if answer.ms is not None else watch.ms,
        peak_bytes=answer.peak_bytes,
        verified=answer.verified,
        build_s=watch.took(BUILDING) + watch.start_s,
        timing_s=sum(watch.spent.values()) - watch.took(BUILDING) - watch.took(VERIFYING),
        verify_s=watch.took(VERIFYING),
    )


def _peak_of(base: Candidate, found: Record) -> Any:
    """Enough of the input's run for the crew to know how many more the device's memory holds."""
    from gpuopt.pipeline import figures

    return replace(figures.started(base), peak_bytes=found.rows[0].peak_bytes)


def _plain(reason: str) -> str:
    # A reason may quote a compiler: paths are this machine's.
    return re.sub(r"(?:/[\w.+-]+){2,}/", "", reason)[:400]


def _line(row: Row) -> str:
    told = f"{row.ms:.4g} ms" if row.ms is not None else "not timed"
    ended = "" if row.status == Status.OK else f" {row.status}: {row.reason[:120]}"
    return f"  {row.label:<60} {told:>12}  {row.build_s:.1f} + {row.timing_s:.1f} + {row.verify_s:.1f} s{ended}"


# -- whose time is whose ---------------------------------------------------------------------------------------------------------------


class Timekeeping(Crew):
    """A crew whose children's time is kept, candidate by candidate, each with caches of its own."""

    caches: Path
    watches: dict[str, Watch]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.watches = {}

    def _seated(self, candidate: Candidate, stack: ExitStack) -> seats.Seat:
        """One that is built again, alone, is timed anew: what it took beside others was lost on their account."""
        began = time.monotonic()
        job, key = replace(self.job, candidates=(candidate,)), tune.key(candidate)
        own = tempfile.mkdtemp(prefix=f"{key}-", dir=self.caches)
        environment = share_of_cores(self.machine.device, self.jobs) | {
            "TORCHINDUCTOR_CACHE_DIR": own,
            "TRITON_CACHE_DIR": str(Path(own) / "triton"),
        }
        seat = stack.enter_context(seats.seated(candidate, job, self.progress, environment))
        self.watches[key] = Watch(child=seat.child, start_s=time.monotonic() - began)
        seat.child = self.watches[key]
        return seat


@dataclass(slots=True)
class Watch:
    """A worker, and the seconds that each kind of step took it, less those in which it stood still."""

    child: seats.Worker
    start_s: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    ms: float | None = None
    """Median of all blocks."""
    _blocks_ns: list[int] = field(default_factory=list)
    _stood_s: float = 0.0
    _since: float | None = None

    @property
    def pid(self) -> int:
        """Its own."""
        return self.child.pid

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self.child.alive

    def took(self, verbs: frozenset[str]) -> float:
        """Seconds of these steps."""
        return sum(seconds for verb, seconds in self.spent.items() if verb in verbs)

    def call(self, verb: str, result: type[T], *, timeout_s: float, on_progress: Any = None, **arguments: object) -> T:
        """One step, timed however it ends."""
        began = self._clock()
        try:
            answer = self.child.call(verb, result, timeout_s=timeout_s, on_progress=on_progress, **arguments)
        finally:
            self.spent[verb] = self.spent.get(verb, 0.0) + self._clock() - began
        if verb == "block" and isinstance(answer, facts.Measured):
            self._blocks_ns += answer.samples.samples_ns
            self.ms = median(self._blocks_ns) / 1e6 if self._blocks_ns else None
        return answer

    def pause(self) -> None:
        """Let it stand still."""
        self.child.pause()
        if self._since is None:
            self._since = time.monotonic()

    def resume(self) -> None:
        """Go on."""
        if self._since is not None:
            self._stood_s += time.monotonic() - self._since
            self._since = None
        self.child.resume()

    def kill(self) -> None:
        """End it at once."""
        self.child.kill()

    def close(self) -> None:
        """End it."""
        self.child.close()

    def _clock(self) -> float:
        """Seconds that do not pass while it stands still."""
        since = self._since
        return (time.monotonic() if since is None else since) - self._stood_s


class _Warnings(Silent):
    """Passes on what a search warns of."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def warn(self, text: str) -> None:
        """Said at once."""
        self._say(f"  warning: {text}")


if __name__ == "__main__":
    sys.exit(main())
