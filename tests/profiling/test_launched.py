"""Kernels of compiled code and CUDA graphs get their modules: on cuts of real runs (H200, torch 2.11), and on made-up ones."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt.core.launches import Launch
from gpuopt.core.result import Count, OpRecord
from gpuopt.core.trace import CpuOp, Kernel, Step, Trace
from gpuopt.profiling import attribute, launched
from gpuopt.programs import generated

DATA = Path(__file__).parent / "data" / "attribution"
NOTHING = Count(records=(), flops=0.0, flops_by_dtype={}, bytes=0.0, coverage=0.0, method="not counted")
COMPILED = [f"{model}-{mode}" for model in ("bert", "resnet", "llama") for mode in ("ind1", "ind2", "ro")]
GRAPHS = ["bert-cg", "resnet-cg", "llama-cg"]


def read(case: str) -> Any:
    """One step of a run: kernels as [name, ns, ops around it, is replayed], the wrapper's launch lines, the graph's nodes as [name, target, source, module, line, inputs, origin]."""
    with gzip.open(DATA / f"{case}.json.gz", "rt") as file:
        return json.load(file)


def trace_of(cut: Any, *, with_ops: bool = True, modules: Any = None) -> Trace:
    """`modules`: op's index -> module, for a trace with ranges."""
    ops: dict[int, CpuOp] = {}
    kernels = []
    for at, (name, dur, chain, is_replay) in enumerate(cut["kernels"]):
        for place, op in enumerate(chain):
            parent = chain[place + 1] if place + 1 < len(chain) else None
            ops[op] = CpuOp(
                index=op, name=cut["ops"][op], start_ns=at, dur_ns=1, self_ns=1, num_children=0, thread="t", parent=parent,
                module=modules(op) if modules else None, step=0,
            )  # fmt: skip
        kernels.append(
            Kernel(
                name=cut["names"][name], start_ns=at, dur_ns=dur, stream=7, correlation=at, step=0,
                op=chain[0] if chain and with_ops else None, graph_id=1 if is_replay else None,
            )
        )  # fmt: skip
    return Trace(device="cuda:0", steps=(Step(start_ns=0, dur_ns=10**9),), kernels=tuple(kernels), ops=tuple(ops[i] for i in sorted(ops)))


def graph_of(cut: Any) -> generated.Generated:
    # A cut keeps the innermost module of each node, and apart from it all that ran, in a node of its own that no kernel stems from.
    ran = tuple((generated.qualified(path), generated.class_name(kind)) for path, kind in cut["ran"])
    nodes = [generated.Node(name="__ran__", op="aten.view", source="__ran__", stack=ran, line="")]
    for name, target, source, stack, line, inputs, origin in cut["nodes"]:
        nodes.append(
            generated.Node(
                name=name, op=generated.op_name(target), source=source, line=line, inputs=tuple(inputs), origin=origin,
                stack=tuple((generated.qualified(path), generated.class_name(kind)) for path, kind in stack),
            )
        )  # fmt: skip
    return generated.Generated(code=cut["code"], nodes=tuple(nodes))


def launches_of(case: str) -> tuple[Launch, ...]:
    return generated.launches([graph_of(read(case))])


def share(records: tuple[OpRecord, ...]) -> float:
    total = math.fsum(r.time_ns or 0.0 for r in records)
    return math.fsum(r.time_ns or 0.0 for r in records if r.module != "?") / total


@pytest.mark.parametrize("case", COMPILED)
def test_at_least_nine_tenths_of_a_compiled_models_kernel_time_have_a_module(case: str) -> None:
    found = read(case)
    records = attribute.attribute(trace_of(found["trace"]), NOTHING, launches=launches_of(case))
    assert share(records) >= 0.99
    assert math.fsum(r.time_ns or 0.0 for r in records) == sum(k[1] for k in found["trace"]["kernels"])
    lines = math.fsum(r.time_ns or 0.0 for r in records if r.line) / math.fsum(r.time_ns or 0.0 for r in records)
    assert lines >= 0.99


