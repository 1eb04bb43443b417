"""Traces from elsewhere: read as a stream, everything odd refused with a remedy, nothing made up."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuopt.core.errors import BadInput
from gpuopt.profiling import foreign, json_stream, ranks
from gpuopt.profiling.events import STEP, from_chrome
from gpuopt.profiling.rows import CallRow, OpRow, Rows, WorkRow

_SPEC = importlib.util.spec_from_file_location("chrome", Path(__file__).with_name("chrome.py"))
assert _SPEC is not None and _SPEC.loader is not None
chrome = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(chrome)
_KINETO = importlib.util.spec_from_file_location("kineto", Path(__file__).with_name("kineto.py"))
assert _KINETO is not None and _KINETO.loader is not None
kineto = importlib.util.module_from_spec(_KINETO)
_KINETO.loader.exec_module(kineto)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch.profiler writes with a schedule and stacks."""
    path = tmp_path_factory.mktemp("real") / "trace.json"
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3),
        record_shapes=True,
        with_stack=True,
        on_trace_ready=lambda p: p.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(5):
            model(torch.randn(4, 8))
            profiler.step()
    return path


def test_a_real_trace_is_read_with_its_steps_shapes_and_modules(real: Path) -> None:
    trace = foreign.read(real)
    assert trace.device == "cpu" and len(trace.steps) == 3
    products = [op for op in trace.ops if op.name == "aten::addmm" and op.step is not None]
    assert len(products) == 3 and all((4, 8) in op.shapes for op in products)
    assert {op.module for op in products} == {"Sequential_0.Linear_0"} and products[0].module_class == "Linear"
    notes = " ".join(trace.notes)
    assert "3 calls by their ProfilerStep" in notes and "no device events" in notes
    assert "no shapes" not in notes and "no stacks" not in notes


def test_gzip_is_known_by_its_content_and_plain_json_too(real: Path, tmp_path: Path) -> None:
    plain = foreign.read(real)
    disguised = tmp_path / "trace.json"
    disguised.write_bytes(gzip.compress(real.read_bytes()))
    assert foreign.read(disguised) == plain
    misnamed = tmp_path / "trace.json.gz"
    misnamed.write_bytes(real.read_bytes())
    assert foreign.read(misnamed) == plain


def test_a_gpu_trace_gives_what_the_parser_of_our_own_traces_gives(tmp_path: Path) -> None:
    events = chrome.gpu_events()
    found = foreign.read_foreign(chrome.written(tmp_path / "t.json.gz", chrome.document(events, chrome.H100, cuda_runtime_version=12080)))
    ours = [
        {**e, "name": STEP}
        if e.get("cat") == "user_annotation"
        else {k: v for k, v in e.items() if k != "args"} | {"args": e.get("args", {})}
        for e in events
    ]
    expected = from_chrome({"traceEvents": ours}, device="cuda:0")
    assert replace(found.trace, notes=()) == expected
    assert len(expected.kernels) == 6 and len(expected.copies) == 3 and expected.num_lost == 0
    assert found.device is not None and found.device.name == chrome.H100["name"] and found.device.capability == "9.0"
    assert found.vendor == "nvidia" and found.facts["cuda_runtime_version"] == "12.8" and found.num_events == len(events)


def test_without_steps_the_whole_trace_is_one_call_and_says_so(tmp_path: Path) -> None:
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document(chrome.gpu_events(has_steps=False))))
    assert len(trace.steps) == 1 and trace.num_lost == 0
    assert all(k.step == 0 for k in trace.kernels) and all(o.step == 0 for o in trace.ops)
    assert any("no ProfilerStep annotations" in note for note in trace.notes)


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document(chrome.gpu_events(has_shapes=False))))
    assert any("no shapes" in n for n in trace.notes) and any("no stacks" in n for n in trace.notes)
    launches = [e for e in chrome.gpu_events() if e.get("cat") not in ("kernel", "gpu_memcpy")]
    trace = foreign.read(chrome.written(tmp_path / "l.json", chrome.document(launches)))
    assert trace.device == "cpu" and any("runtime calls and no kernel" in n for n in trace.notes)
    kernels = [e for e in chrome.gpu_events() if e.get("cat") == "kernel"]
    trace = foreign.read(chrome.written(tmp_path / "k.json", chrome.document(kernels)))
    assert any("no host ops" in n for n in trace.notes) and any("no runtime calls" in n for n in trace.notes)


