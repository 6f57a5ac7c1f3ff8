"""The page's comparison with TRL on a published model is what `benchmarks.against_trl` measured."""

import json

import pytest

from tests.support.repository import ROOT

PAGE = (ROOT / "docs/explanation/performance.md").read_text()
FOUND = json.loads((ROOT / "docs/results/against_trl_real.json").read_text())
NAMES = {
    "TRL GKDTrainer": "trl_gkd",
    "TRL DistillationTrainer": "trl_distillation",
    "sparse-gkd": "ours",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_what_was_measured(name):
    key = NAMES[name]
    seconds, trainer, everything, held_out = (
        FOUND[f"{what}_{key}"] for what in ("seconds", "trainer_mib", "mib", "held_out")
    )
    row = f"| {name} | {seconds:.1f} | {trainer:,} | {everything:,} | {held_out:.2f} |"
    assert row in PAGE.replace("**", "")


def test_the_ratios_are_what_was_measured():
    def both(name):
        one, other = FOUND[f"{name}_real"], FOUND[f"{name}_real_distillation_trainer"]
        return f"{one:.2f} and {other:.2f}".replace("0.", ".")

    text = " ".join(PAGE.split())
    assert f"That is {both('speedup')} times as fast" in text
    assert f"in {both('trainer_memory_ratio')} of the memory" in text
    assert f"is {both('divergence_ratio')} times theirs" in text
    assert not FOUND["quick"]