def test_a_package_whose_trace_tells_no_ops_is_attributed_by_order_alone() -> None:
    # The same model compiled: AOTInductor generates the same kernels.
    records = attribute.attribute(trace_of(read("bert-aoti")["trace"]), NOTHING, launches=launches_of("bert-ind1"))
    assert share(records) >= 0.99


@pytest.mark.parametrize("case", GRAPHS)
def test_at_least_nine_tenths_of_a_replays_kernel_time_have_a_module(case: str) -> None:
    found = read(case)
    twin = trace_of(found["twin"], modules=lambda op: f"part.{op}")
    records = attribute.attribute(trace_of(found["trace"]), NOTHING, twin=twin)
    assert share(records) >= 0.94
    assert share(attribute.attribute(trace_of(found["trace"]), NOTHING)) == 0.0


@pytest.mark.parametrize("case", [c for c in COMPILED if not c.endswith("ro")])
def test_order_alone_finds_what_the_ops_around_a_kernel_say(case: str) -> None:
    found, launches = read(case), launches_of(case)
    with_ops = launched.by_launch(trace_of(found["trace"]), launches)
    without = launched.by_launch(trace_of(found["trace"], with_ops=False), launches)
    wrong = {at for at, launch in without.items() if with_ops.get(at) != launch}
    assert not wrong
    assert len(without) >= 0.98 * len(with_ops)


@pytest.mark.parametrize("case", [c for c in COMPILED if not c.endswith("ro")])
def test_a_kernel_goes_to_a_launch_of_its_own_op(case: str) -> None:
    found, launches = read(case), launches_of(case)
    trace = trace_of(found["trace"])
    for at, launch in launched.by_launch(trace, launches).items():
        chain = [op.name for op in trace.chain(trace.kernels[at].op)]
        if launches[launch].kind == "triton":
            assert trace.kernels[at].name == launches[launch].name
        else:
            assert launched.canonical(launches[launch].name) in [launched.formulas.canonical(name) for name in chain]


def test_fused_kernels_go_where_their_rule_says() -> None:
    of = {
        model: {(la.name.partition("_fused")[2], la.home) for la in launches_of(f"{model}-ind1")} for model in ("bert", "resnet", "llama")
    }
    assert ("_add_native_layer_norm_view_2", "encoder.layer.0.attention.output") in of["bert"]
    assert ("_gelu_view_3", "encoder.layer.1.intermediate.intermediate_act_fn") in of["bert"]
    # The mask is made once, by the root, for all layers.
    assert [home for name, home in of["bert"] if "scaled_dot_product" in name] == [""]
    assert ("__native_batch_norm_legit_no_training_relu_2", "resnet.encoder.stages.0.layers.0.layer.0") in of["resnet"]
    assert ("__native_batch_norm_legit_no_training_add_relu_3", "resnet.encoder.stages.0.layers.0") in of["resnet"]
    # The sum that ends a layer is computed with the norm that begins the next one.
    assert any("mean_mul_pow_rsqrt" in name and home == "model.layers.2.input_layernorm" for name, home in of["llama"])
    assert any("scaled_dot_product" in name and home == "model.layers.1.self_attn" for name, home in of["llama"])
    assert not any(home == "model.layers" for _, home in of["llama"])  # a list runs nothing


