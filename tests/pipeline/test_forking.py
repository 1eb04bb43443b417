"""Children that are copies of a process: they are what a new process would be, they end with whoever asked for them, and where a copy would differ there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpuopt.core.spec import BackendSpec, Candidate, Job, ModelRef
from gpuopt.pipeline import forking, isolate, zygote
from gpuopt.pipeline.facts import Measured
from gpuopt.pipeline.isolate import Child, ChildFailed

HERE = str(Path(__file__).parent)


def look(child: Child, **arguments: Any) -> Any:
    seen: list[str] = []
    child.call("look", Measured, timeout_s=60, on_progress=lambda _, note: seen.append(note), **arguments)
    return json.loads(seen[0])


def test_a_fork_sees_what_a_new_process_sees(kept: forking.Zygote) -> None:
    wanted = {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "5"}
    with Child("fake_worker", environment=wanted) as one:
        copied = look(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forking, "current", lambda: None)
        with Child("fake_worker", environment=wanted) as other:
            new = look(other)
    assert kept.refused == ""
    assert copied["environment"] == new["environment"]
    assert copied["group"] and new["group"]
    assert copied["threads"] == 3
    assert copied["collects"]
    # Its three streams and two pipes (and the listing itself), and nothing of whoever copied it.
    assert len(copied["fds"]) <= len(new["fds"])
    assert "torch" in copied["modules"] and "torch" not in new["modules"]


def test_a_variable_that_imports_have_read_makes_a_new_process(kept: forking.Zygote) -> None:
    with Child("fake_worker", environment={"PYTHONPATH": HERE, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}) as child:
        assert isinstance(child._process, subprocess.Popen)
        assert look(child)["environment"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" in kept.refused


def test_the_way_libraries_are_told_to_ask_for_cuda_is_no_childs(kept: forking.Zygote) -> None:
    assert zygote.NVML_CHECK not in os.environ
    with Child("fake_worker", environment={"PYTHONPATH": HERE}) as child:
        assert zygote.NVML_CHECK not in look(child)["environment"]


def test_what_one_child_imported_the_next_one_has(kept: forking.Zygote) -> None:
    with Child("fake_worker", environment={"PYTHONPATH": HERE}) as child:
        assert "torch.export" in forking.SLOW
        look(child, imported=["torch.export", "antigravity", "os; import this"])
    with Child("fake_worker", environment={"PYTHONPATH": HERE}) as child:
        found = look(child)["modules"]
    assert "torch.export" in found
    assert "antigravity" not in found and "this" not in found


def test_children_beside_each_other_are_told_apart(kept: forking.Zygote) -> None:
    with Child("fake_worker", environment={"PYTHONPATH": HERE}) as one, Child("fake_worker", environment={"PYTHONPATH": HERE}) as two:
        assert one.pid != two.pid
        with pytest.raises(ChildFailed, match="SIGSEGV"):
            one.call("segv", Measured, timeout_s=20)
        assert two.alive
        two.call("echo", Measured, timeout_s=20, ns=[1])
    assert not one.alive and not two.alive


def test_when_the_one_that_forks_is_killed_its_children_end_and_the_next_is_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with forking.kept({**os.environ, **isolate.child_environment()}) as own:
        assert own is not None
        with Child("gpuopt.pipeline.worker") as child:
            assert isinstance(child._process, forking.Forked)
            time.sleep(0.3)  # it asks the kernel to end with its parent
            assert own.pid is not None
            os.kill(own.pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while Path(f"/proc/{child.pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not Path(f"/proc/{child.pid}").exists()
            assert child._process.wait(timeout=5) == -signal.SIGKILL
        with Child("fake_worker", environment={"PYTHONPATH": HERE}) as again:
            assert isinstance(again._process, subprocess.Popen)
            again.call("echo", Measured, timeout_s=20, ns=[1])
        assert "has ended" in own.refused
    assert forking.current() is None


def test_a_library_that_starts_a_thread_ends_forking(tmp_path: Path) -> None:
    """A copy has the thread's locks and not the thread."""
    (tmp_path / "timm.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n")
    own = forking.Zygote({**os.environ, **isolate.child_environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), HERE])})
    try:
        r, w = os.pipe()
        pid = own.fork("fake_worker", own.environment, (r, w, w))
        own.expect(["timm"])
        with pytest.raises(forking.Refused, match="started a thread"):
            own.fork("fake_worker", own.environment, (r, w, w))
        os.close(r)
        os.close(w)
        os.kill(pid, signal.SIGKILL)  # it holds both ends of the pipe it waits on, so nobody closes it
    finally:
        own.close()


