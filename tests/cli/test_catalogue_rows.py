"""Row of the catalogue of bad inputs -> the tests that prove it. A row whose tests were renamed, removed or marked away fails here.

Rows about files are those of tests/attacks/corpus.py, each of which goes through the whole command. Row 39 (graphs that never end) belongs to the
child's timeout: tests/pipeline. Rows from 66 on are about faults while it runs, not about inputs.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("cli_catalogue", Path(__file__).with_name("catalogue.py"))
assert _spec is not None and _spec.loader is not None
shared: Any = sys.modules.get("cli_catalogue")
if shared is None:
    shared = sys.modules["cli_catalogue"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(shared)

ROWS = tuple(row for row in range(1, 66) if row != 39)

FILES = "cli/test_catalogue.py"
MACHINE = "cli/test_catalogue_machine.py"

ALL_HOSTILE = f"{FILES}::test_a_hostile_file_ends_with_the_exit_code_of_its_row"
FLIPPED = f"{FILES}::test_4_28_43_a_flipped_byte_of_a_bundle_is_3"
GIGABYTES = f"{FILES}::test_33_and_37_gigabytes_of_onnx_are_refused_at_once_and_without_memory"
UNFIT = f"{FILES}::test_20_21_weights_that_do_not_fit_the_architecture_are_3"
ELSEWHERE = f"{FILES}::test_27_41_42_a_bundle_built_for_something_else_is_4_and_names_both"
SIZES = f"{FILES}::test_29_57_sizes_a_bundle_was_not_built_for_are_2"
LIES = f"{FILES}::test_52_53_54_56_a_candidate_that_lies_is_named_for_it_and_never_ranked"
INPUTS = f"{FILES}::test_57_to_60_inputs_that_cannot_be_are_told"
LINE = f"{FILES}::test_57_to_65_what_is_wrong_with_the_command_line_is_told_before_any_work"
PROCESSES = f"{FILES}::test_7_18_a_row_of_each_kind_in_processes_of_its_own"
MACHINE_PROCESSES = f"{MACHINE}::test_46_47_the_machine_is_told_in_processes_of_its_own"
AOTI_INPUTS = "backends/test_aoti.py::test_a_wrong_input_is_an_error_and_never_an_answer"

TESTS: dict[int, tuple[str, ...]] = {
    4: (FLIPPED, "attacks/test_corpus.py::test_a_flipped_byte_changes_the_hash_that_was_trusted"),
    6: ("attacks/test_corpus.py::test_the_payloads_are_live",),
    7: (PROCESSES, "attacks/test_corpus.py::test_neither_optimisation_nor_a_hostile_environment_opens_the_gate"),
    18: (PROCESSES,),
    20: (UNFIT,),
    21: (UNFIT,),
    22: ("attacks/test_corpus.py::test_the_payloads_are_live",),
    23: ("attacks/test_corpus.py::test_the_payloads_are_live",),
    24: ("attacks/test_corpus.py::test_the_payloads_are_live",),
    27: (ELSEWHERE, "trust/test_gate.py::test_a_package_for_another_machine_is_unavailable_before_consent_is_asked"),
    28: (FLIPPED, "bundles/test_read.py::test_a_flipped_byte_is_found_by_hash"),
    29: (SIZES, AOTI_INPUTS),
    30: (AOTI_INPUTS, "backends/test_contract.py::test_eagers_answer_or_an_error"),
    33: (GIGABYTES,),
    37: (GIGABYTES,),
    41: (ELSEWHERE, "trust/test_gate.py::test_a_plan_the_library_refuses_is_unavailable"),
    42: (
        ELSEWHERE,
        "bundles/test_read.py::test_a_bundle_for_another_gpu_is_unavailable_before_it_is_untrusted",
        "backends/test_trt_runner.py::test_an_engine_runs_only_where_its_facts_say",
    ),
    43: (FLIPPED,),
    44: (
        f"{MACHINE}::test_44_the_cuda_provider_asked_of_the_cpu_wheel_is_4",
        f"{MACHINE}::test_44_nor_is_it_a_cpu_session_on_a_gpu",
        "backends/ort/test_runner.py::test_a_session_that_fell_to_the_cpu_is_unavailable",
    ),
    45: (
        f"{MACHINE}::test_45_a_gpu_asked_of_a_torch_without_cuda_is_4",
        f"{MACHINE}::test_45_a_gpu_asked_of_a_machine_without_one_is_4",
    ),
    46: (
        f"{MACHINE}::test_46_a_cuda_visible_devices_that_shows_no_gpu_is_4_and_is_named",
        f"{MACHINE}::test_46_an_index_that_is_not_there_is_4",
        MACHINE_PROCESSES,
    ),
    47: (
        f"{MACHINE}::test_47_a_gpu_that_this_torch_has_no_code_for_is_4_before_anything_runs",
        f"{MACHINE}::test_47_a_driver_too_old_is_4_with_both_versions",
        MACHINE_PROCESSES,
    ),
    48: (
        f"{MACHINE}::test_48_a_package_that_is_not_installed_is_4_and_names_its_extra",
        f"{MACHINE}::test_48_a_backend_that_cannot_is_told",
    ),
    49: (f"{MACHINE}::test_49_a_package_that_is_there_and_does_not_import_is_4",),
    50: (
        f"{MACHINE}::test_50_a_placeholder_is_4_with_what_is_wanted",
        f"{MACHINE}::test_50_a_version_too_old_is_4_with_both_versions",
    ),
    51: (
        f"{MACHINE}::test_51_a_precision_that_the_gpu_lacks_is_4_with_the_capability_it_needs",
        f"{MACHINE}::test_51_among_candidates_it_is_unsupported_with_its_reason",
        f"{MACHINE}::test_51_one_that_can_still_wins",
    ),
    52: (LIES,),
    53: (LIES, "pipeline/test_session.py::test_a_lie_on_one_input_alone_is_found"),
    54: (LIES, "pipeline/test_session.py::test_a_lie_is_found_and_called_by_its_name"),
    55: (
        f"{FILES}::test_55_a_model_in_training_mode_is_run_in_eval_mode_and_says_so",
        "pipeline/test_stress.py::test_55_a_model_that_is_not_at_one_with_itself_verifies_nothing",
        "pipeline/test_session.py::test_a_lie_is_found_and_called_by_its_name",
    ),
    56: (
        LIES,
        "pipeline/test_session.py::test_honest_models_that_write_into_their_inputs_pass_and_say_so",
        "pipeline/test_stress.py::test_56_inputs_changed_on_a_later_batch_alone_are_noticed",
        "pipeline/test_stress.py::test_56_outputs_that_the_next_call_overwrites_are_compared_as_they_were_returned",
    ),
    57: (INPUTS, LINE, SIZES),
    58: (
        INPUTS,
        f"{FILES}::test_58_a_batch_of_zero_is_a_usage_error_and_an_empty_tensor_is_defined",
        "loaders/test_inputs.py::test_empty_and_scalar_inputs_are_allowed",
    ),
    59: (INPUTS, "loaders/test_inputs.py::test_a_huge_shape_is_a_resource_error_before_anything_is_allocated"),
    60: (INPUTS, LINE, f"{FILES}::test_60_a_wrong_rank_size_or_dtype_is_2_whatever_runs_it"),
    61: (
        f"{FILES}::test_61_control_flow_that_depends_on_data_is_unsupported_with_its_reason",
        "pipeline/test_stress.py::test_61_code_frozen_on_one_branch_is_found_at_another_scale",
    ),
    62: (f"{FILES}::test_62_a_name_that_is_none_is_2", LINE),
    63: (LINE, "pipeline/test_recipe.py::test_what_cannot_be_meant_is_refused_with_its_key_and_line"),
    64: (LINE, "bundles/test_write.py::test_a_real_unwritable_file_system_is_a_resource_error"),
    65: (LINE, "bundles/test_write.py::test_what_is_not_ours_is_never_touched"),
}
"""What proves a row, beside the hostile files."""

NOT_BY_COMMAND = frozenset({30})
"""A bundle makes its own inputs, so no command line gives it others: an API's caller can, and the runner itself refuses them."""

