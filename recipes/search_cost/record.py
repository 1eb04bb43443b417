"""What measuring every candidate of a declared space left behind -> `recipes/search_cost/h200/NAME.json`, and back, refused where anything in it cannot be.

Times of candidates are milliseconds a call, costs are seconds. What a candidate cost is what its own child worked for it: from the start of the process to the end of its
last step, without the time it stood still while another was timed, or waited for its turn. All of a record were built under the same load, as many at once as `jobs` says.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from gpuopt.core import codec
from gpuopt.core.errors import BadInput
from gpuopt.core.result import Device, Environment, Status
from gpuopt.core.search import SearchSpec
from gpuopt.core.spec import Candidate
from gpuopt.pipeline.search import tune
from gpuopt.pipeline.search.questions import Explained
from recipes import result_file
from recipes.search_cost.space import candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate: built, timed in a few short blocks, verified whatever its time."""

    candidate: Candidate
    label: str
    """Its settings in words."""
    status: str
    """A `Status`; `ok` for one that may be chosen."""
    reason: str = ""
    ms: float | None = None
    """Median of the short blocks, also of one that failed its verification after them; None where it was not timed."""
    peak_bytes: int | None = None
    verified: bool = False
    build_s: float
    """Its process started, the model loaded and built."""
    timing_s: float = 0.0
    """Warmed and timed."""
    verify_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All that its child worked."""
        return self.build_s + self.timing_s + self.verify_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One model at one size on one device."""

    schema_version: int = 1
    name: str
    command: str
    tiny: bool
    """Tiny siblings of the models: a rehearsal, no figure of it means anything."""
    device: Device
    environment: Environment
    jobs: int
    """Candidates built at once."""
    base: Candidate
    spec: SearchSpec
    """The declared space."""
    explained: Explained
    """The input's trace, with the seconds it took."""
    rows: tuple[Row, ...] = ()
    """In the order they were measured, the input first."""
    seconds: float = 0.0
    """Of the whole measurement, by the clock on the wall."""
    checksum: str = ""
    """Of all the rest: a figure with one digit changed is valid JSON too."""

    def space(self) -> list[Candidate]:
        """Every candidate that belongs in it."""
        assert self.explained.facts is not None
        return candidates(self.base, self.explained.facts, self.spec)

    def missing(self) -> list[Candidate]:
        """Those without a row: there are some while it is measured, and where that was cut short."""
        there = {tune.key(row.candidate) for row in self.rows}
        return [candidate for candidate in self.space() if tune.key(candidate) not in there]


def write(record: Record, path: Path) -> None:
    """With its checksum, by one rename. Raises BadInput where the file cannot be kept."""
    result_file.write(replace(record, checksum=_checksum(record)), path)


def read(path: Path) -> Record:
    """Raises BadInput where the file is no record, or says what cannot be."""
    found = codec.read_json(Record, path)
    why = wrong(found)
    if why:
        raise BadInput(f"{path.name}: {why}", fix="measure it again: python -m recipes.search_cost.run")
    return found


def wrong(record: Record) -> str:
    """Why this is no record of a measurement; "" for one that may be replayed as far as it goes."""
    if record.checksum != _checksum(record):
        return "its checksum differs: it is damaged, or was changed by hand"
    if record.explained.facts is None or not _is_cost(record.explained.seconds):
        return "the input's trace is not in it"
    if not record.rows or record.rows[0].candidate != record.base or record.rows[0].status != Status.OK:
        return "its first row is not the input, measured"
    inside = {tune.key(candidate) for candidate in record.space()}
    seen: set[str] = set()
    for row in record.rows:
        key = tune.key(row.candidate)
        if key in seen:
            return f"{row.label} is in it twice"
        if key not in inside:
            return f"{row.label} is not in the space it declares"
        if row.status not in set(Status):
            return f"{row.label} ended as {row.status!r}, which no candidate does"
        if not all(map(_is_cost, (row.build_s, row.timing_s, row.verify_s))) or not row.seconds:
            return f"{row.label} has no cost that can be"
        if (row.ms is None and row.status == Status.OK) or (row.ms is not None and not (math.isfinite(row.ms) and row.ms > 0)):
            return f"{row.label} has no time that can be"
        if row.status != Status.OK and not row.reason:
            return f"{row.label} failed without a reason"
        seen.add(key)
    return ""


def _is_cost(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0


def _checksum(record: Record) -> str:
    plain = codec.dump(replace(record, checksum=""))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
