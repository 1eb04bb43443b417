"""The error tree is an interface: exit codes and ids."""

from __future__ import annotations

import pytest

from gpuopt.core import errors

EXITS = {
    "GpuoptError": 70,
    "UsageError": 2,
    "BadInput": 3,
    "Untrusted": 3,
    "Unavailable": 4,
    "Unsupported": 4,
    "ResourceError": 5,
    "OutOfMemory": 5,
    "TimedOut": 5,
    "GateFailed": 1,
}


@pytest.mark.parametrize(("name", "code"), EXITS.items())
def test_an_error_has_its_exit_code(name: str, code: int) -> None:
    assert errors.error_types()[name].exit_code == code


def test_ids_are_unique_and_of_the_documented_form() -> None:
    known = [cls for cls in errors.error_types().values() if cls.__module__ == "gpuopt.core.errors"]
    ids = [cls.error_id for cls in known]
    assert len(set(ids)) == len(ids) == len(EXITS)
    assert all(text.startswith("GPO") and text[3:].isdigit() and len(text) == 6 for text in ids)


def test_an_error_says_what_happened_and_what_to_do() -> None:
    error = errors.BadInput("input 'x' has no shape", fix="--input x:float32[8]")
    assert (str(error), error.message, error.fix) == ("input 'x' has no shape", "input 'x' has no shape", "--input x:float32[8]")
