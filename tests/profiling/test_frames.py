"""Frames as torch.profiler names them -> lines somebody can change."""

from __future__ import annotations

import pytest

from gpuopt.profiling.frames import line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("src/infer.py(12): load", "src/infer.py:12 in load"),
        ("/srv/app/main.py(3): <module>", "/srv/app/main.py:3 in <module>"),
        ("transformers/models/bert/modeling_bert.py(210): forward", "transformers/models/bert/modeling_bert.py:210 in forward"),
        ("/opt/venv/lib/python3.12/site-packages/timm/layers/mlp.py(40): forward", "timm/layers/mlp.py:40 in forward"),
        ("/srv/queue/worker.py(8): run", "/srv/queue/worker.py:8 in run"),
        ("torch/nn/modules/module.py(1751): _call_impl", ""),
        ("/opt/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py(125): forward", ""),
        ("/usr/lib/python3.12/threading.py(1075): run", ""),
        ("threading.py(1075): run", ""),
        ("contextlib.py(132): __enter__", ""),
        ("/tmp/torchinductor_me/ab/cab.py(100): call", ""),
        ("<built-in function linear>", ""),
        ("<string>(1): <module>", ""),
        ("nn.Module: Linear_0", ""),
    ],
)
def test_a_frame_is_a_line_of_the_users_or_nothing(name: str, said: str) -> None:
    assert line(name) == said