def test_an_amd_trace_is_read_and_named(tmp_path: Path) -> None:
    events = chrome.gpu_events(launch="hipLaunchKernel")
    found = foreign.read_foreign(chrome.written(tmp_path / "t.json", chrome.document(events, {"id": 0, "name": "AMD Instinct MI300X"})))
    assert found.vendor == "amd" and any("AMD trace" in n for n in found.trace.notes)
    assert all(k.op is not None for k in found.trace.kernels)


def test_an_intel_trace_is_read_and_named(tmp_path: Path) -> None:
    events = [
        {**e, "cat": "xpu_runtime", "name": "urEnqueueKernelLaunch"} if e.get("cat") == "cuda_runtime" else e for e in chrome.gpu_events()
    ]
    found = foreign.read_foreign(chrome.written(tmp_path / "t.json", chrome.document(events)))
    assert found.vendor == "intel" and any("Intel trace" in n for n in found.trace.notes)
    assert all(k.op is not None for k in found.trace.kernels) and {c.kind for c in found.trace.runtime} == {"launch"}


def test_other_accelerators_are_counted_and_not_read(tmp_path: Path) -> None:
    events = [
        *chrome.gpu_events(),
        {"ph": "X", "cat": "mtia_runtime", "name": "launch", "ts": 7e12, "dur": 1, "pid": 1, "tid": 1},
    ]
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document(events)))
    assert any("not read here: 1 mtia_runtime" in n for n in trace.notes)


def test_steps_of_several_ranks_and_nested_ones_are_told_apart(tmp_path: Path) -> None:
    events = chrome.gpu_events(3)
    other = [{**e, "pid": 2} for e in events if str(e.get("name")).startswith("ProfilerStep")][:2]
    nested = {**next(e for e in events if str(e.get("name")).startswith("ProfilerStep")), "dur": 10.0}
    nested["ts"] += 100
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document([*events, *other, nested])))
    assert len(trace.steps) == 3
    assert any("threads have steps of their own" in n for n in trace.notes) and any("lie inside others" in n for n in trace.notes)


def test_what_the_data_loader_fetched_is_kept(tmp_path: Path) -> None:
    name = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"
    fetch = {"ph": "X", "cat": "user_annotation", "name": name, "pid": 1, "tid": 1, "ts": 7.0e12 + 1, "dur": 3.0}
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document([*chrome.gpu_events(), fetch])))
    assert [(found.name, found.dur_ns) for found in trace.fetches] == [(name, 3000)]


def test_two_devices_are_told(tmp_path: Path) -> None:
    events = [{**e, "args": {**e["args"], "device": 1}} if e.get("cat") == "gpu_memcpy" else e for e in chrome.gpu_events()]
    assert any("devices 0, 1" in n for n in foreign.read(chrome.written(tmp_path / "t.json", chrome.document(events))).notes)


def test_old_category_names_and_the_array_form_are_read(tmp_path: Path) -> None:
    old = {"cpu_op": "Operator", "cuda_runtime": "Runtime", "kernel": "Kernel", "gpu_memcpy": "Memcpy"}
    events = [{**e, "cat": old.get(e.get("cat"), e.get("cat"))} for e in chrome.gpu_events() if e.get("cat") != "gpu_user_annotation"]
    new = foreign.read(chrome.written(tmp_path / "n.json", chrome.document(chrome.gpu_events())))
    assert foreign.read(chrome.written(tmp_path / "o.json", json.dumps(events))) == new
    assert foreign.read(chrome.written(tmp_path / "c.json", json.dumps(events)[:-1] + ",\n]")) == new


def _nan(key: str, value: str) -> str:
    text = json.dumps(chrome.document(chrome.gpu_events(1)))
    return text.replace(f'"{key}": 7000000000005.0' if key == "ts" else f'"{key}": 120.0', f'"{key}": {value}', 1)


