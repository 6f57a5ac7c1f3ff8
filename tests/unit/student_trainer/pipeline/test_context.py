"""The divergence that a teacher's own prompt causes, from the scores of both."""

import numpy as np
import pytest

from shared.sparse import SparseLogprobs
from student_trainer.pipeline.context import context_divergence


def scores(logprobs, ids, requested=None):
    rows = len(ids)
    return SparseLogprobs(
        token_ids=np.asarray(ids, np.uint32),
        logprobs=np.take_along_axis(logprobs, np.asarray(ids), 1).astype(np.float32),
        next_token_logprob=np.zeros(rows, np.float32),
        tail_logprob=np.zeros(rows, np.float32),
        requested_logprobs=requested,
    )


@pytest.mark.parametrize("named", [2, 3, 7])
def test_it_is_the_divergence_over_the_top_k_and_the_rest(named):
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.ones(7), 5)) for _ in range(2))  # [T, V]
    ids = np.argsort(-p, axis=1)[:, :3]
    asked = ids[:, :named]
    of_q = np.take_along_axis(q, asked, 1).astype(np.float32)
    found = context_divergence(scores(p, ids), scores(q, ids, of_q))
    for row in range(5):
        p_named, q_named = np.exp(p[row, asked[row]]), np.exp(q[row, asked[row]])
        outcomes = [*zip(p_named, q_named, strict=True), (1 - p_named.sum(), 1 - q_named.sum())]
        expected = sum(a * np.log(a / b) for a, b in outcomes)
        dense = (np.exp(p[row]) * (p[row] - q[row])).sum()
        assert found[row] == pytest.approx(expected, abs=1e-5)
        assert 0 <= found[row] <= dense + 1e-5


def test_it_is_nothing_where_the_teacher_is_the_same():
    p = np.log(np.random.default_rng(1).dirichlet(np.ones(6), 4))
    ids = np.argsort(-p, axis=1)[:, :6]
    same = np.take_along_axis(p, ids, 1).astype(np.float32)
    assert np.abs(context_divergence(scores(p, ids), scores(p, ids, same))).max() < 1e-6
