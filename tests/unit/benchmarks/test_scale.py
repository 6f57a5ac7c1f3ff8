"""The step on paper: parts that sum up, more GPUs that never hurt, staleness that hides."""

import math
from dataclasses import asdict, fields, replace

import pytest

from benchmarks.scale import (
    BUDGETS,
    LIMIT,
    costs_of_gpu_check,
    first_limit,
    measure_client,
    point,
    points,
)
from benchmarks.scale_model import (
    COSTS,
    SOURCES,
    WORKLOAD,
    Costs,
    Split,
    best_split,
    controlling,
    decoding,
    ideal_gpu_seconds,
    scoring,
    step_of,
    submitting,
    training,
)

SPLIT = Split(4, 2, 8)
SAFE = replace(COSTS, failure=math.inf)


def test_a_score_and_a_training_pass_by_hand():
    tokens = 1024 * 1024
    assert scoring(WORKLOAD, COSTS, 4) == pytest.approx(tokens * 66e9 / (4 * 0.5 * 989e12))
    assert training(WORKLOAD, COSTS, 8) == pytest.approx(tokens / 8 * 60.8e9 / (0.4 * 989e12))


def test_writing_reads_weights_and_caches_once_a_token_by_hand():
    work = replace(WORKLOAD, completions=64)
    prefill = 64 * 512 * 15.2e9 / (0.5 * 989e12)
    read = 15.2e9 + 64 / 2 * 57_344 * (512 + 256)
    assert decoding(work, COSTS, 1) == pytest.approx(prefill + 1024 * read / (0.6 * 4.8e12))


def test_completions_that_do_not_fit_are_written_after_the_others():
    small = replace(COSTS, memory=2 * (2 * WORKLOAD.student) / 0.9)
    at_once = int(2 * WORKLOAD.student / (WORKLOAD.cache_bytes * 1536))
    fits = decoding(replace(WORKLOAD, completions=at_once), small, 1)
    assert decoding(replace(WORKLOAD, completions=2 * at_once), small, 1) == pytest.approx(2 * fits)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("split", [SPLIT, Split(2, 30, 32)], ids=["train", "write"])
def test_the_parts_sum_to_the_step(staleness, split):
    work = replace(WORKLOAD, staleness=staleness)
    step = step_of(work, COSTS, split)
    assert min(step.parts().values()) >= 0
    assert sum(step.parts().values()) == pytest.approx(step.seconds)
    served = max(decoding(work, COSTS, split.rollout), scoring(work, COSTS, split.teacher))
    own = training(work, COSTS, split.trainer) + submitting(work, COSTS, split.trainer)
    both = max(served, own) if staleness else served + own
    assert step.seconds == pytest.approx(step.weights + step.control + both + step.failures)


@pytest.mark.parametrize("split", [SPLIT, Split(2, 30, 32)], ids=["train", "write"])
def test_staleness_hides_the_smaller_of_the_two(split):
    fresh, stale = (
        step_of(replace(WORKLOAD, staleness=staleness), SAFE, split) for staleness in (0, 1)
    )
    served = fresh.rollouts + fresh.teacher
    own = fresh.train + fresh.client
    assert fresh.seconds - stale.seconds == pytest.approx(min(served, own))


@pytest.mark.parametrize("staleness", [0, 1])
def test_more_gpus_are_never_slower_at_the_best_split(staleness):
    work = replace(WORKLOAD, staleness=staleness)
    seconds = []
    for gpus in BUDGETS:
        split = best_split(work, SAFE, gpus)
        assert split.gpus <= gpus
        assert split.teacher % work.teacher_gpus == 0
        seconds.append(step_of(work, SAFE, split).seconds)
    assert seconds == sorted(seconds, reverse=True)


def test_the_best_split_is_the_best_of_all():
    every = [
        Split(t, r, 16 - t - r) for t in range(2, 13, 2) for r in range(1, 14) if 16 - t - r >= 2
    ]
    best = best_split(WORKLOAD, SAFE, 16)
    least = min(step_of(WORKLOAD, SAFE, split).seconds for split in every)
    assert step_of(WORKLOAD, SAFE, best).seconds <= least * (1 + 1e-9)


def test_no_step_is_shorter_than_the_ideal():
    for one in points(COSTS, (8, 64)):
        assert 0 < one.efficiency <= 1
        work = replace(WORKLOAD, completions=one.completions)
        ideal = ideal_gpu_seconds(work, COSTS)
        assert one.seconds * one.gpus * one.efficiency == pytest.approx(ideal)


def test_servers_one_after_another_are_the_limit_that_calling_them_at_once_takes_away():
    work = replace(WORKLOAD, completions=32 * 512)
    apart = replace(COSTS, together=False)
    assert controlling(apart, 64) > 50 * controlling(COSTS, 64)
    before, after = (point("growing", work, costs, 512) for costs in (apart, COSTS))
    assert before.limit == "control calls and probes"
    assert after.limit != "control calls and probes"
    assert after.seconds < before.seconds
    assert first_limit([after, before]) is before
    assert before.gain >= LIMIT


def test_too_few_gpus_are_refused():
    with pytest.raises(ValueError, match="3 GPUs do not hold"):
        best_split(WORKLOAD, COSTS, 3)


def test_each_cost_has_a_source():
    assert set(SOURCES) == {field.name for field in fields(Costs)}


def test_what_a_gpu_measured_replaces_what_was_assumed():
    content = {
        "machine": {"device": "NVIDIA H100"},
        "parts": {
            "a": {"name": "teacher, 7B", "rows": [{"tokens/s": 9000}, {"tokens/s": 6506.58}]}
        },
    }
    found = costs_of_gpu_check(content, COSTS)
    assert found.bandwidth == 3.35e12
    assert found.prefill_share == pytest.approx(0.1)
    assert asdict(found) == {
        **asdict(COSTS), "bandwidth": 3.35e12, "prefill_share": found.prefill_share
    }  # fmt: skip


def test_the_client_is_measured():
    found = measure_client(4)
    assert set(found) == {"client_rollout", "client_request", "client_token"}
    assert 0 < found["client_rollout"] < 1
    assert 0 < found["client_request"] < 1
