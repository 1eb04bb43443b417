"""File targets: a name, a suffix, a folder -> what may be written there; a child writes beside the target, the parent publishes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gpuopt.bundles import write as bundle_writer
from gpuopt.bundles.manifest import require_output_name
from gpuopt.core.errors import ResourceError, UsageError
from gpuopt.core.progress import Progress
from gpuopt.core.result import Run
from gpuopt.core.spec import Candidate, Job
from gpuopt.pipeline import facts, manifests
from gpuopt.pipeline.seats import Seat
from gpuopt.trust import consent


def source_of(candidate: Candidate) -> Path | None:
    """The model's own file or folder, which an output must not touch; None for a factory."""
    path = Path(candidate.model.text)
    try:
        return path if candidate.model.text and path.exists() else None
    except OSError:  # a name too long for the file system
        return None


def kind_of(target: Path, asked: str | None) -> str:
    """What to write. A suffix that says otherwise is refused: such a file would be refused when it is read."""
    kinds = {".onnx": "onnx", ".pt2": "pt2", ".safetensors": "safetensors"}
    told = kinds.get(target.suffix)
    if asked is None and told is None:
        raise UsageError(f"{target.name} does not say what to write", fix="--to onnx|pt2|safetensors, or such a suffix")
    if asked is not None and told is not None and asked != told:
        raise UsageError(f"{target.name} is the name of a {told} file, and --to is {asked}", fix=f"-o {target.stem}.{asked}")
    return asked or told or ""


def check_file_target(target: Path, *, force: bool, source: Path | None = None) -> None:
    """Before any work: the name can be one, the folder exists and can be written, nothing is overwritten without --force and the source never is."""
    require_output_name(target.name)
    if target.is_dir():
        raise UsageError(f"{target} is a folder", fix="-o FILE")
    if target.is_symlink():
        raise UsageError(f"{target} is a link", fix="name the file itself, or another one")
    if (
        source is not None
        and target.exists()
        and (target.samefile(source) or (source.is_dir() and source.resolve() in target.resolve().parents))
    ):
        raise UsageError(f"{target} belongs to the model that is being converted", fix="another -o")
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is no regular file", fix="another -o")
    if target.exists() and not force:
        raise UsageError(f"{target} is already there", fix="--force, or another -o")
    if not target.parent.is_dir():
        raise ResourceError(f"the folder {target.parent} does not exist", fix=f"mkdir -p {target.parent}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ResourceError(f"{target.parent} cannot be written: {error.strerror}", fix="another -o") from error


def write_file(seat: Seat, job: Job, target: Path, kind: str) -> None:
    """The child writes into a folder beside the target; the parent moves what it wrote, the main file last: a reader that finds it finds all of it."""
    with _disk_errors(target):
        folder = Path(tempfile.mkdtemp(prefix=".gpuopt-", dir=target.parent))
    try:

        def export(s: Seat) -> Run:
            written = s.ask("export", facts.Exported, kind=kind, folder=str(folder), name=target.name)
            for name in written.files:
                check_file_target(target.parent / name, force=job.force, source=source_of(s.candidate))
            if kind == "pt2":
                consent.record(folder / target.name)  # a program of ours, written just now: its reader need not ask again
            with _disk_errors(target):
                for name in written.files:
                    (folder / name).replace(target.parent / name)
            return replace(s.run, notes=(*s.run.notes, *written.notes))

        seat.step(export)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bundle(seat: Seat, job: Job, target: Path, progress: Progress) -> None:
    """The child writes into a folder beside the target; the parent publishes it with one rename."""
    progress.update(seat.key, None, "writing the bundle")
    verified = seat.run.accuracy is not None and seat.run.accuracy.passed
    with bundle_writer.staging(target, force=job.force, source=source_of(seat.candidate)) as folder:
        saved: list[facts.Saved] = []

        def save(s: Seat) -> Run:
            saved.append(s.ask("save", facts.Saved, folder=str(folder)))
            return s.run

        seat.step(save)
        if seat.ok:
            bundle_writer.publish(
                folder, target, manifests.assemble(seat.candidate, seat.run, saved[0], verified=verified), force=job.force
            )


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{target} cannot be written: {error.strerror or error}", fix="free some space, or another -o") from error
