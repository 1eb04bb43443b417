"""Packages of native code: right on what they were built for, an error on everything else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpuopt.backends import aoti
from gpuopt.core.errors import BadInput, Unsupported, UsageError
from gpuopt.core.live import Inputs, Model, Runner
from gpuopt.core.spec import TensorSpec

pytestmark = pytest.mark.skipif(aoti.available("cpu") is not None, reason=str(aoti.available("cpu")))

FAST = {"aot_inductor.compile_wrapper_opt_level": "O0"}


class Pair(torch.nn.Module):
    """A square input, so that a transposed one has the same shape; keywords, one of them channels_last; nested outputs with a None."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor, *, bias: torch.Tensor, image: torch.Tensor) -> Any:
        y = torch.tanh(self.inner(x)) + bias + self.conv(image).mean((2, 3))[:, None, :]
        return {"y": y, "none": None, "more": [y.sum(-1), (y * 2,)]}


def inputs(batch: int = 4) -> Inputs:
    torch.manual_seed(batch)
    specs = (TensorSpec.parse("x:float32[N,8,8]"), TensorSpec.parse("bias:float32[N,1,8]"), TensorSpec.parse("image:float32[N,3,5,5]"))
    image = torch.randn(batch, 3, 5, 5).to(memory_format=torch.channels_last)
    kwargs = {"bias": torch.randn(batch, 1, 8), "image": image}
    return Inputs(args=(torch.randn(batch, 8, 8),), kwargs=kwargs, specs=specs, dims={"N": batch})


@pytest.fixture(scope="module")
def module() -> Pair:
    torch.manual_seed(0)
    return Pair().eval()


@pytest.fixture(scope="module")
def runner(module: Pair) -> Iterator[Any]:
    built = aoti.build(Model(form="module", name="p", module=module), inputs(), {"precision": "fp32", "dynamic": {"N": (2, 8)}, **FAST})
    yield built
    built.close()


def test_every_size_of_a_range_gives_eagers_answer(runner: Any, module: Pair) -> None:
    assert isinstance(runner, Runner)
    for batch in (2, 3, 4, 8):
        given = inputs(batch)
        out = runner(*given.args, **given.kwargs)
        with torch.no_grad():
            wanted = module(*given.args, **given.kwargs)
        assert torch.allclose(out["y"], wanted["y"], atol=1e-5), batch
        assert torch.allclose(out["more"][0], wanted["more"][0], atol=1e-5)
        assert torch.allclose(out["more"][1][0], wanted["more"][1][0], atol=1e-5)
        assert "none" not in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.double(), "'x' is float64"),
        (lambda x: x.half(), "'x' is float16"),
        (lambda x: x.long(), "'x' is int64"),
        (lambda x: x.transpose(1, 2), "'x' has strides"),
        (lambda x: x.repeat(3, 1, 1), "dimension N is 12, built for 2 to 8"),
        (lambda x: x[:1], "dimension N is 1, built for 2 to 8"),
        (lambda x: x[:2], "'bias' has N=4, an input before it has N=2"),
        (lambda x: x[:, :, :4], "dimension 2 was built for 8 alone"),
        (lambda x: x[0], "'x' has 2 dimensions"),
    ],
)
def test_a_wrong_input_is_an_error_and_never_an_answer(runner: Any, change: Any, says: str) -> None:
    given = inputs()
    with pytest.raises(UsageError) as caught:
        runner(change(given.args[0]), **given.kwargs)
    assert says in caught.value.message


def test_the_audit_reads_the_graph_that_was_compiled(runner: Any) -> None:
    audit = runner.audit()
    assert audit is not None and audit.method == "post-grad graph"
    assert audit.shares == {"float32": 1.0} and audit.honoured and audit.requested == "fp32"


CHILD = """
import sys, torch
from pathlib import Path
from gpuopt.backends import aoti
folder = Path(sys.argv[1])
files = dict(part.rsplit("/", 1) for part in sys.argv[2:])
runner = aoti.load(folder, files, {"signed_by_us": True}, "cpu")
given = torch.load(folder / "given.pt", weights_only=True)
rest = {k: given[k] for k in ("bias", "image")}
out = runner(given["x"], **rest)
two = runner(given["x"][:2], **{k: v[:2] for k, v in rest.items()})
assert torch.allclose(out["y"], given["y"], atol=1e-5) and torch.allclose(two["y"], given["y"][:2], atol=1e-5)
assert runner.audit() is None
try:
    runner(given["x"].double(), **rest)
except Exception as error:
    print(type(error).__name__, error)
print("Pair" in dir(sys.modules["__main__"]))
"""


def test_a_bundle_runs_in_a_process_that_has_never_seen_the_model(runner: Any, module: Pair, tmp_path: Path) -> None:
    files = runner.save(tmp_path)
    assert set(files) == {"aoti", "accepts"}
    given = inputs()
    with torch.no_grad():
        wanted = module(*given.args, **given.kwargs)["y"]
    torch.save({"x": given.args[0], **given.kwargs, "y": wanted}, tmp_path / "given.pt")
    arguments = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), *(f"{role}/{name}" for role, name in files.items())]
    child = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["UsageError input 'x' is float64, this artifact was built for float32", "False"]


