"""Really broken models: the module, the line and the tensor that broke them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import broken
import pytest
import torch
from broken import Encoder, Images, Mlp, Positional, failing, raised
from builders import evidence
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gpuopt.core.errors import BadInput
from gpuopt.core.live import Inputs
from gpuopt.core.result import Finding
from gpuopt.doctor import failure
from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.evidence import Evidence
from gpuopt.doctor.rule import rules

CODES = frozenset(code for code in rules() if "GPU701" <= code <= "GPU706")
CUDA_INDEX = (
    "Expected all tensors to be on the same device, but got index is on cpu, different from other tensors on cuda:0 "
    "(when checking argument in method wrapper_CUDA__index_select)"
)


def diagnosis(subject: Evidence) -> Finding:
    """The one finding about the failure."""
    (found,) = [f for f in diagnose(subject) if f.code in CODES]
    assert found.severity == "error" and "rule failed" not in found.message
    return found


def line_of(cls: type, text: str) -> str:
    """`broken.py:50` of the line of a class that holds a text."""
    lines, first = inspect.getsourcelines(cls)
    return f"{Path(inspect.getfile(cls)).name}:{first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!", "device"),
        ("Expected all tensors to be on the same device, but got mat2 is on cuda:0, different from other tensors on cpu", "device"),
        (CUDA_INDEX, "device"),
        ("Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same", "device"),
        ("Tensor on device cpu is not on the expected device meta!", "device"),
        ("Expected query, key, and value to have the same device type, but got query.device: cuda:0 key.device: cpu", "device"),
        ("indices should be either on cpu or on the same device as the indexed tensor (cpu)", "device"),
        ("mat1 and mat2 must have the same dtype, but got Half and Float", "dtype"),
        ("expected scalar type Half but found Float", "dtype"),
        ("Input type (float) and bias type (c10::Half) should be the same", "dtype"),
        ("Input type (torch.cuda.FloatTensor) and weight type (torch.cuda.HalfTensor) should be the same", "dtype"),
        ("\"cdist\" not implemented for 'Half'", "dtype"),
        (
            "Expected tensor for argument #1 'indices' to have one of the following scalar types: Long, Int; but got torch.FloatTensor",
            "dtype",
        ),
        ("mat1 and mat2 shapes cannot be multiplied (2x5 and 3x4)", "shape"),
        ("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1", "shape"),
        ("Given groups=1, weight of size [4, 3, 3, 3], expected input[1, 4, 8, 8] to have 3 channels, but got 4 channels instead", "shape"),
        ("shape '[4, 4]' is invalid for input of size 6", "shape"),
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.20 GiB is free.", "memory"),
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 45 bytes.",
            "memory",
        ),
        ("index out of range in self", "index"),
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported", "index"),
        ("index 7 is out of bounds for dimension 0 with size 5", "index"),
        ("CUDA error: an illegal memory access was encountered", "other"),
        ("forward() missing 1 required positional argument: 'mask'", "other"),
        ("", "other"),
    ],
)
def test_a_message_of_torch_is_known_for_what_it_is(message: str, kind: str) -> None:
    assert failure.kind(RuntimeError(message)) == kind


def test_errors_of_gpuopt_and_interrupts_are_no_failures_of_the_model() -> None:
    assert failure.kind(BadInput("out of memory")) is None and failure.kind(KeyboardInterrupt()) is None
    assert [f for f in diagnose(evidence(failure=BadInput("no such file"))) if f.code in CODES] == []


def test_a_plain_attribute_left_on_another_device_is_named_with_its_layer_and_line() -> None:
    subject = failing(Mlp(registered=False).to("meta"), torch.ones(2, 8, device="meta"))
    failed = failure.locate(subject.module, subject.inputs, subject.failure)  # type: ignore[arg-type]
    assert failed is not None
    assert (failed.module_name, failed.module_class, failed.line) == ("layers.1", "Scaled", line_of(broken.Scaled, "* self.scale"))
    # The layer's own result is not blamed for what it was called with.
    assert [(t.name, t.kind, t.device, t.dtype, t.shape) for t in failed.tensors] == [
        ("layers.1.scale", "attribute", "cpu", "float32", (8,))
    ]
    found = diagnosis(subject)
    assert found.code == "GPU701" and found.module == "layers.1" and "register_buffer('scale'" in found.fix and "Scaled" in found.fix


def test_fake_tensors_stand_for_a_gpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = Mlp(registered=True)
        for layer in model.layers:
            layer.scale = torch.ones(8, device="cuda")
        x = torch.ones(2, 8)
        failed = failure.locate(model, Inputs(args=(x,)), raised(model, x))
    assert failed is not None and failed.module_name == "layers.0"
    assert [(t.name, t.kind, t.device) for t in failed.tensors] == [("layers.0.scale", "buffer", "cuda:0")]


def test_a_tensor_made_in_forward_is_traced_to_the_line_that_made_it() -> None:
    found = diagnosis(failing(Positional(follows=False).to("meta"), torch.ones(2, 4, device="meta")))
    made = line_of(Positional, "ramp = torch.arange(4)")
    assert "ramp (cpu, int64[4])" in found.message
    assert found.fix.startswith("torch.arange(…, device=") and found.fix.endswith(f"at {made}")
    assert found.line == line_of(Positional, "+ ramp")


class Table(nn.Embedding):
    """Refuses indices from elsewhere as CUDA's own does; a meta table takes any."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device != self.weight.device:
            raise RuntimeError(CUDA_INDEX)
        return super().forward(input)


