"""The scores of a served teacher equal a plain float32 forward pass, whatever the batching."""

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from shared import wire
from shared.protocol import ScoreRequest, ScoreResponse, ScoreSequence
from tests.support.http import engine_metric, metric, post
from tests.support.reference import dense_logprobs, largest_error, load_model
from tests.support.server import running_server
from tests.support.vllm import only

BOTH = (wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)
V = 272


def sequence(rng, length, requested, vocab_size):
    start = int(rng.integers(1, length))
    ids = None
    if requested:
        ids = rng.integers(0, vocab_size, (length - start, requested)).astype(np.uint32)
    return ScoreSequence(
        token_ids=rng.integers(0, vocab_size, length).astype(np.uint32),
        completion_start=start,
        requested_token_ids=ids,
    )


def request(seed, count, top_k, temperature, longest=256, vocab_size=V, **options):
    rng = np.random.default_rng(seed)
    return ScoreRequest(
        sequences=[
            sequence(rng, int(rng.integers(2, longest + 1)), int(rng.integers(0, 5)), vocab_size)
            for _ in range(count)
        ],
        top_k=top_k,
        temperature=temperature,
        **options,
    )


def error(model, asked, answer):
    assert len(answer.sequences) == len(asked.sequences)
    return max(
        largest_error(
            scores,
            dense_logprobs(model, one.token_ids, one.completion_start, asked.temperature),
            one,
        )
        for one, scores in zip(asked.sequences, answer.sequences, strict=True)
    )


@pytest.mark.parametrize("media_type", BOTH)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 20, V])
def test_scores_equal_a_plain_forward_pass(teacher, top_k, temperature, media_type):
    asked = request(top_k, 5, top_k, temperature, longest=64)
    answer = post(f"{teacher.url}/v1/score", asked, ScoreResponse, media_type)
    assert error(teacher.model, asked, answer) < teacher.tolerance
    if top_k == V:
        assert all(np.isneginf(scores.tail_logprob).all() for scores in answer.sequences)


def test_every_k_is_exact(teacher):
    for top_k in range(1, V, 17):
        asked = request(top_k, 1, top_k, 1.0, longest=12)
        answer = post(f"{teacher.url}/v1/score", asked, ScoreResponse, wire.MSGPACK_MEDIA_TYPE)
        assert error(teacher.model, asked, answer) < teacher.tolerance


def scored_and_batches(teacher):
    """Sequences scored so far, and steps of the model."""
    if teacher.backend == "vllm":
        names = ("request_success_total", "iteration_tokens_total_count")
        return tuple(engine_metric(teacher.url, name) for name in names)
    return tuple(
        metric(teacher.url, f'teacher_batch_size_{part}{{kind="score"}}')
        for part in ("sum", "count")
    )


def test_many_clients_are_joined_and_each_gets_its_own_answer(teacher):
    random.seed(0)
    requests = [
        request(seed, random.randint(1, 6), random.choice([1, 3, 64, V]), temperature)
        for seed, temperature in enumerate([0.5, 1.0, 2.0] * 12)
    ]
    before = scored_and_batches(teacher)

    def send(asked):
        media_type = random.choice(BOTH)
        return post(f"{teacher.url}/v1/score", asked, ScoreResponse, media_type)

    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(send, requests))
    worst = max(error(teacher.model, *pair) for pair in zip(requests, answers, strict=True))
    assert worst < teacher.tolerance
    sequences, batches = np.subtract(scored_and_batches(teacher), before)
    assert sequences == sum(len(asked.sequences) for asked in requests)
    # 129 tokens on average in batches of 2,048: about 12 sequences each, from several requests.
    assert 0 < batches <= sequences / 4


@only("transformers")
def test_one_batch_holds_the_sequences_of_one_request(teacher):
    name = 'teacher_batch_size_bucket{kind="score",le="16.0"}'
    before = metric(teacher.url, name)
    one = request(1, 1, 5, 1.0, longest=20)
    asked = one.model_copy(update={"sequences": one.sequences * 16})  # without padding
    post(f"{teacher.url}/v1/score", asked, ScoreResponse, wire.MSGPACK_MEDIA_TYPE)
    assert metric(teacher.url, name) - before == 1


def test_half_precision_rounds_and_keeps_the_exact_tail(teacher):
    full = request(3, 3, 10, 1.0, longest=40)
    half = full.model_copy(update={"logprob_dtype": "float16"})
    a, b = (
        post(f"{teacher.url}/v1/score", asked, ScoreResponse, wire.MSGPACK_MEDIA_TYPE).sequences
        for asked in (full, half)
    )
    for exact, rounded in zip(a, b, strict=True):
        assert rounded.logprobs.dtype == np.float16
        np.testing.assert_allclose(rounded.logprobs, exact.logprobs, rtol=2**-10)
        np.testing.assert_allclose(rounded.tail_logprob, exact.tail_logprob, atol=teacher.tolerance)
        assert rounded.tail_logprob.dtype == exact.tail_logprob.dtype == np.float32


