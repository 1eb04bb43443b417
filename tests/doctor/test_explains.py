"""A cause and its symptom: the symptom goes, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from broken import Encoder, Mlp, failing
from builders import GPU, US, evidence
from hypothesis import given
from hypothesis import strategies as st
from playing import GEMM, Played
from torch import nn

from gpuopt.core.result import Finding
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Compiled, Evidence, ModelCalls, Script
from gpuopt.doctor.rule import Rule, rules
from gpuopt.profiling import waterfall

PLACES = st.sampled_from([None, "", "layers.0", "layers.1", "layers.1.fc"])
OPS = st.sampled_from([None, "aten::mm", "cudaLaunchKernel"])


def told(subject: Evidence, *codes: str, ignore: tuple[str, ...] = ()) -> list[tuple[str, str | None]]:
    """(code, module) of what is found under these codes."""
    return sorted((f.code, f.module) for f in diagnose(subject, ignore=ignore) if f.code in codes)


def test_what_is_explained_exists_and_no_rule_explains_itself_by_way_of_others() -> None:
    table = rules()
    for code, rule in table.items():
        assert rule.explains <= set(table), code
        seen, queue = set(), list(rule.explains)
        while queue:
            symptom = queue.pop()
            assert symptom != code
            if symptom not in seen:
                seen.add(symptom)
                queue += table[symptom].explains


def rule_of(code: str, finding: Finding, explains: frozenset[str] = frozenset()) -> Rule:
    def find(_: Evidence) -> Iterator[Finding]:
        yield finding

    return replace(next(iter(rules().values())), code=code, name=code.lower(), needs=frozenset(), find=find, explains=explains)


@given(cause=st.tuples(PLACES, OPS), symptom=st.tuples(PLACES, OPS), is_explained=st.booleans())
def test_a_symptom_is_dropped_for_a_cause_at_the_same_place_alone(
    cause: tuple[str | None, str | None], symptom: tuple[str | None, str | None], is_explained: bool
) -> None:
    first, second = (Finding(code="", severity="warning", message="m", fix="f", module=m, op=o) for m, o in (cause, symptom))
    table = {"A": rule_of("A", first, frozenset({"B"} if is_explained else ())), "B": rule_of("B", second)}
    codes = [f.code for f in diagnose(Evidence(), table=table)]
    assert "A" in codes
    if (
        not is_explained
        or (symptom[0] is not None and symptom[0] != cause[0])
        or (None not in (cause[1], symptom[1]) and symptom[1] != cause[1])
    ):
        assert "B" in codes
    else:
        assert "B" not in codes


def test_a_rule_that_failed_explains_nothing() -> None:
    def find(_: Evidence) -> Iterator[Finding]:
        raise KeyError("nothing")
        yield

    symptom = rule_of("B", Finding(code="", severity="warning", message="m", fix="f"))
    table = {"A": replace(symptom, code="A", find=find, explains=frozenset({"B"})), "B": symptom}
    assert sorted(f.code for f in diagnose(Evidence(), table=table)) == ["A", "B"]
    assert [f.code for f in diagnose(Evidence(), table=table, ignore=("A",))] == ["B"]


def test_the_tensor_a_call_failed_on_is_told_once_and_others_left_behind_stay() -> None:
    one = failing(Mlp(registered=False).to("meta"), torch.ones(2, 8, device="meta"))
    assert told(one, "GPU701", "GPU103") == [("GPU701", "layers.1")]
    assert told(one, "GPU701", "GPU103", ignore=("GPU701",)) == [("GPU103", "layers.1")]
    model = Mlp(registered=False)
    del model.layers[0].scale
    model.layers[0].scale = torch.ones(8)
    assert told(failing(model.to("meta"), torch.ones(2, 8, device="meta")), "GPU701", "GPU103") == [
        ("GPU103", "layers.1"),
        ("GPU701", "layers.0"),
    ]


def test_the_float64_tensor_a_call_failed_on_is_told_once_and_others_stay() -> None:
    ids = torch.tensor([[1, 2, 3]])
    model = Encoder(frequencies=torch.linspace(0, 1, 8, dtype=torch.float64))
    assert told(failing(model, ids), "GPU702", "GPU201") == [("GPU702", "attention")]
    model.norm.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
    assert told(failing(model, ids), "GPU702", "GPU201") == [("GPU201", "norm"), ("GPU702", "attention")]
    inputs = failing(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8, dtype=torch.float64))
    assert told(inputs, "GPU702", "GPU201") == [("GPU702", "0")]
    head = failing(nn.Sequential(nn.Linear(8, 8).half(), nn.Linear(8, 8).half(), nn.Linear(8, 8)), torch.ones(2, 8).half())
    assert told(head, "GPU702", "GPU204") == [("GPU702", "2")]


def test_graphs_that_were_skipped_are_why_the_gpu_waits_for_launches() -> None:
    tape = Played()
    for _ in range(100):
        tape.run("aten::addmm", GEMM, 12 * US, host_ns=30 * US)
    tape.wait("cudaDeviceSynchronize")
    seen = evidence(tape, backend="inductor", preset="reduce-overhead", waterfall=waterfall.build(tape.trace(), tape.ms, GPU.ceilings, ()))
    skipped = replace(seen, compiled=Compiled(cudagraph_skips=("skipping cudagraphs due to mutated inputs (1 instances)",), num_graphs=1))
    codes = ("GPU404", "GPU503")
    assert told(seen, *codes) == [("GPU404", None)] and told(skipped, *codes) == [("GPU503", None)]


@pytest.mark.parametrize(("inner", "expected"), [(False, [("GPU712", "model")]), (True, [("GPU308", "body"), ("GPU712", "model")])])
def test_a_wrapper_seen_in_the_script_and_in_the_tree_is_one(inner: bool, expected: list[tuple[str, str]]) -> None:
    net = nn.DataParallel(nn.Linear(4, 4).eval())
    calls = ModelCalls(name="model", module_class="Net", num_calls=9, wall_s=1.0, line="infer.py:20", is_data_parallel=True)
    seen = evidence(module=nn.ModuleDict({"body": net}) if inner else net, script=Script(modules=(calls,)))
    assert told(seen, "GPU308", "GPU712") == expected
