"""Wrappers of Inductor, Python's and C++'s, -> launches with their modules and lines."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch._inductor.graph import GraphLowering

from gpuopt.programs import generated, inductor, stack_line
from gpuopt.programs.weigh import tally_for

PYTHON = """
triton_poi_fused_relu_0 = async_compile.triton('triton_poi_fused_relu_0', '''
# Topologically Sorted Source Nodes: [relu], Original ATen: [aten.relu]
def triton_poi_fused_relu_0(in_ptr0): pass
''', device_str='cuda')
mine_1 = async_compile.triton('mine', '''
''', device_str='cuda')

def partition_0(args):
    # Topologically Sorted Source Nodes: [linear], Original ATen: [aten.view, aten.t, aten.addmm]
    # [Provenance debug handles] extern_kernels.addmm:2
    extern_kernels.addmm(arg1, reinterpret_tensor(arg0, (4, 4), (4, 1), 0), out=buf0)
    # Topologically Sorted Source Nodes: [relu], Original ATen: [aten.relu]
    stream0 = get_raw_stream(0)
    triton_poi_fused_relu_0.run(buf0, buf1, 4, stream=stream0)
    return (buf1, )

async_compile.wait(globals())

class Runner:
    def call(self, args):
        arg0, arg1 = args
        # Topologically Sorted Source Nodes: [sort], Original ATen: [aten.sort]
        buf9 = torch.ops.aten.sort.stable(arg0, stable=False)
        (buf1,) = self.partitions[0](partition0_args)
        mine_1.run(buf1, stream=stream0)
        # Topologically Sorted Source Nodes: [linear_1], Original ATen: [aten.mm]
        buf2 = extern_kernels.mm(buf1, arg1)
        return (buf2, )

runner = Runner(partitions=[partition_0,])
call = runner.call

def benchmark_compiled_module(times=10):
    triton_poi_fused_relu_0.run(buf0, buf1, 4, stream=stream0)