HOSTILE = {row for row, _, _ in shared.corpus.CASES.values()}
LEFT_OUT = {"gpu", "multi_gpu", "net", "slow", "skip", "xfail"}
"""Marks of tests that a plain run does not take, or does not hold to their word."""


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def numbers(name: str) -> set[int]:
    """Rows that a test's name speaks of: test_57_to_60_…, test_27_41_42_…"""
    match = re.match(r"test_((?:\d+_(?:to_|and_)?)+)", name)
    if match is None:
        return set()
    found: set[int] = set()
    for part in re.findall(r"(\d+)_to_(\d+)|(\d+)", match[1]):
        found |= set(range(int(part[0]), int(part[1]) + 1)) if part[0] else {int(part[2])}
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test_that_is_there_and_runs(row: int) -> None:
    tests = [*TESTS.get(row, ()), *([ALL_HOSTILE] if row in HOSTILE else [])]
    assert tests, f"row {row} is proved by nothing"
    for test in tests:
        file, _, name = test.partition("::")
        found = functions(shared.TESTS / file).get(name)
        assert found is not None, f"{test} is gone"
        marks = {m for d in found.decorator_list for m in re.findall(r"mark\.(\w+)", ast.unparse(d))}
        assert not marks & LEFT_OUT, f"{test} does not run everywhere"
    assert row in NOT_BY_COMMAND or any(test.startswith("cli/") for test in tests), f"no command line proves row {row}"


def test_no_other_row_is_in_the_table() -> None:
    assert set(TESTS) | HOSTILE <= set(ROWS)


def test_every_test_of_the_catalogue_is_in_the_table_under_the_rows_of_its_name() -> None:
    """Written down once in the name, once in the table: neither can drift alone."""
    for file in (FILES, MACHINE):
        for name in functions(shared.TESTS / file):
            for row in numbers(name):
                if row in (58, 59, 60) and file == FILES and name in (INPUTS.partition("::")[2], LINE.partition("::")[2]):
                    continue  # a range of rows, of which the cases say which
                listed = TESTS.get(row, ())
                assert any(test.startswith(f"{file}::test_{row}_") or test == f"{file}::{name}" for test in listed), f"{name}: row {row}"


def cases(test: str) -> set[int]:
    """Rows that the parametrised cases of a test begin with."""
    file, _, name = test.partition("::")
    lists = [node for d in functions(shared.TESTS / file)[name].decorator_list for node in ast.walk(d) if isinstance(node, ast.List)]
    plain = [e.value if isinstance(e, ast.Starred) else e for found in lists for e in found.elts]
    tuples = [e.elt if isinstance(e, ast.GeneratorExp) else e for e in plain]
    firsts = [e.elts[0] for e in tuples if isinstance(e, ast.Tuple)]
    return {first.value for first in firsts if isinstance(first, ast.Constant) and isinstance(first.value, int)}


def test_a_row_under_a_test_of_several_rows_has_a_case_of_its_own_there() -> None:
    for test in (INPUTS, LINE, UNFIT, ELSEWHERE, PROCESSES, MACHINE_PROCESSES):
        listed = {row for row, tests in TESTS.items() if test in tests}
        assert listed and listed <= cases(test), test
        assert cases(test) <= numbers(test.partition("::")[2]), test