class Positions(nn.Module):
    def __init__(self, *, registered: bool) -> None:
        super().__init__()
        self.table = Table(16, 8)
        if registered:
            self.register_buffer("position_ids", torch.arange(16), persistent=False)
        else:
            self.position_ids = torch.arange(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(self.position_ids[: x.shape[1]])


def test_positional_ids_that_are_not_registered_are_named_though_only_a_slice_arrived() -> None:
    x = torch.ones(2, 4, 8, device="meta")
    found = diagnosis(failing(Positions(registered=False).to("meta"), x))
    assert found.code == "GPU701" and found.module == "table" and "plain attribute position_ids (cpu, int64[4])" in found.message
    assert "register_buffer('position_ids'" in found.fix and "Positions" in found.fix
    with torch.no_grad():
        Positions(registered=True).to("meta")(x)


def test_an_input_elsewhere_than_the_model_is_to_be_moved() -> None:
    found = diagnosis(failing(Mlp().to("meta"), torch.ones(2, 8)))
    assert "input x (cpu, float32[2,8])" in found.message and found.fix == "x = x.to('meta') before the call"


def test_weights_that_were_never_loaded_are_not_told_to_move() -> None:
    """A tensor on meta has no data: torch refuses to move it, so `.to()` would be the next failure."""
    broken = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, device="meta"))
    found = diagnosis(failing(broken, torch.ones(2, 8)))
    assert "load its weights" in found.fix and ".to('cpu')" not in found.fix