@pytest.mark.parametrize(("answer", "words"), [(3, ""), (0, "initialised the CUDA driver"), (100, "initialised the CUDA driver")])
def test_a_driver_that_is_initialised_ends_forking(monkeypatch: pytest.MonkeyPatch, answer: int, words: str) -> None:
    """It is asked itself: NVML, which libraries ask while they are imported, opens the same device files."""
    driver = SimpleNamespace(cuDeviceGetCount=lambda count: answer)
    monkeypatch.setattr(zygote.ctypes, "CDLL", lambda name, mode: driver)
    monkeypatch.setattr(zygote.threading, "active_count", lambda: 1)
    assert (words in zygote.unsafe()) if words else zygote.unsafe() == ""


def test_a_driver_that_nobody_loaded_is_not_loaded_to_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote.threading, "active_count", lambda: 1)
    assert zygote.unsafe() == ""
    assert "libcuda.so" not in Path("/proc/self/maps").read_text()


def test_nothing_is_left_when_the_command_is_killed() -> None:
    script = (
        "import os, sys, time\n"
        "from gpuopt.pipeline import forking, isolate\n"
        "with forking.kept({**os.environ, **isolate.child_environment()}) as z:\n"
        "    c = isolate.Child(); print(z.pid, c.pid, flush=True); time.sleep(600)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    pids = [int(word) for word in command.stdout.readline().split()]
    time.sleep(0.3)
    command.kill()
    command.wait()
    command.stdout.close()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if _runs(pid)] == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_closing_leaves_no_descriptor_and_no_process() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with forking.kept({**os.environ, **isolate.child_environment()}) as own:
        assert own is not None and own.pid is None  # nobody was asked for
        with Child("fake_worker", environment={"PYTHONPATH": HERE}) as child:
            child.call("echo", Measured, timeout_s=20, ns=[1])
        pid = own.pid
    assert pid is not None and not _runs(pid)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUOPT_FORK", "0")
    with forking.kept(dict(os.environ)) as own:
        assert own is None and forking.current() is None


def test_cold_start_counts_what_a_new_process_would_import() -> None:
    with forking.kept({**os.environ, **isolate.child_environment()}) as own:
        assert own is not None
        with Child("fake_worker", environment={"PYTHONPATH": HERE}) as first:
            look(first)
        with Child("started_worker", environment={"PYTHONPATH": HERE}) as child:
            seen: list[str] = []
            child.call("started", Measured, timeout_s=20, on_progress=lambda _, note: seen.append(note))
    assert float(seen[0]) > 0.5, "torch alone takes longer than this to import"


def test_what_only_some_children_would_import_counts_for_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bert(torch.nn.Module):
        pass

    Bert.__module__ = "transformers.models.bert"
    monkeypatch.setattr(forking, "SPARED", {"torch._dynamo": 2.0, "torch._inductor.compile_fx": 3.0, "transformers": 4.0, "timm": 8.0})
    assert forking.spared_s("eager", torch.nn.Linear(2, 2)) == 0.0
    assert forking.spared_s("inductor", torch.nn.Linear(2, 2)) == 5.0
    assert forking.spared_s("eager", torch.nn.Sequential(Bert())) == 4.0
    assert forking.spared_s("inductor", Bert()) == 9.0
    assert forking.spared_s("ort", None) == 0.0


@pytest.mark.parametrize(
    ("verb", "backends", "model", "wanted"),
    [
        ("bench", ("inductor", "aoti"), "net.py:net", forking.COMPILERS),
        ("bench", ("inductor", "eager"), "net.py:net", ()),
        ("bench", ("eager", "ort"), "gpuopt.models:bert_base", forking.TRANSFORMERS),
        ("bench", ("eager",), "gpuopt.models:bert_base", ()),
        ("optimize", ("eager",), "net.py:net", forking.COMPILERS),
        ("profile", ("inductor",), "net.py:net", ()),
    ],
)
def test_what_several_children_will_import_is_known_before(
    verb: str, backends: tuple[str, ...], model: str, wanted: tuple[str, ...]
) -> None:
    job = Job(verb=verb, candidates=tuple(Candidate(model=ModelRef(text=model), backend=BackendSpec(name=name)) for name in backends))
    assert forking.expected_of([job]) == wanted


