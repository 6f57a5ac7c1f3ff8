"""The comparison's own arithmetic, on rows small enough to check."""

import pytest
import torch

from benchmarks.accuracy_vs_k import Case
from benchmarks.logprob_dtype import answers, compare

V = 100


@pytest.fixture
def case():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 40, V, dtype=torch.float64)
    return Case("small", student, teacher, torch.arange(40))


def test_answers_name_the_same_tokens_and_sum_to_one_unless_rounded(case):
    found = answers(case)
    off = {}
    for sent, teacher in found.items():
        assert teacher.token_ids.tolist() == found["float32"].token_ids.tolist()
        total = teacher.logprobs.double().exp().sum(1) + teacher.tail_logprob.double().exp()
        off[sent] = float((total - 1.0).abs().max())
    assert off["float32"] < 1e-6
    assert off["normalized"] < 1e-6
    assert off["rounded"] > 2e-5


def test_normalizing_brings_the_divergence_to_itself_to_zero(case):
    results = {(r.beta, r.sent): r for r in compare(case)}
    assert len(results) == 6
    for beta in (0.0, 1.0):
        assert results[beta, "normalized"].to_itself < 1e-6
        assert results[beta, "rounded"].to_itself > 2e-5
    assert all(0.0 < r.gradient_error < 1e-3 for r in results.values())