class Recorded(nn.Module):
    """Raises what a GPU said once, on a machine that has none."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(x)  # noqa: F841 - what a finding may name
        raise self.error


def test_a_recorded_exception_is_read_where_no_tensor_shows_the_devices() -> None:
    said = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    found = diagnosis(failing(Recorded(RuntimeError(said)), torch.ones(1, 4)))
    assert found.code == "GPU701" and said in found.message and "cuda:0" in found.fix


def test_a_float64_buffer_is_named_as_the_cause_of_what_was_made_from_it() -> None:
    subject = failing(Encoder(frequencies=torch.linspace(0, 1, 8, dtype=torch.float64)), torch.tensor([[1, 2, 3]]))
    found = diagnosis(subject)
    assert found.code == "GPU702" and found.module == "attention"
    assert "buffer attention.frequencies (cpu, float64[8])" in found.message and "turned" not in found.message
    assert "torch.float32" in found.fix


def test_mixed_halves_name_the_layer_that_was_cast() -> None:
    model = Mlp()
    model.layers[1].fc.half()
    found = diagnosis(failing(model, torch.ones(2, 8)))
    assert found.code == "GPU702" and found.module == "layers.1.fc" and "float16" in found.message
    assert found.fix.count("layers.1.fc") == 1


def test_a_half_model_with_a_float_input_names_the_input() -> None:
    found = diagnosis(failing(Mlp().half(), torch.ones(2, 8)))
    assert (
        found.module == "layers.0.fc"
        and "input x (cpu, float32[2,8])" in found.message
        and found.fix == "x.to(torch.float16) before the call"
    )


def test_ids_as_floats_are_to_be_made_whole_numbers() -> None:
    found = diagnosis(failing(Encoder(), torch.ones(1, 3)))
    assert found.code == "GPU702" and found.module == "words" and found.fix == "input_ids.long() before the call"


def test_channels_last_images_are_recognised_and_other_wrong_channels_named() -> None:
    assert "images.permute(0, 3, 1, 2)" in diagnosis(failing(Images(), torch.ones(1, 16, 16, 3))).fix
    found = diagnosis(failing(Images(), torch.ones(1, 4, 16, 16)))
    assert found.module == "stem" and "takes 3 channels" in found.message and "has 4" in found.message
    assert "--input 'images:float32[1,3,16,16]'" in found.fix


def test_a_head_of_another_width_says_where_its_input_was_made() -> None:
    found = diagnosis(failing(Mlp(head=16), torch.ones(2, 8)))
    assert (
        found.code == "GPU703"
        and found.module == "head"
        and "takes 16 features" in found.message
        and "pooled (cpu, float32[2,8])" in found.message
    )
    assert f"{line_of(Mlp, 'pooled = x.relu()')} by x.relu()" in found.fix


def test_more_tokens_than_positions_are_said_to_be_too_many() -> None:
    found = diagnosis(failing(Encoder(positions=16), torch.ones(1, 20, dtype=torch.int64)))
    assert found.code == "GPU703" and "20 tokens" in found.message and "16 positions" in found.message and "max_length=16" in found.fix


def test_an_index_beyond_the_vocabulary_is_named_with_its_place() -> None:
    found = diagnosis(failing(Encoder(vocabulary=50), torch.tensor([[1, 2, 3], [4, 77, 50]])))
    assert found.code == "GPU705" and found.module == "words" and found.count == 2
    assert "50 rows" in found.message and "input_ids holds 77" in found.message and "[1, 1]" in found.message
    assert "input_ids:int64[N,S]<50" in found.fix


def test_a_negative_id_is_said_to_be_padding() -> None:
    found = diagnosis(failing(Encoder(), torch.tensor([[1, -100]])))
    assert "holds -100" in found.message and "clamp(min=0)" in found.fix


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        scores = self.fc(x)
        return torch.gather(scores, 1, picks)


def test_a_gather_beyond_its_dimension_is_named_by_its_expression() -> None:
    found = diagnosis(failing(Picks(), torch.ones(2, 4), torch.tensor([[1], [9]])))
    assert found.code == "GPU705" and "5 rows" in found.message and "picks holds 9" in found.message and "torch.gather" in found.message


def test_an_assertion_on_the_gpu_is_found_by_calling_the_same_model_on_the_cpu() -> None:
    late = RuntimeError("CUDA error: device-side assert triggered")
    subject = evidence(module=Encoder(vocabulary=50), inputs=Inputs(args=(torch.tensor([[1, 2, 50]]),)), failure=late)
    found = diagnosis(subject)
    assert found.module == "words" and "holds 50" in found.message and found.line == line_of(Encoder, "self.words(input_ids)")


def test_an_assertion_on_a_gpu_that_is_gone_is_found_from_the_inputs_alone() -> None:
    late = RuntimeError("CUDA error: device-side assert triggered")
    inputs = Inputs(kwargs={"attention_mask": torch.full((1, 3), 99), "input_ids": torch.tensor([[1, 2, 50]])})
    model = nn.ModuleDict({"word_embeddings": nn.Embedding(50, 8), "position_embeddings": nn.Embedding(16, 8)}).to("meta")
    found = diagnosis(evidence(module=model, inputs=inputs, failure=late))
    assert found.module == "word_embeddings" and "input_ids holds 50" in found.message
    good = Inputs(kwargs={"input_ids": torch.tensor([[1, 2, 49]])})
    assert "--device cpu" in diagnosis(evidence(module=model, inputs=good, failure=late)).fix


def test_a_failure_without_frames_is_provoked_again() -> None:
    subject = failing(Images(), torch.ones(1, 4, 16, 16))
    assert subject.failure is not None
    subject.failure.__traceback__ = None
    assert diagnosis(subject).module == "stem"


def test_a_failure_of_which_nothing_is_left_is_still_reported() -> None:
    for error in (RuntimeError("mat1 and mat2 must have the same dtype"), IndexError("index out of range in self"), ValueError("no")):
        found = diagnosis(evidence(failure=error))
        assert found.module is None and str(error) in found.message and found.fix


def test_the_module_is_found_in_a_copy_and_behind_another_exception() -> None:
    model = Images()
    try:
        raised(copy.deepcopy(model), torch.ones(1, 4, 8, 8))
        with torch.no_grad():
            try:
                copy.deepcopy(model)(torch.ones(1, 4, 8, 8))
            except RuntimeError as error:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied: the step failed") from error
    except RuntimeError as error:
        assert diagnosis(evidence(module=model, inputs=None, failure=error)).module == "stem"


def score(query: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return query * weights


class Helped(nn.Module):
    """Its op is in a function below it, as transformers writes attention."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return score(x, self.weights)