"""

CPP = """
template <typename in_ptr0_type_>
static inline void call_triton_poi_fused_relu_0(const in_ptr0_type_& in_ptr0, int32_t device_idx_) {
    launchKernel(kernels_.triton_poi_fused_relu_0, grid_0);
}
void AOTInductorModel::run_impl(
    AtenTensorHandle* input_handles
) {
    // Topologically Sorted Source Nodes: [linear], Original ATen: [aten.addmm]
    static constexpr int64_t int_array_0[] = {8L, 32L};
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, int_array_0, &buf0_handle));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(buf0, bias, wrap(arg0), 1L, 1L));
    // Topologically Sorted Source Nodes: [relu], Original ATen: [aten.relu]
    call_triton_poi_fused_relu_0(buf0, buf1, 4L, this->device_idx_, stream, kernels, this->cubin_dir_);
    // Topologically Sorted Source Nodes: [attn], Original ATen: [aten._scaled_dot_product_flash_attention]
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_dot_product_flash_attention(buf1, buf1, buf1));
} // AOTInductorModel::run_impl
"""


def test_a_python_wrapper_is_read_in_the_order_it_runs() -> None:
    found = [(call.kind, call.name, call.sources) for call in generated.calls(PYTHON)]
    assert found == [
        ("extern", "aten.sort", ("sort",)),
        ("extern", "extern_kernels.addmm", ("linear",)),
        ("triton", "triton_poi_fused_relu_0", ("relu",)),
        ("triton", "mine", ()),
        ("extern", "extern_kernels.mm", ("linear_1",)),
    ]


def test_a_cpp_wrapper_is_read_alike() -> None:
    found = [(call.kind, call.name, call.sources) for call in generated.calls(CPP)]
    assert found == [
        ("extern", "addmm", ("linear",)),
        ("triton", "triton_poi_fused_relu_0", ("relu",)),
        ("extern", "_scaled_dot_product_flash_attention", ("attn",)),
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].encoder.layer.0.attention", "encoder.layer.0.attention"),
        ("L['self'].layer[3].mlp", "layer.3.mlp"),
        ("L['self']._modules['layer']._modules['0']", "layer.0"),
        ("getattr(getattr(L['self'].layers, '0'), 'conv')", "layers.0.conv"),
        ("blocks.0.a", "blocks.0.a"),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_paths_become_names_of_named_modules(path: str, name: str) -> None:
    assert generated.qualified(path) == name


def test_classes_are_named_by_their_last_part() -> None:
    assert generated.class_name(torch.nn.Linear) == "Linear"
    assert (
        generated.class_name("<class 'torch.nn.modules.linear.Linear'>")
        == generated.class_name("torch.nn.modules.linear.Linear")
        == "Linear"
    )


def test_the_line_is_the_models_not_a_tools() -> None:
    stack = (
        'File "/v/site-packages/transformers/bert.py", line 9, in forward\n  x\nFile "/v/site-packages/transformers/bert.py", line 20, in helper\n'
        '  y\nFile "/v/site-packages/transformers/sdpa.py", line 3, in attend\n  z\nFile "/v/site-packages/torch/nn/linear.py", line 1, in forward\n  w\n'
    )
    assert stack_line.line_of(stack) == "bert.py:20"
    assert stack_line.line_of('File "/opt/torch/app/net.py", line 4, in run\n') == "net.py:4"
    assert stack_line.line_of("") == ""


def node(name: str, op: str, module: str | None, *, source: str = "", inputs: tuple[str, ...] = (), kind: str = "M") -> generated.Node:
    stack = ((module, kind),) if module else ()
    return generated.Node(name=name, op=op, source=source or name, stack=stack, line=f"{name}.py:1", inputs=inputs)


def only(call: str, nodes: list[generated.Node], classes: Any = None) -> Any:
    sources = ", ".join(dict.fromkeys(n.source for n in nodes if n.source != "__"))
    code = f"def call(args):\n    # Topologically Sorted Source Nodes: [{sources}], Original ATen: [aten.x]\n    {call}(buf0)\n"
    return generated.launches([generated.Generated(code=code, nodes=tuple(nodes))], classes)[0]


RAN = generated.Node(
    name="r",
    op="aten.view",
    source="__",
    line="",
    stack=tuple((m, "M") for m in ("a", "a.norm", "a.b.c.d", "b.0.x.y", "b.1.x.y", "b.0", "b.1")),
)


def test_a_fused_kernel_goes_to_the_parent_of_its_ops() -> None:
    found = only("triton_red_fused_add_0.run", [RAN, node("add", "aten.add", "a"), node("ln", "aten.mul", "a.norm", inputs=("add",))])
    assert (found.home, found.modules, found.lines) == ("a", ("a", "a.norm"), ("add.py:1", "ln.py:1"))


def test_a_fused_kernel_goes_no_further_up_than_the_next_layer() -> None:
    nodes = [RAN, node("add", "aten.add", "b.0"), node("ln", "aten.mul", "b.1.x.y", inputs=("add",))]
    found = only("triton_red_fused_add_0.run", nodes)
    assert found.home == "b.1.x.y" and found.lines == ("add.py:1", "ln.py:1")


def test_a_list_of_layers_is_nobodys_place() -> None:
    nodes = [RAN, node("p", "aten.mul", "b.0"), node("q", "aten.mul", "b.1")]  # two outputs: neither reads the other
    assert only("triton_poi_fused_mul_0.run", nodes).home == ""


def test_the_root_has_what_its_own_forward_computes() -> None:
    found = only("triton_poi_fused_mul_0.run", [RAN, node("mask", "aten.ge", None), node("mul", "aten.mul", "a", inputs=("mask",))])
    assert found.home == ""


def test_a_product_goes_to_its_own_module_whatever_it_reads() -> None:
    nodes = [RAN, node("gelu", "aten.mul", "a"), node("mm", "aten.mm", "b.0.x.y", inputs=("gelu",))]
    assert only("extern_kernels.mm", nodes).home == "b.0.x.y"
    assert only("triton_tem_fused_mm_0.run", nodes).home == "b.0.x.y"


def test_what_the_compiler_made_itself_belongs_to_nobody() -> None:
    bare = generated.Node(name="n", op="aten.clone", source="n", stack=(), line="")
    found = only("triton_poi_fused_clone_0.run", [RAN, bare])
    assert (found.home, found.modules) == (None, ())


CLASSES = {"": "Net", "a": "A", "a.x": "X", "b": "B", "b.x": "X", "b.y": "Y"}


def test_a_graph_behind_a_break_is_found_where_only_one_place_fits() -> None:
    graph = [node("n", "aten.mul", "x", kind="X"), node("m", "aten.add", "y", kind="Y", inputs=("n",))]
    assert only("triton_poi_fused_mul_0.run", graph, CLASSES).modules == ("b.x", "b.y")


def test_a_graph_that_fits_two_places_is_left_open() -> None:
    assert only("triton_poi_fused_mul_0.run", [node("n", "aten.mul", "x", kind="X")], CLASSES).home is None


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.norm(self.up(x))))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


PRODUCTS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def test_reading_is_put_back_as_it_was_even_when_the_compile_fails() -> None:
    before = GraphLowering.codegen
    with pytest.raises(ZeroDivisionError), inductor.reading([]):
        assert GraphLowering.codegen is not before
        raise ZeroDivisionError
    assert GraphLowering.codegen is before


class Lowered:
    """As much of a GraphLowering as is read."""

    is_const_graph = False

    def __init__(self, name: str | None, code: str) -> None:
        self.name, self.code = name, code
        self.module = torch.fx.GraphModule({}, torch.fx.Graph())


def test_graphs_that_autotuning_tries_are_no_part_of_the_call_and_one_generated_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphLowering, "codegen", lambda graph: (types.SimpleNamespace(value=graph.code), None))
    outer: list[generated.Generated] = []
    inner: list[generated.Generated] = []
    twice = Lowered(None, "first")
    with inductor.reading(outer):
        for graph in (Lowered("benchmark_decompose_k_mm_3", "tried"), twice):
            GraphLowering.codegen(graph)
        twice.code = "second"
        with inductor.reading(inner):
            GraphLowering.codegen(Lowered("sub", "other"))
            GraphLowering.codegen(twice)
    assert [told.code for told in outer] == ["second", "other"]
    assert [told.code for told in inner] == ["other", "second"]


@pytest.mark.parametrize("is_exported", [False, True])
def test_a_compiled_model_says_what_it_launches(is_exported: bool) -> None:
    net, x = Net().eval(), torch.randn(4, 16)
    module = torch.export.export(net, (x,), strict=False).module() if is_exported else net
    found: list[generated.Generated] = []
    torch._dynamo.reset()
    with torch.no_grad(), inductor.reading(found):
        torch.compile(module, options={"post_grad_custom_post_pass": inductor.GraphReader(tally_for("cpu"))})(x)
    launches = generated.launches(found, inductor.class_names(module))
    products = [launch for launch in launches if launch.kind == "extern"]
    assert [launch.home for launch in products] == PRODUCTS
    assert all(line.startswith("test_generated.py:") for launch in products for line in launch.lines)
    assert all(launch.lines for launch in products)