BAD: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "white space": (b"  \n\t ", "begins with ''"),
    "binary": (bytes(range(256)) * 8, "no torch.profiler trace"),
    "a number": (b"42", "no torch.profiler trace"),
    "a string": (b'"trace"', "no torch.profiler trace"),
    "an empty object": (b"{}", "no traceEvents"),
    "other json": (b'{"version": 3, "cells": [1, 2]}', "no traceEvents (it has cells, version)"),
    "no list": (b'{"traceEvents": {"ph": "X"}}', "are no list"),
    "no objects": (b'{"traceEvents": [1, 2, 3]}', "no object"),
    "nested lists": (b'{"traceEvents": [[{"ph": "X"}]]}', "no object"),
    "no events": (b'{"traceEvents": []}', "without ops or device work"),
    "only labels": (b'{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "a", "ts": 1, "dur": 1}]}', "without ops"),
    "concatenated": (json.dumps(chrome.document(chrome.gpu_events(1))) * 2, "something after its end"),
    "a tail": (json.dumps(chrome.document(chrome.gpu_events(1))) + "]", "something after its end"),
    "twice": ('{"traceEvents": [], "traceEvents": []}', "key 'traceEvents' twice"),
    "json lines": (b'{"ph": "X", "cat": "cpu_op", "name": "a", "ts": 1, "dur": 1}\n{"ph": "X"}', "one event a line"),
    "traceEvents in traceEvents": (b'{"traceEvents": {"traceEvents": []}}', "are no list"),
    "traceEvents below": (b'{"data": {"traceEvents": []}}', "no traceEvents (it has data)"),
    "a byte order mark and nothing": (b"\xef\xbb\xbf", "begins with ''"),
    "single quotes": ("{'traceEvents': []}", "not valid JSON"),
    "missing comma": ('{"traceEvents": [{"ph": "X"} {"ph": "X"}]}', "',' was expected"),
    "broken event": ('{"traceEvents": [{"ph": "X"}, {"ph": X}, {"ph": "X"}' + " " * 100 + "]}", "not valid JSON"),
    "negative duration": (_nan("dur", "-3.0"), "dur '-3.0'"),
    "nan ts": (_nan("ts", "NaN"), "ts 'nan'"),
    "infinite ts": (_nan("ts", "1e999"), "ts 'inf'"),
    "text ts": (_nan("ts", '"now"'), "ts 'now'"),
    "true ts": (_nan("ts", "true"), "ts 'True'"),
    "far ts": (_nan("ts", "1e30"), "ts '1e+30'"),
    "infinite duration": (_nan("dur", "Infinity"), "dur 'inf'"),
    "null duration": (_nan("dur", "null"), "dur 'None'"),
    "a list as name": ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": ["a"], "ts": 1, "dur": 1}]}', "cannot be"),
    "nested lists without end": ('{"traceEvents": [{"ph": "X", "args": ' + "[" * 200_000, "nested deeper"),
    "nested objects": ('{"traceEvents": [{"ph": "X", "args": ' + '{"a":' * 200_000, "nested deeper"),
    "nested header": ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested deeper"),
    "a number without end": ('{"baseTimeNanoseconds": ' + "9" * 10_000 + "}", "not valid JSON"),
    "not gzip after all": (b"\x1f\x8b" + b"x" * 100, "damaged gzip"),
    "half a gzip": (gzip.compress(json.dumps(chrome.document(chrome.gpu_events(50))).encode())[:-200], "truncated or damaged gzip"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + b"x" * 100, "is a zstd file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason_and_a_remedy(name: str, tmp_path: Path) -> None:
    data, said = BAD[name]
    path = tmp_path / "trace.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(BadInput) as refused:
        foreign.read(path)
    assert said in refused.value.message and refused.value.fix and "\n" not in refused.value.message
    assert str(tmp_path) not in refused.value.message


def test_a_zip_and_a_folder_and_nothing_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("trace.json", "{}")
    (tmp_path / "trace.zip").write_bytes(file.getvalue())
    for path, said in ((tmp_path / "trace.zip", "is a zip file"), (tmp_path, "is no file"), (tmp_path / "gone.json", "does not exist")):
        with pytest.raises(BadInput, match=said):
            foreign.read(path)


@pytest.fixture(scope="module")
def text() -> bytes:
    return json.dumps(chrome.document(chrome.gpu_events(2), chrome.H100), indent=1).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 0.9999), is_gzip=st.booleans(), chunk=st.sampled_from([64, 333, 1 << 20]))