def test_products_carry_the_flops_of_their_modules_count() -> None:
    launches = launches_of("bert-ind1")
    products = [la.home or "" for la in launches if la.name == "extern_kernels.addmm"]
    records = tuple(
        OpRecord(op="aten.addmm", module=m, dtype="float16", flops=1e9, bytes=1e6, shapes="1", line="own.py:1") for m in products
    )
    records += tuple(
        OpRecord(op="aten._scaled_dot_product_flash_attention_for_cpu", module=la.home or "", flops=5e8, bytes=1.0)
        for la in launches
        if "attention" in la.name and la.kind == "extern"
    )
    counted = replace(NOTHING, records=records)
    found = attribute.attribute(trace_of(read("bert-ind1")["trace"]), counted, launches=launches)
    assert math.fsum(r.flops or 0.0 for r in found) == math.fsum(r.flops or 0.0 for r in records)
    assert attribute.coverage(found) == pytest.approx(1.0)
    query = next(r for r in found if r.module == "encoder.layer.0.attention.self.query")
    assert (query.op, query.dtype, query.count, query.line) == ("aten.addmm", "float16", 1, "modeling_bert.py:175")
    attention = next(r for r in found if r.module == "encoder.layer.2.attention.self")
    assert attention.op == "aten._scaled_dot_product_cudnn_attention" and attention.flops == 5e8


def test_flops_are_unknown_where_a_step_lacks_one_of_a_modules_products() -> None:
    cut = read("bert-ind1")["trace"]
    first = next(at for at, k in enumerate(cut["kernels"]) if cut["names"][k[0]].startswith("nvjet"))
    counted = replace(
        NOTHING,
        records=tuple(OpRecord(op="aten.addmm", module=la.home or "", flops=1.0) for la in launches_of("bert-ind1") if "addmm" in la.name),
    )
    both = trace_of(cut)
    later = [replace(k, step=1, start_ns=k.start_ns + 10**6) for at, k in enumerate(both.kernels) if at != first]
    two = replace(both, steps=both.steps * 2, kernels=(*both.kernels, *later))
    records = attribute.attribute(two, counted, launches=launches_of("bert-ind1"))
    flops = {r.module: r.flops for r in records if r.op == "aten.addmm"}
    assert flops["encoder.layer.1.attention.self.query"] == 1.0
    assert flops["encoder.layer.0.attention.self.query"] is None


def test_the_module_tree_of_a_compiled_run_has_times() -> None:
    cut = read("resnet-ro")
    records = attribute.attribute(trace_of(cut["trace"]), NOTHING, launches=launches_of("resnet-ro"))
    tree = {row.name: row for row in attribute.modules(records, NOTHING)}
    assert (tree["resnet.encoder.stages.2"].time_ns or 0) > (tree["resnet.encoder.stages.3"].time_ns or 0) > 0
    assert tree[""].time_ns == sum(k[1] for k in cut["trace"]["kernels"])


def test_copies_into_a_graphs_inputs_belong_to_no_launch() -> None:
    cut = read("resnet-ro")
    records = attribute.attribute(trace_of(cut["trace"]), NOTHING, launches=launches_of("resnet-ro"))
    assert {r.op for r in records if r.module == "?"} == {"aten._foreach_copy_"}
    names = Counter(k for r in records if r.module == "resnet.embedder.embedder.convolution" for k in r.kernels)
    assert any("nhwcAddPadding" in name for name in names) and "Memset (Device)" in names


def test_ops_of_a_cpu_between_generated_code_are_attributed() -> None:
    launches = tuple(
        Launch(name="extern_kernels.addmm", kind="extern", modules=(m,), lines=(f"m.py:{i}",), ops=("aten.addmm",))
        for i, m in enumerate("ab")
    )
    ops = []
    for at, (name, parent) in enumerate([("aten::addmm", None), ("aten::expand", 0), ("aten::relu", None), ("aten::addmm", None)]):
        ops.append(
            CpuOp(index=at, name=name, start_ns=at, dur_ns=5, self_ns=5, num_children=0, thread="t", parent=parent, module=None, step=0)
        )
    found = attribute.attribute(Trace(device="cpu", steps=(Step(start_ns=0, dur_ns=99),), ops=tuple(ops)), NOTHING, launches=launches)
    assert {(r.module, r.op, r.time_ns) for r in found} == {("a", "aten.addmm", 10.0), ("b", "aten.addmm", 5.0), ("?", "aten.relu", 5.0)}