def test_draws_are_the_same_in_any_company_and_come_from_the_whole_distribution(teacher):
    asked = request(9, 6, 32, 1.5, longest=60, sample_seed=11)

    def drawn(sequences, **changes):
        part = asked.model_copy(update={"sequences": sequences, **changes})
        media_type = wire.MSGPACK_MEDIA_TYPE
        return post(f"{teacher.url}/v1/score", part, ScoreResponse, media_type).sequences

    together = drawn(asked.sequences)
    halves = drawn(asked.sequences[:2]) + drawn(asked.sequences[2:])
    differ = rows = 0
    deviations = []
    for one, scores, again in zip(asked.sequences, together, halves, strict=True):
        dense = dense_logprobs(teacher.model, one.token_ids, one.completion_start, 1.5)
        ids = scores.token_ids.astype(int)
        expected = np.take_along_axis(dense, ids, 1)
        np.testing.assert_allclose(scores.logprobs, expected, atol=teacher.tolerance)
        # A batch rounds otherwise than a part of it: a draw at the edge of a token may fall beside.
        differ += (scores.token_ids != again.token_ids).sum()
        rows += len(ids)
        p = np.exp(dense)
        own = -(p * dense).sum(1)  # what −log p of a draw is in the mean
        variance = (p * dense**2).sum(1) - own**2
        deviations += list((-expected.mean(1) - own) / np.sqrt(variance / 32))
    assert differ <= 32 * rows * 1e-3
    assert abs(np.mean(deviations)) < 4.5 / np.sqrt(rows)
    assert abs(np.std(deviations) - 1) < 0.3  # independent draws, and rows
    [other] = drawn(asked.sequences[:1], sample_seed=12)
    assert (other.token_ids != together[0].token_ids).mean() > 0.5


def test_scoring_again_gives_the_same_bytes(teacher):
    asked = wire.dump(request(5, 4, 8, 1.3), wire.MSGPACK_MEDIA_TYPE)
    headers = {"content-type": wire.MSGPACK_MEDIA_TYPE, "x-request-id": "same"}
    first, second = (
        httpx.post(f"{teacher.url}/v1/score", content=asked, headers=headers).content
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 50])
def test_scores_of_another_family_equal_its_plain_forward_pass(strict, top_k, temperature):
    asked = request(top_k, 5, top_k, temperature, longest=64, vocab_size=260)
    answer = post(f"{strict.url}/v1/score", asked, ScoreResponse, wire.MSGPACK_MEDIA_TYPE)
    assert error(strict.model, asked, answer) < strict.tolerance


def bfloat16_differences(model, asked, answer):
    """|served − ``model``| of every top-k and next-token log-prob."""
    parts = []
    for one, scores in zip(asked.sequences, answer.sequences, strict=True):
        dense = dense_logprobs(model, one.token_ids, one.completion_start, 1.0)
        following = one.token_ids[one.completion_start :, None].astype(np.int64)
        parts.append(scores.logprobs - np.take_along_axis(dense, scores.token_ids.astype(int), 1))
        next_token = scores.next_token_logprob[:, None]
        parts.append(next_token - np.take_along_axis(dense, following, 1))
    return np.abs(np.concatenate([part.ravel() for part in parts]))


def with_float32_logits(model):
    """The model, whose output layer alone computes in float32: weights are as they were."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden.float() @ head.weight.float().T
    return model


def test_bfloat16_stays_close_to_its_own_plain_forward_pass(folder):
    """Against bfloat16 only the batch's shape differs; against float32, all its rounding shows."""
    asked = request(7, 12, 20, 1.0, longest=120)
    with running_server(folder, "--dtype", "bfloat16", "--served-model-name", "half") as url:
        answer = post(f"{url}/v1/score", asked, ScoreResponse, wire.MSGPACK_MEDIA_TYPE)
    assert (answer.teacher.model, answer.teacher.dtype) == ("half", "bfloat16")
    plain = bfloat16_differences(with_float32_logits(load_model(folder, "bfloat16")), asked, answer)
    exact = bfloat16_differences(load_model(folder, "bfloat16").float(), asked, answer)
    for name, differences in (("bfloat16", plain), ("float32", exact)):
        print(f"against {name}: mean {differences.mean():.2e}, max {differences.max():.2e}")  # noqa: T201
    # Logits reach 5 here, where neighbours in bfloat16 are 0.03 apart.
    assert plain.mean() < 1e-3
    assert plain.max() < 0.1
    assert exact.mean() < 0.03
    assert exact.max() < 0.5
