"""A user's own program, run once under observation: it sees what python would give it, and however it ends, the report says so."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path

import jsonschema
import pytest

from gpuopt.core import codec
from gpuopt.core.errors import Unavailable, UsageError
from gpuopt.core.result import Environment, Report, Status
from gpuopt.pipeline import scripts

ROOT = Path(__file__).parents[2]
HERE = Environment(gpuopt="0", python="3", platform="test")

MODEL = """
import sys, os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
    def forward(self, x):
        return self.layer(x).relu()

model = Net().eval()
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A program in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def program(text: str, name: str = "infer.py", *, with_model: bool = True) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((MODEL if with_model else "") + textwrap.dedent(text))
        return name

    return program


def run(*words: str, timeout_s: float = 60.0, **options: object) -> Report:
    return scripts.run([sys.executable, *words], timeout_s, environment_here=HERE, **options)  # type: ignore[arg-type]


def test_a_program_gets_what_python_gives_it_and_the_report_explains_it(write, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write("VALUE = 42", "lib/helper.py", with_model=False)
    write(
        """
        import pickle, helper
        assert __name__ == "__main__" and sys.modules["__main__"].Net is Net and pickle.loads(pickle.dumps(Net)) is Net
        print("argv", sys.argv, helper.VALUE, __file__, sys.path[0] == os.path.dirname(os.path.realpath(__file__)))
        print("to stderr", file=sys.stderr)
        from concurrent.futures import ThreadPoolExecutor
        pool = ThreadPoolExecutor(2)  # never shut down: python ends it, and so must we
        pool.submit(print).result()
        with torch.no_grad():
            for _ in range(12):
                model.load_state_dict(model.state_dict())
                model(torch.randn(4, 64))
        """,
        "lib/infer.py",
    )
    report = run("-O", "lib/infer.py", "--flag", "a b", save_inputs=tmp_path / "inputs")
    out, err = capfd.readouterr()
    assert out == "argv ['lib/infer.py', '--flag', 'a b'] 42 lib/infer.py True\n\n" and "to stderr" in err
    (found,) = report.runs
    assert found.status is Status.OK and found.backend == "script" and found.model == "model" and found.latency_ms is None
    assert found.inputs == ("x:float32[4,64]",) and (tmp_path / "inputs" / "model.safetensors").exists()
    assert found.waterfall is not None and found.wall_ms == pytest.approx(sum(p.ms for p in found.waterfall.parts))
    assert any("observing took" in note for note in found.notes) and any("torch.profiler" in note for note in found.notes)
    assert any(row["kernel"] == "aten::addmm" and row["count"] == 1 for row in report.tables["kernels"])
    script = report.tables["script"]
    assert script["modules"][0]["num_calls"] == 12 and script["modules"][0]["line"].startswith("lib/infer.py:")
    reload = next(f for f in report.findings if f.code == "GPU711")
    assert reload.line is not None and reload.line.startswith("lib/infer.py:") and reload.count == 12
    assert not any("rule failed" in f.message for f in report.findings)
    plain = codec.dump(report)
    jsonschema.validate(json.loads(json.dumps(plain)), json.loads((ROOT / "docs" / "report.schema.json").read_text()))
    assert str(tmp_path) not in json.dumps(plain["runs"])


def test_a_crash_in_a_model_is_diagnosed_where_it_happened(write, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    write("print('before')\nmodel(torch.ones(1, 64))\nmodel(torch.ones(1, 63))\n")
    report = run("infer.py", traced=False)
    out, err = capfd.readouterr()
    assert out == "before\n" and "mat1 and mat2 shapes cannot be multiplied" in err and 'File "infer.py"' in err
    assert "gpuopt" not in err, "the traceback is the program's own"
    (found,) = report.runs
    assert found.status is Status.CRASH and "infer.py exited with 1, after 2 calls" in found.reason
    failure = next(f for f in report.findings if f.code == "GPU703")
    assert failure.severity == "error" and failure.line is not None and "infer.py" in failure.line


def test_a_program_that_fails_outside_a_model_keeps_its_exit_code(write, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    write("model(torch.ones(1, 64))\nimport atexit; atexit.register(lambda: model(torch.ones(1, 64)))\nsys.exit('no disk')")
    report = run("infer.py", traced=False)
    assert "no disk" in capfd.readouterr().err
    (found,) = report.runs
    assert found.status is Status.CRASH and "exited with 1, after 2 calls" in found.reason and "see its own output" in found.fix
    assert report.tables["exit"]["code"] == 1 and not [f for f in report.findings if f.severity == "error"]


def test_a_program_without_a_model_and_with_forks_is_told_so(write) -> None:  # type: ignore[no-untyped-def]
    write(
        """
        pid = os.fork()
        if pid == 0:
            model(torch.ones(1, 64))
            sys.exit(0)
        os.waitpid(pid, 0)
        """
    )
    (found,) = run("infer.py", traced=False).runs
    assert found.status is Status.BAD_INPUT and "called no torch model" in found.reason and "forked 1 times" in found.reason


def test_a_program_that_never_ends_is_ended_with_what_it_started(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write(
        """
        import subprocess, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open("pid", "w").write(str(child.pid))
        while True:
            model(torch.ones(1, 64))
            time.sleep(0.01)
        """
    )
    began = time.monotonic()
    (found,) = run("infer.py", timeout_s=8.0, traced=False).runs
    assert time.monotonic() - began < 20
    assert found.status is Status.TIMEOUT and "did not end within 8 s" in found.reason and "calls of its models" in found.reason
    assert not _is_running(int((tmp_path / "pid").read_text()))


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def test_a_module_is_run_and_one_that_leaves_by_os_exit_has_told_what_it_did(write) -> None:  # type: ignore[no-untyped-def]
    write("", "pkg/__init__.py", with_model=False)
    write(
        """
        import time
        for _ in range(4):
            model(torch.ones(1, 64))
        assert sys.argv[1:] == ["-x"] and sys.argv[0].endswith("__main__.py"), sys.argv
        time.sleep(1.5)
        os._exit(0)
        """,
        "pkg/__main__.py",
    )
    (found,) = run("-m", "pkg", "-x", traced=False).runs
    assert found.status is Status.OK and "os._exit" in found.reason and any("called 4 times" in note for note in found.notes)


def test_a_program_of_few_calls_is_told_why_it_has_no_waterfall(write) -> None:  # type: ignore[no-untyped-def]
    write("model(torch.ones(1, 64))\nmodel(torch.ones(1, 64))")
    (found,) = run("infer.py").runs
    assert found.status is Status.OK and found.waterfall is None and any("nothing was traced" in note for note in found.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no program"),
        (["python"], "without a program"),
        (["python", "-c", "print()"], "cannot be observed"),
        (["python", "-m"], "without a program"),
        (["python", "gone.py"], "no file gone.py"),
        (["python9.99", "gone.py"], "no python9.99"),
        (["torchrun", "infer.py"], "no Python program"),
        (["gone.py"], "no file gone.py"),
    ],
)
def test_what_is_no_python_program_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        scripts.parse([sys.executable if word == "python" else word for word in words])
    assert refused.value.fix


def test_flags_of_the_interpreter_stay_in_front(write) -> None:  # type: ignore[no-untyped-def]
    write("")
    program = scripts.parse([sys.executable, "-u", "-W", "error", "-Xdev", "-OO", "infer.py", "-m", "x"])
    assert program.flags == ("-u", "-W", "error", "-Xdev", "-OO") and program.words == ("infer.py", "-m", "x")
    assert scripts.parse(["infer.py", "a"]).interpreter == sys.executable


def test_an_interpreter_without_gpuopt_is_named(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write("")
    other = tmp_path / "bin" / "python3"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho 'No module named gpuopt' >&2\nexit 1\n")
    other.chmod(0o755)
    with pytest.raises(Unavailable, match="could not start the recorder"):
        scripts.run([str(other), "infer.py"], 10, environment_here=HERE)