def test_a_package_without_consent_is_refused(runner: Any, tmp_path: Path) -> None:
    files = runner.save(tmp_path)
    with pytest.raises(BadInput):
        aoti.load(tmp_path, files, {}, "cpu")


def test_a_bundle_that_does_not_say_what_it_takes_is_refused(runner: Any, tmp_path: Path) -> None:
    files = {role: name for role, name in runner.save(tmp_path).items() if role != "accepts"}
    with pytest.raises(BadInput, match="which inputs"):
        aoti.load(tmp_path, files, {"signed_by_us": True}, "cpu")


def test_an_input_built_channels_last_is_not_taken_contiguous(runner: Any) -> None:
    given = inputs()
    with pytest.raises(UsageError) as caught:
        runner(*given.args, bias=given.kwargs["bias"], image=given.kwargs["image"].contiguous())
    assert "'image' has strides" in caught.value.message and "channels_last" in caught.value.fix


def test_the_temporary_package_is_private_and_goes_with_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Pair) -> None:
    fake_packages(monkeypatch)
    runner = aoti.build(Model(form="module", name="p", module=module), inputs(), {})
    folder = runner._folder
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    runner.close()
    runner.close()
    assert not folder.exists()


def fake_packages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, dict[str, Any]]]:
    """Compiles nothing; records what each package would be built from: file, batch of the sample, ranges."""
    built: list[tuple[str, int, dict[str, Any]]] = []

    def package(module: Any, given: Inputs, ranges: dict[str, Any], path: Path, settings: Any, reader: Any) -> Path:
        built.append((path.name, given.args[0].shape[0], dict(ranges)))
        path.write_bytes(b"")
        return path

    def load(path: Path, **kwargs: Any) -> Any:
        return lambda *args, **kwargs: path.name

    monkeypatch.setattr(aoti, "_package", package)
    monkeypatch.setattr(aoti.gate, "load_aoti", load)
    return built


def test_a_range_that_begins_at_one_gets_a_package_for_one(monkeypatch: pytest.MonkeyPatch, module: Pair, tmp_path: Path) -> None:
    built = fake_packages(monkeypatch)
    runner = aoti.build(Model(form="module", name="p", module=module), inputs(), {"dynamic": {"N": (1, 8)}})
    assert built == [("model.aoti.pt2", 4, {"N": (2, 8)}), ("model.N1.aoti.pt2", 1, {})]
    chosen = {n: runner(*inputs(n).args, **inputs(n).kwargs) for n in (1, 2, 8)}
    assert chosen == {1: "model.N1.aoti.pt2", 2: "model.aoti.pt2", 8: "model.aoti.pt2"}
    files = runner.save(tmp_path)
    assert set(files) == {"aoti", "aoti:N=1", "accepts"}
    again = aoti.load(tmp_path, files, {"signed_by_us": True}, "cpu")
    assert again(*inputs(1).args, **inputs(1).kwargs) == "model.N1.aoti.pt2"
    runner.close()


def test_a_failed_build_leaves_no_folder_behind(monkeypatch: pytest.MonkeyPatch, module: Pair, tmp_path: Path) -> None:
    def package(*args: Any) -> Path:
        raise RuntimeError("the compiler fell over")

    monkeypatch.setattr(aoti, "_package", package)
    monkeypatch.setattr(aoti.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="fell over"):
        aoti.build(Model(form="module", name="p", module=module), inputs(), {})
    assert list(tmp_path.iterdir()) == []


def test_data_dependent_control_flow_is_unsupported_with_its_reason() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum().item() > 0 else x - 1

    with pytest.raises(Unsupported, match=r"torch\.export cannot take the model"):
        aoti.build(Model(form="module", name="b", module=Branch()), Inputs(args=(torch.ones(2),)), {})


def test_a_dimension_the_model_fixes_cannot_be_dynamic() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, -1) if x.shape[0] == 4 else x

    given = Inputs(args=(torch.ones(4, 8),), specs=(TensorSpec.parse("x:float32[N,8]"),))
    with pytest.raises(Unsupported, match="N"):
        aoti.build(Model(form="module", name="f", module=Fixed()), given, {"dynamic": {"N": (2, 8)}})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"preset": "fastest"}, UsageError),
        ({"max_autotun": True}, UsageError),
        ({"triton.cudagraphs": True}, Unsupported),
        ({"dynamic": {"N": (0, 8)}}, Unsupported),
        ({"dynamic": {"T": (1, 8)}}, UsageError),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(module: Pair, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        aoti.build(Model(form="module", name="p", module=module), inputs(), options)


def test_two_ranges_from_one_are_refused() -> None:
    with pytest.raises(Unsupported, match="N and S begin at 1"):
        aoti._single({"N": (1, 8), "S": (1, 16)})
    assert aoti._single({"N": (1, 8), "S": (2, 16)}) == "N"
    assert aoti._single({"N": (2, 8)}) is None
