"""Every rule finds its own seeded defect, and no rule finds anything on any clean twin.

A seed is a file in `seeds/`: CODE, `bad()`, `clean()`, and, where the defect has a known price, GAIN_MS.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from gpuopt.doctor.diagnose import diagnose
from gpuopt.doctor.price import WIDEST
from gpuopt.doctor.rule import rules


def seeds() -> dict[str, ModuleType]:
    found = {}
    for path in sorted((Path(__file__).parent / "seeds").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"seed_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module
    return found


SEEDS = seeds()


@pytest.mark.parametrize("name", SEEDS)
def test_a_seeded_defect_is_found_by_its_rule(name: str) -> None:
    seed = SEEDS[name]
    mine = [f for f in diagnose(seed.bad()) if f.code == seed.CODE]
    assert mine, f"{seed.CODE} does not see its own defect"
    for finding in mine:
        assert "rule failed" not in finding.message
        assert finding.message and finding.fix and finding.severity in ("error", "warning", "info")
        assert "\n" not in finding.message and "\n" not in finding.fix
        assert finding.change is None or rules()[finding.code].has_change
        low, high = finding.gain_low_ms, finding.gain_high_ms
        assert (low is None) == (high is None)
        if low is not None and high is not None:
            assert 0 <= low <= high <= WIDEST * low + 1e-9
    gain = getattr(seed, "GAIN_MS", None)
    if gain is not None:
        low, high = sum(f.gain_low_ms or 0.0 for f in mine), sum(f.gain_high_ms or 0.0 for f in mine)
        assert low <= gain <= high, (low, gain, high)


@pytest.mark.parametrize("name", SEEDS)
def test_nothing_at_all_is_found_on_a_clean_twin(name: str) -> None:
    assert [(f.code, f.message) for f in diagnose(SEEDS[name].clean())] == []


def test_every_rule_has_a_seed_and_every_seed_a_rule() -> None:
    assert {seed.CODE for seed in SEEDS.values()} == set(rules())


@pytest.mark.parametrize("code", list(rules()))
def test_a_page_says_everything_in_plain_sentences(code: str) -> None:
    rule = rules()[code]
    assert rule.what.endswith(".") and rule.why.endswith(".") and rule.before and rule.after and rule.before != rule.after
    assert rule.name == rule.name.lower() and " " not in rule.name and rule.needs
    assert len({r.name for r in rules().values()}) == len(rules())
