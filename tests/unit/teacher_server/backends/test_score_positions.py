"""Rows of hidden states become sparse log-probs with an exact tail."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InternalError
from shared.protocol import ScoreSequence
from teacher_server.backends import scoring
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.scoring import score_positions, top_k
from tests.support.reference import largest_error

V = 23


def job(rng, rows, **options):
    start = int(rng.integers(1, 4))
    ids = rng.integers(0, V, start + rows).astype(np.uint32)
    return ScoreJob(ids, start, **{"top_k": 3, **options})


def reference(logits, jobs):
    """Float64 log-softmax for each job, from the float32 logits of all rows."""
    parts = np.split(logits.numpy().astype(np.float64), np.cumsum([j.rows for j in jobs])[:-1])
    for part, item in zip(parts, jobs, strict=True):
        scaled = part / item.temperature
        scaled -= scaled.max(axis=1, keepdims=True)
        yield scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def sequence(item):
    return ScoreSequence(
        token_ids=item.token_ids,
        completion_start=item.completion_start,
        requested_token_ids=item.requested_token_ids,
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mixture_of_jobs_equals_the_dense_reference(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    jobs = []
    for _ in range(data.draw(st.integers(1, 5))):
        rows = data.draw(st.integers(1, 6))
        width = data.draw(st.none() | st.integers(0, 3))
        requested = None if width is None else rng.integers(0, V, (rows, width)).astype(np.uint32)
        jobs.append(
            job(
                rng,
                rows,
                top_k=data.draw(st.sampled_from([1, 2, 5, V])),
                temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
                requested_token_ids=requested,
            )
        )
    logits = torch.from_numpy(rng.normal(0, 4, (sum(j.rows for j in jobs), V)).astype(np.float32))
    whole = score_positions(logits, torch.clone, jobs, V)
    for answer, dense, item in zip(whole, reference(logits, jobs), jobs, strict=True):
        assert largest_error(answer, dense, sequence(item)) < 1e-5


def test_chunks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    jobs = [job(rng, rows, top_k=k) for rows, k in ((7, 3), (2, 5), (9, 3))]
    hidden = torch.from_numpy(rng.normal(size=(18, 8)).astype(np.float32))
    head = torch.nn.Linear(8, V)
    whole = score_positions(hidden, head, jobs, V)
    sizes = []

    def watched(rows):
        sizes.append(len(rows))
        return head(rows)

    chunked = score_positions(hidden, watched, jobs, V, 4 * V * 4)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)
        np.testing.assert_allclose(a.tail_logprob, b.tail_logprob, atol=1e-6)
    assert sizes == [4, 4, 4, 4, 2]
    monkeypatch.setattr(scoring, "SLICE_BYTES", 3 * V * 4)
    for a, b in zip(whole, score_positions(hidden, head, jobs, V), strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.tail_logprob, b.tail_logprob, atol=1e-6)


def draws(logits, key, k):
    rows = len(logits)
    one = ScoreJob(np.zeros(rows + 1, np.uint32), 1, top_k=k, draw_key=key)
    return score_positions(logits.clone(), torch.clone, [one], V)[0]


def test_draws_come_as_often_as_they_are_probable_with_exact_log_probs():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (3, V)).astype(np.float32))
    logits[:, 5] = -torch.inf  # never drawn, wherever a point falls
    dense = logits.double().log_softmax(dim=1).numpy()
    answers = [draws(logits, bytes([i]), 500) for i in range(40)]
    ids = np.concatenate([answer.token_ids for answer in answers], axis=1).astype(int)
    found = np.concatenate([answer.logprobs for answer in answers], axis=1)
    np.testing.assert_allclose(found, np.take_along_axis(dense, ids, 1), atol=1e-5)
    for row in range(3):
        p = np.exp(dense[row])
        counts = np.bincount(ids[row], minlength=V)
        assert (abs(counts - 20_000 * p) <= 4.5 * np.sqrt(20_000 * p * (1 - p))).all()


def test_an_improbable_token_is_drawn_as_often_as_it_is_probable():
    """A cumulative distribution in float32 has no steps as small as these."""
    logits = torch.zeros(1, 1 << 16)
    logits[0, 0] = np.log(2.0**30)  # the others: 2⁻³⁰ each, 6e-5 together
    points = torch.linspace(1 - 6e-5, 1 - 1e-9, 1000, dtype=torch.float64)[None]
    ids = scoring.draw(logits, points)[0]
    assert len(set(ids.tolist())) == 1000
    assert (ids[1:] > ids[:-1]).all()


def test_the_tail_beside_draws_holds_all_that_is_not_named_once():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 1, (6, V)).astype(np.float32))
    one = job(
        rng,
        6,
        top_k=9,
        draw_key=b"k",
        requested_token_ids=rng.integers(0, V, (6, 2)),
        temperature=2.0,
    )
    [answer] = score_positions(logits.clone(), torch.clone, [one], V)
    [dense] = reference(logits, [one])
    following = one.token_ids[one.completion_start :, None]
    named = np.concatenate([answer.token_ids, following, one.requested_token_ids], axis=1)
    for row in range(6):
        rest = np.exp(np.delete(dense[row], np.unique(named[row].astype(int)))).sum()
        assert np.exp(answer.tail_logprob[row]) == pytest.approx(rest, abs=1e-6)
    wanted = np.take_along_axis(dense, one.requested_token_ids.astype(int), 1)
    np.testing.assert_allclose(answer.requested_logprobs, wanted, atol=1e-5)


def test_draws_do_not_depend_on_the_company_nor_on_how_rows_are_cut():
    rng = np.random.default_rng(0)
    jobs = [job(rng, rows, top_k=5, draw_key=key) for rows, key in ((7, b"a"), (4, b"b"))]
    jobs.insert(1, job(rng, 3, top_k=5))
    logits = torch.from_numpy(rng.normal(0, 2, (14, V)).astype(np.float32))
    whole = score_positions(logits.clone(), torch.clone, jobs, V, 4 * V * 4)
    for answer, item, rows in zip(whole, jobs, logits.split([7, 3, 4]), strict=True):
        [alone] = score_positions(rows.clone(), torch.clone, [item], V)
        np.testing.assert_array_equal(alone.token_ids, answer.token_ids)
    later = replace(jobs[0], completion_start=jobs[0].completion_start + 2)
    [rest] = score_positions(logits[2:7].clone(), torch.clone, [later], V)
    np.testing.assert_array_equal(rest.token_ids, whole[0].token_ids[2:])


def test_the_order_of_equal_tokens_does_not_depend_on_the_company():
    rng = np.random.default_rng(0)
    small, large = job(rng, 4, top_k=2), job(rng, 4, top_k=V)
    logits = torch.zeros(8, V)
    alone = score_positions(logits[:4], torch.clone, [small], V)[0]
    together = score_positions(logits, torch.clone, [small, large], V)[0]
    np.testing.assert_array_equal(alone.token_ids, together.token_ids)


def test_a_tiny_tail_is_exact_and_an_empty_one_is_minus_infinity():
    logits = torch.zeros(1, V)
    logits[0, 0] = 60.0
    one = ScoreJob(np.array([5, 0], np.uint32), 1, top_k=1)
    tail = score_positions(logits.clone(), torch.clone, [one], V)[0].tail_logprob[0]
    assert tail == pytest.approx(np.log(V - 1) - 60.0, abs=1e-5)  # 1 − p is 0 in float32
    everything = ScoreJob(np.array([5, 0], np.uint32), 1, top_k=V)
    assert score_positions(logits, torch.clone, [everything], V)[0].tail_logprob[0] == -np.inf


@pytest.mark.parametrize("height", [60.0, 80.0, 200.0])
def test_a_tail_beyond_float32s_range_is_exact(height):
    """e^−200 is no float32; its logarithm is."""
    logits = torch.zeros(2, 4000)
    logits[:, 7] = torch.tensor([height, 1.0])  # beside a row of the usual kind
    one = ScoreJob(np.array([5, 0, 0], np.uint32), 1, top_k=1)
    tails = score_positions(logits, torch.clone, [one], 4000)[0].tail_logprob
    assert tails[0] == pytest.approx(np.log(3998) - height, abs=1e-4)  # all but tokens 7 and 0
    assert tails[1] == pytest.approx(np.log(3998 / (3999 + np.e)), abs=1e-6)


@pytest.mark.parametrize("vocab_size", [320, 1000, 1023, 4096])
@pytest.mark.parametrize("k", [1, 2, 5, 16, 64])
def test_ranking_blocks_first_finds_what_torch_finds(vocab_size, k):
    rng = np.random.default_rng(vocab_size + k)
    logits = torch.from_numpy(rng.normal(size=(40, vocab_size)).astype(np.float32))
    logits[:10].round_(decimals=1)  # many equal
    logits[10:20, 50:] = -torch.inf  # fewer to choose from than blocks
    logits[20:30, -9:] += 9.0  # the last columns, which fill no block of their own
    logits[30:, 64:96] += 9.0  # all in one block
    values, ids = top_k(logits, k)
    torch.testing.assert_close(values, logits.topk(k, dim=-1).values, rtol=0, atol=0)
    torch.testing.assert_close(values, logits.gather(1, ids), rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())
    logits[3, 77] = torch.nan
    assert top_k(logits, k)[0][3].isnan().any()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_wide_vocabulary_is_scored_like_a_narrow_one(temperature):
    rng = np.random.default_rng(3)
    wide = 3001
    logits = torch.from_numpy(rng.normal(0, 4, (300, wide)).astype(np.float32))
    ids = rng.integers(0, wide, 301).astype(np.uint32)
    one = ScoreJob(ids, 1, top_k=20, temperature=temperature)
    [answer] = score_positions(logits, torch.clone, [one], wide)
    dense = (logits.double() / temperature).log_softmax(dim=-1).numpy()
    assert largest_error(answer, dense, sequence(one)) < 1e-5


def test_the_next_and_requested_tokens_leave_the_tail_once():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    named_twice = ScoreJob(
        np.array([0, 2], np.uint32),
        1,
        top_k=1,
        requested_token_ids=np.array([[2, 0, 2]], np.uint32),
    )
    answer = score_positions(logits, torch.clone, [named_twice], 4)[0]
    assert np.exp(answer.tail_logprob[0]) == pytest.approx(0.3 + 0.1)
    assert np.exp(answer.next_token_logprob[0]) == pytest.approx(0.2)
    np.testing.assert_allclose(np.exp(answer.requested_logprobs), [[0.2, 0.4, 0.2]], rtol=1e-6)


def test_float16_answers_never_become_infinite():
    logits = torch.zeros(1, V)
    logits[0, 1:] = -1e6
    half = ScoreJob(
        np.array([0, 3], np.uint32), 1, top_k=2, logprob_dtype="float16",
        requested_token_ids=np.array([[4]], np.uint32),
    )  # fmt: skip
    answer = score_positions(logits, torch.clone, [half], V)[0]
    assert answer.logprobs.dtype == np.float16
    assert answer.logprobs.tolist() == [[0.0, -65504.0]]
    assert answer.requested_logprobs.tolist() == [[-65504.0]]
    assert answer.next_token_logprob.tolist() == [-1e6]
    assert answer.tail_logprob.dtype == np.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.zeros(3, V)
    logits[1, 7] = value
    rng = np.random.default_rng(0)
    with pytest.raises(InternalError, match="not finite in a sequence of"):
        score_positions(logits, torch.clone, [job(rng, 3)], V)
