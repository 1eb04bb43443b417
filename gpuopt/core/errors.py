"""What went wrong -> one sentence, one remedy, one exit code.

    GpuoptError                 exit
    ├── UsageError               2    the command line, the recipe or the inputs do not fit
    ├── BadInput                 3    a file is corrupt, unsupported or not what it says it is
    │   └── Untrusted            3    a file would run code nobody has consented to
    ├── Unavailable              4    a package, driver, device or version is missing here
    │   └── Unsupported          4    this form × backend × precision cannot be
    ├── ResourceError            5    memory, disk, time or a port ran out
    │   ├── OutOfMemory          5
    │   └── TimedOut             5
    └── GateFailed               1    a verdict against the model

Every other exception is a bug of ours: it keeps its traceback and exits 70.
"""

from __future__ import annotations


class GpuoptError(Exception):
    """Something the user can act on: `message` says what happened, `fix` what to do."""

    exit_code = 70
    error_id = "GPO000"

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class UsageError(GpuoptError):
    """The command line, the recipe or the inputs do not fit the model."""

    exit_code = 2
    error_id = "GPO100"


class BadInput(GpuoptError):
    """A file is corrupt, unsupported, or not what its name says."""

    exit_code = 3
    error_id = "GPO200"


class Untrusted(BadInput):
    """Loading the file would run code that nobody has consented to."""

    error_id = "GPO210"


class Unavailable(GpuoptError):
    """A package, a driver, a device or a version is missing on this machine."""

    exit_code = 4
    error_id = "GPO300"


class Unsupported(Unavailable):
    """This combination of form, backend, precision and device cannot be, here or anywhere."""

    error_id = "GPO310"


class ResourceError(GpuoptError):
    """Memory, disk, time or a port ran out."""

    exit_code = 5
    error_id = "GPO400"


class OutOfMemory(ResourceError):
    """Device or host memory ran out."""

    error_id = "GPO410"


class TimedOut(ResourceError):
    """A child did not end within its limit and was killed."""

    error_id = "GPO420"


class GateFailed(GpuoptError):
    """A gate (accuracy, latency, throughput, regression) was missed."""

    exit_code = 1
    error_id = "GPO500"


def error_types() -> dict[str, type[GpuoptError]]:
    """Class name -> class, for errors that cross a process as JSON."""
    found: dict[str, type[GpuoptError]] = {}
    queue: list[type[GpuoptError]] = [GpuoptError]
    while queue:
        cls = queue.pop()
        found[cls.__name__] = cls
        queue.extend(cls.__subclasses__())
    return found