@pytest.mark.parametrize(("source", "wanted"), [("from transformers import BertModel", forking.TRANSFORMERS), ("import torch", ())])
def test_a_factorys_file_is_read_and_not_run_to_know_what_it_imports(tmp_path: Path, source: str, wanted: tuple[str, ...]) -> None:
    (tmp_path / "net.py").write_text(f"{source}\nraise SystemExit('it was run')\n")
    candidates = tuple(Candidate(model=ModelRef(text=f"{tmp_path}/net.py:net"), dims={"N": n}) for n in (1, 2))
    assert forking.expected_of([Job(verb="bench", candidates=candidates)]) == wanted


def test_a_folder_that_cannot_be_listed_tells_nothing_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text("import torch\n")

    def closed(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(forking.os, "scandir", closed)
    assert not forking._names_transformers(f"{tmp_path}/net.py:net")


def test_a_command_of_another_thread_has_children_of_its_own() -> None:
    """Else they would end with the command whose they are not."""
    seen: list[Any] = []
    with forking.kept(dict(os.environ)) as own:
        other = threading.Thread(target=lambda: seen.append(forking.current()))
        other.start()
        other.join()
        assert forking.current() is own and seen == [None]
        with forking.kept(dict(os.environ)) as inner:
            assert inner is own


def test_whoever_forks_this_process_has_no_zygote() -> None:
    with forking.kept(dict(os.environ)):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if forking.current() is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_that_fails_ends_none_of_the_children_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    made = zygote._Zygote(None, imports_s=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_send", sent.append)
    monkeypatch.setattr(zygote, "unsafe", lambda: "")

    def full() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(zygote.os, "fork", full)
    made._answer({"fork": "fake_worker", "number": 7, "environment": {}, "folder": "/"}, (3, 4, 5), ())
    assert sent == [{"cannot": "a process cannot be copied: Resource temporarily unavailable", "number": 7}]
    made._answer({"fork": "fake_worker", "number": 8, "environment": {}, "folder": "/"}, (3,), ())
    assert "descriptors" in sent[1]["cannot"]


def test_a_request_that_was_interrupted_gives_its_child_to_nobody(kept: forking.Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"PYTHONPATH": HERE}
    with Child("fake_worker", environment=here):
        pass
    before = len(os.listdir("/proc/self/fd"))

    def interrupted(number: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kept, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Child("fake_worker", environment=here)
    assert len(os.listdir("/proc/self/fd")) == before
    with Child("fake_worker", environment=here) as child:
        child.call("echo", Measured, timeout_s=20, ns=[1])
        (orphan,) = [answer["pid"] for answer in kept._answers.values()]
        assert orphan != child.pid
        deadline = time.monotonic() + 10
        while _runs(orphan) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _runs(orphan)
    kept._answers.clear()


def test_how_a_child_ended_is_not_forgotten_when_its_number_comes_again() -> None:
    own = forking.Zygote({})
    own._hear({"pid": 4, "number": 1})
    first = forking.Forked(own, 4, None)  # type: ignore[arg-type]
    own._hear({"ended": [4, 3]})
    assert first.poll() == 3
    own._hear({"pid": 4, "number": 2})
    assert first.poll() == 3 and forking.Forked(own, 4, None).poll() is None  # type: ignore[arg-type]


def test_a_fork_draws_numbers_of_its_own_and_is_where_its_parent_is(
    kept: forking.Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawing.py").write_text(
        "import json, os, random, sys\nimport numpy\n\n\ndef main():\n"
        "    told = json.dumps({'progress': [None, json.dumps([os.getcwd(), random.random(), numpy.random.rand()])]})\n"
        "    done = json.dumps({'ok': {'samples': {'samples_ns': [1], 'clock': 'fake'}}})\n"
        "    os.read(int(sys.argv[1]), 1)\n    os.write(int(sys.argv[2]), f'{told}\\n{done}\\n'.encode())\n"
    )
    drawn = []
    for _ in range(2):
        with Child("drawing", environment={"PYTHONPATH": str(tmp_path)}) as child:
            assert isinstance(child._process, forking.Forked)
            drawn.append(look(child))
    assert drawn[0][0] == str(tmp_path)
    assert drawn[0][1] != drawn[1][1] and drawn[0][2] != drawn[1][2]
