"""A preset's settings under the user's own, and a reader that survives what the compiler does to it."""

from __future__ import annotations

import copy

import pytest
import torch

from gpuopt.core.errors import UsageError
from gpuopt.core.tally import Tally
from gpuopt.programs import inductor

PRESETS = {"default": {}, "tuned": {"max_autotune": True}}


def test_what_the_user_sets_wins_over_the_preset_and_our_own_keys_stay_out() -> None:
    found = inductor.settings("aoti", PRESETS, {"preset": "tuned", "max_autotune": False, "precision": "fp16"}, own=("preset", "precision"))
    assert found == {**inductor.QUIET, "max_autotune": False}


def test_an_unknown_preset_or_setting_is_named_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="aoti has no preset 'fast'") as caught:
        inductor.settings("aoti", PRESETS, {"preset": "fast"}, own=("preset",))
    assert caught.value.fix == "one of: default, tuned"
    with pytest.raises(UsageError, match="no option 'max_autotun'") as caught:
        inductor.settings("inductor", PRESETS, {"max_autotun": True}, own=(), names="fullgraph, or ")
    assert caught.value.fix.startswith("fullgraph, or a name in")


def test_a_copy_of_a_reader_is_the_reader() -> None:
    reader = inductor.GraphReader(Tally())
    copied = copy.deepcopy({"pass": reader})["pass"]
    copied(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)).graph)
    assert copied is reader and reader.num_graphs == 1 and reader.uuid() is None