def test_a_helper_function_below_the_module_is_read_by_the_names_of_the_model() -> None:
    found = diagnosis(failing(Helped(), torch.ones(2, 4)))
    assert found.line == line_of_function(score, "query * weights")
    assert "input x (cpu, float32[2,4])" in found.message and "parameter weights (cpu, float32[5])" in found.message


def line_of_function(function: Any, text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{Path(inspect.getfile(function)).name}:{first + next(i for i, line in enumerate(lines) if text in line)}"


class Sly(nn.Module):
    """A property that must not be run to look at a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    @property
    def table(self) -> torch.Tensor:
        self.calls += 1
        return torch.ones(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def test_nothing_of_the_users_is_run_to_look_at_a_failure() -> None:
    model = Sly()
    subject = failing(model, torch.ones(4))
    assert model.calls == 1
    assert "input x" in diagnosis(subject).message and model.calls == 1


def test_code_without_a_source_still_gives_the_module_and_its_tensors() -> None:
    scope: dict[str, Any] = {"nn": nn, "torch": torch}
    exec("class Typed(nn.Module):\n    def forward(self, x, y):\n        return x @ y\n", scope)
    found = diagnosis(failing(scope["Typed"](), torch.ones(2, 3), torch.ones(4, 5)))
    assert found.code == "GPU703" and found.module == "" and "input x (cpu, float32[2,3]); input y (cpu, float32[4,5])" in found.message


def test_a_missing_argument_is_to_be_passed() -> None:
    found = diagnosis(failing(Picks(), torch.ones(2, 4)))
    assert found.code == "GPU706" and "'picks'" in found.fix and found.line == line_of(Picks, "def forward")


def test_any_other_exception_names_the_users_own_line() -> None:
    found = diagnosis(failing(Recorded(ValueError("an odd day")), torch.ones(1, 4)))
    assert found.code == "GPU706" and "ValueError: an odd day" in found.message and found.line == line_of(Recorded, "raise self.error")
    assert "hidden (cpu, float32[1,4])" in found.fix


def cases() -> Iterator[nn.Module]:
    yield nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
    yield nn.LSTM(5, 4)
    yield nn.MultiheadAttention(8, 2)
    yield nn.TransformerEncoderLayer(8, 2, 16)
    yield torch.jit.script(nn.Sequential(nn.Linear(5, 4)))
    yield nn.DataParallel(nn.Linear(5, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("index", range(6))
def test_modules_of_torchs_own_are_located_without_a_line(index: int) -> None:
    model = list(cases())[index]
    args = (torch.ones(3, 1, 4),) * (3 if isinstance(model, nn.MultiheadAttention) else 1)
    found = diagnosis(failing(model, *args))
    assert found.code in ("GPU703", "GPU706") and found.message


class Passing(nn.Module):
    """What breaks its layer is made within the call of it, and held by no variable."""

    def __init__(self, *, deep: bool = False) -> None:
        super().__init__()
        head: nn.Module = nn.Linear(8, 2)
        self.head = nn.Sequential(nn.ReLU(), nn.Sequential(head)) if deep else head
        self.table = torch.ones(8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x * self.table)


def test_a_temporary_that_no_variable_holds_is_followed_to_what_it_was_made_of() -> None:
    found = diagnosis(failing(Passing(), torch.ones(2, 8)))
    assert found.code == "GPU702" and found.module == "head" and found.line == line_of(Passing, "self.head(x * self.table)")
    assert "plain attribute table (cpu, float64[8]) is not" in found.message and "register_buffer('table', ….to(torch.float32)" in found.fix


def test_what_a_container_of_torchs_made_on_the_way_is_not_taken_for_its_input() -> None:
    """What reaches the layer is the ReLU's, which only Sequential's own variable holds."""
    found = diagnosis(failing(Passing(deep=True), torch.ones(2, 8)))
    assert found.code == "GPU702" and found.module == "head.1.0" and "input (cpu, float64[2,8])" in found.message
