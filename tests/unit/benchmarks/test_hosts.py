"""The plans of `benchmarks.hosts`, and what it reads of a run."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.hosts import relative_difference
from benchmarks.hosts_parts import RANKS, SERVERS, last_step, losses, plan
from tests.support.weights import different_weights


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_kills_a_server_a_rank_and_the_teacher_and_is_its_seeds_own(seed):
    found = plan(seed, 30, None)
    assert found == plan(seed, 30, None) != plan(seed + 1, 30, None)
    steps = [fault.step for fault in found.faults]
    assert len(steps) == 6
    assert steps == sorted(set(steps))
    assert steps[0] >= 1
    assert steps[-1] < 30
    killed = [fault.host for fault in found.faults if fault.what == "killed"]
    assert [sum(host in group for host in killed) for group in (SERVERS, RANKS, ("teacher",))] == [
        1, 1, 1,
    ]  # fmt: skip


def test_a_short_plan_has_no_more_faults_than_it_is_told():
    assert len(plan(0, 8, 3).faults) == 3


def test_what_is_read_of_a_run(tmp_path):
    assert last_step(tmp_path) == 0
    rows = [{"step": step, "train/divergence": 1.0 / step} for step in (1, 2)]
    live = tmp_path / "_log_history.jsonl"
    live.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"train_runtime": 1.0}]))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert last_step(tmp_path) == 2
    assert losses(tmp_path) == [1.0, 0.5]
    assert relative_difference([1.0, 0.5], [1.0, 0.505]) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="shorter"):
        relative_difference([1.0, 0.5], [1.0])


def test_weights_are_equal_to_the_last_bit_or_not(tmp_path):
    weight = torch.ones(3)
    for name, value in (("a", weight), ("b", weight), ("c", weight.nextafter(weight + 1))):
        (tmp_path / name).mkdir()
        save_file({"w": value}, tmp_path / name / "model.safetensors")
    assert not different_weights(tmp_path / "a", tmp_path / "b")
    assert different_weights(tmp_path / "a", tmp_path / "c") == ["w"]