def test_every_prefix_of_a_trace_is_refused(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, is_gzip: bool, chunk: int
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    path = tmp_path / "t.json"
    cut = text[: int(len(text) * share)]
    path.write_bytes(gzip.compress(cut) if is_gzip else cut)
    with pytest.raises(BadInput):
        foreign.read(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunk=st.integers(5, 700))
def test_where_chunks_are_cut_changes_nothing(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 1 << 20)
    whole = foreign.read_foreign(path)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    assert foreign.read_foreign(path) == whole


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(max_size=40) | st.sampled_from(["},{", '"}, {"ph"', "}, {", "a\x00b", "\x1f"]), chunk=st.sampled_from([40, 200, 1 << 20])
)
def test_any_name_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    events = [
        {"ph": "X", "cat": "cpu_op", "name": name, "ts": i * 10, "dur": 5, "pid": 1, "tid": 1, "args": {"b": [{"c": 1}, {"d": 2}]}}
        for i in range(6)
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": events}, ensure_ascii=False), encoding="utf-8", errors="replace")
    assert [op.name for op in foreign.read(path).ops] == [name.encode(errors="replace").decode()] * 6


def test_control_characters_and_broken_utf8_in_names_are_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(b'\xef\xbb\xbf{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a\x01\xff", "ts": 1, "dur": 1}]}')
    assert foreign.read(path).ops[0].name == "a\x01�"


def test_a_gzip_bomb_is_refused_early(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"traceEvents": [')
        for _ in range(96):
            file.write(b" " * (1 << 20))
    with pytest.raises(BadInput, match="bomb"):
        foreign.read(path)


def test_limits_are_kept_and_can_be_raised(tmp_path: Path) -> None:
    path = chrome.written(tmp_path / "t.json", chrome.document(chrome.gpu_events(20)))
    squeezed = chrome.written(tmp_path / "t.json.gz", chrome.document(chrome.gpu_events(20)))
    for file in (path, squeezed):
        with pytest.raises(BadInput, match="at most") as refused:
            foreign.read(file, max_bytes=10_000)
        assert "--trace-limit" in refused.value.fix
    with pytest.raises(BadInput, match="more than 50 events"):
        foreign.read(path, max_events=50)
    assert len(foreign.read(path, max_events=5000).kernels) == 40


def test_one_event_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_VALUE_CHARS", 100_000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 10_000)
    path = chrome.written(tmp_path / "t.json", '{"traceEvents": [{"ph": "X", "name": "' + "a" * 1_000_000 + '"}]}')
    with pytest.raises(BadInput, match="one value of more than"):
        foreign.read(path)


def test_garbage_collection_is_on_again_after_a_refusal(tmp_path: Path) -> None:
    import gc

    with pytest.raises(BadInput):
        foreign.read(chrome.written(tmp_path / "t.json", "{"))
    assert gc.isenabled()


def _cost(path: Path) -> tuple[float, float, float]:
    """(events, CPU seconds, GiB at the peak) of the whole explanation, in a process of its own."""
    script = textwrap.dedent(
        """
        import re, sys, time
        from pathlib import Path
        from gpuopt.pipeline import elsewhere
        began = time.process_time()
        report = elsewhere.explain(Path(sys.argv[1]))
        # Not ru_maxrss: a child begins with its parent's, which is a test runner that has held much else.
        peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
        print(report.tables["trace"]["events"], time.process_time() - began, peak / 2**20)
        """
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    num_events, seconds, peak_gib = (float(word) for word in out.stdout.split())
    return num_events, seconds, peak_gib


@pytest.mark.slow
def test_a_million_events_are_explained_in_under_20_seconds_and_1_gib(tmp_path: Path) -> None:
    num_events, seconds, peak_gib = _cost(kineto.write(tmp_path / "million.json", 1_000_000))
    assert num_events >= 1_000_000 and seconds < 20 and peak_gib < 1.0


def test_50_000_events_cost_no_more_than_their_share_of_it(tmp_path: Path) -> None:
    """CPU time. A busy machine stretches it too, so it may be three times the share, beside what any trace costs: rules are imported."""
    num_events, seconds, peak_gib = _cost(kineto.write(tmp_path / "t.json", 50_000))
    assert num_events >= 50_000 and seconds < 3 * 20 * 50_000 / 1_000_000 + 4 and peak_gib < 0.6


def test_the_generated_trace_is_what_it_says(tmp_path: Path) -> None:
    path = kineto.write(tmp_path / "t.json", 10_000)
    num_events = len(json.loads(path.read_text())["traceEvents"])
    found = foreign.read_foreign(path)
    assert found.num_events == num_events >= 10_000
    assert all(k.op is not None and k.step is not None for k in found.trace.kernels)
    assert {found.trace.ops[k.op].name for k in found.trace.kernels if k.op is not None} >= {"aten::addmm", "aten::add"}


def test_a_few_impossible_events_are_left_out_and_told_and_many_are_refused(tmp_path: Path) -> None:
    events = chrome.gpu_events(100)
    bad = {"ph": "X", "cat": "kernel", "name": "broken", "pid": 0, "tid": 7, "ts": 7.0e12, "dur": -3.0, "args": {"correlation": 9999}}
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document([*events, bad])))
    assert len(trace.kernels) == 200 and any("1 events were left out" in n and "broken" in n for n in trace.notes)
    with pytest.raises(BadInput, match=r"broken.*; 5 of"):
        foreign.read(chrome.written(tmp_path / "t.json", chrome.document([*events, *[bad] * 5])))


def test_shapes_that_are_none_are_no_shapes(tmp_path: Path) -> None:
    for dims in ([["a", 2]], [[1e999, 2]], [[-1, 2]], [[10**30, 2]], [[2**40, 2**40]], "x", 5, [[[1], "a"]], [[True, 2]]):
        events = [{**e, "args": {**e["args"], "Input Dims": dims}} if e.get("name") == "aten::mm" else e for e in chrome.gpu_events(1)]
        text = json.dumps(chrome.document(events)).replace("Infinity", "1e999")
        assert all(op.shapes == () for op in foreign.read(chrome.written(tmp_path / "t.json", text)).ops)


def test_a_file_whose_events_stand_twice_is_read_once(tmp_path: Path) -> None:
    events = chrome.gpu_events()
    once = foreign.read(chrome.written(tmp_path / "o.json", chrome.document(events)))
    twice = foreign.read(chrome.written(tmp_path / "t.json", chrome.document([*events, *events])))
    assert (twice.ops, twice.kernels, twice.runtime, twice.steps) == (once.ops, once.kernels, once.runtime, once.steps)
    assert any("stand in the file twice" in n for n in twice.notes) and not any("twice" in n for n in once.notes)


def test_of_two_ranks_in_one_file_one_is_explained(tmp_path: Path) -> None:
    """Both count correlations and devices from the same numbers, and the second runs half a step later."""
    mine = chrome.gpu_events()
    other = [
        {**e, "pid": 2 if e.get("pid") == 1 else 0, "ts": e["ts"] + 480, "name": f"{e['name']}"} for e in chrome.gpu_events(2) if "ts" in e
    ]
    alone = foreign.read(chrome.written(tmp_path / "a.json", chrome.document(mine)))
    both = foreign.read(chrome.written(tmp_path / "b.json", chrome.document([*mine, *other])))
    assert (both.ops, both.kernels, both.copies, both.steps) == (alone.ops, alone.kernels, alone.copies, alone.steps)
    assert any("process 1 is explained, 6 device events of the others are left out" in n for n in both.notes)


def test_two_processes_without_correlations_are_told_apart_in_time() -> None:
    """All launches of such a file lie under one key: a walk through them for each kernel is quadratic."""
    rows, num = Rows(), 30_000
    rows.ops = [OpRow(float(i), 0.5, "aten::mm", f"{1 + i % 2}/1", None, (), ()) for i in range(2)]
    rows.calls = [CallRow(float(i), 0.5, "cudaLaunchKernel", f"{1 + i % 2}/1", None, None) for i in reversed(range(num))]
    works = [WorkRow(i + 0.75, 0.1, str(i), None, None, 0, 7, None, 0, None, None, None, None, None) for i in range(num)]
    rows.kernels = list(works)
    began = time.process_time()
    ranks.keep_process(rows, "1")
    assert rows.kernels == works[::2]
    assert time.process_time() - began < 5.0


def test_repeating_ranges_of_the_users_are_its_calls(tmp_path: Path) -> None:
    events = [
        {**e, "name": "serve"} if str(e["name"]).startswith("ProfilerStep") else e
        for e in chrome.gpu_events()
        if e.get("cat") != "gpu_user_annotation"
    ]
    inner = [{**e, "name": "attention", "ts": e["ts"] + 10, "dur": 30.0} for e in events if e["name"] == "serve"]
    trace = foreign.read(chrome.written(tmp_path / "t.json", chrome.document([*events, *inner])))
    assert [step.dur_ns for step in trace.steps][:2] == [1_000_000] * 2 and len(trace.steps) == 3
    assert all(k.step is not None for k in trace.kernels)
    assert any("the 3 ranges 'serve' are taken as its calls" in n for n in trace.notes)
    trace = foreign.read(chrome.written(tmp_path / "i.json", chrome.document([e for e in [*events, *inner] if e["name"] != "serve"])))
    assert len(trace.steps) == 1 and any("explained as one call" in n for n in trace.notes)


def test_stacks_name_the_users_lines(real: Path) -> None:
    trace = foreign.read(real)
    lines = {op.line for op in trace.ops if op.step is not None}
    assert any(line.startswith("test_foreign.py:") or "test_foreign.py:" in line for line in lines)
    assert not any("torch/nn" in line or "gpuopt/" in line for line in lines)
    assert any("the calling function begins" in n for n in trace.notes)
