"""Outputs in plain containers, and copies of them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gpuopt.core.errors import Unsupported
from gpuopt.programs.plain import plain

Point = namedtuple("Point", "a b")


@dataclass
class Box:
    first: Any
    second: Any = None


def test_outputs_become_plain_containers_without_their_nones() -> None:
    t = torch.zeros(1)
    found = plain({"box": Box(t), "point": Point(t, 3), "list": [t, None], "none": None})
    assert set(found) == {"box", "point", "list"}
    assert type(found["box"]) is dict and set(found["box"]) == {"first"}
    assert type(found["point"]) is tuple and found["point"][1] == 3
    assert found["list"][1] is None


def test_an_output_nobody_can_read_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="object"):
        plain({"x": object()})
