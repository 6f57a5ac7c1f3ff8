"""pass@k is the unbiased estimator, and sample files are HumanEval's."""

from itertools import combinations

import pytest

from shared.errors import DatasetError
from student_trainer.evaluation.passk import (
    mean_pass_at_k,
    pass_at_k,
    read_samples,
    write_samples,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * correct + [False] * (n - correct), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)])
def test_impossible_counts_are_refused(n, correct, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples"):
        pass_at_k(n, correct, k)


def test_the_mean_is_over_problems():
    assert mean_pass_at_k([(2, 2), (2, 0)], 1) == 0.5


def test_samples_round_trip(tmp_path):
    samples = [{"task_id": "HumanEval/0", "completion": "    return '\n'", "passed": True}]
    write_samples(tmp_path / "samples.jsonl", samples)
    assert read_samples(tmp_path / "samples.jsonl") == samples


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"task_id": "a"}', '{"task_id": 1, "completion": ""}']
)
def test_lines_that_are_no_samples_are_named(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"task_id": "a", "completion": "b"}\n' + line)
    with pytest.raises(DatasetError, match=r"samples\.jsonl:2"):
        read_samples(path)
