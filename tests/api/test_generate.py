"""Completions over HTTP: seeded, the same in any company, and scored in the same answer."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch

from shared import wire
from shared.protocol import (
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
)
from tests.support.http import metric, post
from tests.support.reference import dense_logprobs, largest_error
from tests.support.vllm import only

PROMPTS = [[5, 6, 7], [9], list(range(20, 60))]


def generate(teacher, media_type=wire.MSGPACK_MEDIA_TYPE, **options):
    asked = GenerateRequest.model_validate({"prompts": PROMPTS, "max_new_tokens": 12, **options})
    answer = post(f"{teacher.url}/v1/generate", asked, GenerateResponse, media_type)
    return answer.completions


def ids(completions):
    return [[completion.token_ids.tolist() for completion in row] for row in completions]


def test_the_same_seed_gives_the_same_completions(teacher):
    first = generate(teacher, seed=3, n=2)
    assert ids(first) == ids(generate(teacher, seed=3, n=2, media_type=wire.JSON_MEDIA_TYPE))
    assert ids(first) != ids(generate(teacher, seed=4, n=2))
    assert all(row[0] != row[1] for row in ids(first))
    assert ids(generate(teacher)) != ids(generate(teacher))


def test_a_completion_does_not_depend_on_its_company(teacher):
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda seed: ids(generate(teacher, seed=seed)), range(8)))
    assert 'kind="generate"' in httpx.get(f"{teacher.url}/metrics").text
    for seed in (0, 7):
        for row, prompt in zip(together[seed], PROMPTS, strict=True):
            assert row == ids(generate(teacher, seed=seed, prompts=[prompt]))[0]


def test_a_seed_holds_for_a_prompt_that_is_prefilled_in_pieces(strict):
    """In company the pieces are cut elsewhere; the engine draws and discards after each."""
    prompts = [[5 + i % 200 for i in range(length)] for length in (3000, 1500, 20)]
    options = {"seed": 3, "max_new_tokens": 4}
    together = ids(generate(strict, prompts=prompts, **options))
    assert together == [ids(generate(strict, prompts=[p], **options))[0] for p in prompts]


@only("transformers")
def test_generations_of_many_clients_are_joined(teacher):
    size, count = (f'teacher_batch_size_{x}{{kind="generate"}}' for x in ("sum", "count"))
    before = metric(teacher.url, size), metric(teacher.url, count)
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(lambda seed: generate(teacher, seed=seed), range(16)))
    assert metric(teacher.url, size) - before[0] == 48
    assert metric(teacher.url, count) - before[1] <= 12


def among_tokens(teacher, sequence, start):
    """[T, tokens]: probabilities that a completion is sampled from, without the padding rows."""
    p = np.exp(dense_logprobs(teacher.model, sequence, start, 1.0))[:, : teacher.tokens]
    return p / p.sum(axis=1, keepdims=True)


def test_greedy_takes_the_most_probable_token(teacher):
    completion = generate(teacher, temperature=0.0, prompts=[[5, 6, 7]])[0][0]
    sequence = np.concatenate([[5, 6, 7], completion.token_ids])
    p = among_tokens(teacher, sequence, 3)
    assert completion.token_ids.tolist() == p.argmax(axis=1).tolist()


def test_stop_tokens_end_a_completion_and_stay_part_of_it(teacher):
    free = generate(teacher, seed=1, prompts=[[5, 6, 7]])[0][0].token_ids.tolist()
    stop = free[5]
    stopped = generate(teacher, seed=1, prompts=[[5, 6, 7]], stop_token_ids=[stop])[0][0]
    assert stopped.token_ids.tolist() == free[: free.index(stop) + 1]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("media_type", [wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE])
def test_scores_come_in_the_same_answer(teacher, media_type):
    rows = generate(teacher, media_type, seed=2, n=2, top_k=9, score_temperature=0.5)
    for prompt, completions in zip(PROMPTS, rows, strict=True):
        for completion in completions:
            sequence = ScoreSequence(
                token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.uint32),
                completion_start=len(prompt),
            )
            dense = dense_logprobs(teacher.model, sequence.token_ids, len(prompt), 0.5)
            assert len(completion.scores) == len(completion.token_ids)
            assert largest_error(completion.scores, dense, sequence) < teacher.tolerance


def test_scores_stay_out_when_nobody_asks(teacher):
    assert generate(teacher, seed=2)[0][0].scores is None


def test_end_tokens_of_the_model_end_a_completion(teacher):
    rows = generate(teacher, seed=0, n=64, max_new_tokens=60)
    ended = [c for row in rows for c in row if c.finish_reason == "stop"]
    assert ended
    assert all(c.token_ids.tolist().index(1) == len(c.token_ids) - 1 for c in ended)
    open_ = [c for row in rows for c in row if c.finish_reason == "length"]
    assert all(len(c.token_ids) == 60 and 1 not in c.token_ids for c in open_)


def test_greedy_is_the_models_own_generate(teacher):
    for prompt, [completion] in zip(PROMPTS, generate(teacher, temperature=0.0), strict=True):
        whole = teacher.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0,
            suppress_tokens=list(range(teacher.tokens, 272)),  # padding of the output layer
        )  # fmt: skip
        assert completion.token_ids.tolist() == whole[0, len(prompt) :].tolist()


def test_scores_equal_those_of_the_score_route(teacher):
    rows = generate(teacher, seed=5, n=2, top_k=9, score_temperature=2.0)
    sequences = [
        ScoreSequence(
            token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.uint32),
            completion_start=len(prompt),
        )
        for prompt, completions in zip(PROMPTS, rows, strict=True)
        for completion in completions
    ]
    asked = ScoreRequest(sequences=sequences, top_k=9, temperature=2.0)
    again = post(f"{teacher.url}/v1/score", asked, ScoreResponse, wire.MSGPACK_MEDIA_TYPE)
    generated = [completion.scores for completions in rows for completion in completions]
    for one, other in zip(generated, again.sequences, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        for name in ("logprobs", "next_token_logprob", "tail_logprob"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), atol=teacher.tolerance
            )


@only("vllm")
@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_a_temperature_that_the_engine_does_not_sample_at_is_refused(teacher, temperature):
    body = {"prompts": [[5]], "max_new_tokens": 1, "temperature": temperature}
    response = httpx.post(f"{teacher.url}/v1/generate", json=body)
    assert response.status_code == 422
    assert response.json()["field"] == "temperature"
    assert f"{temperature}: vLLM samples from 0.01 to 2.0" in response.json()["detail"]


def third(p):
    return np.sort(p)[-3]


def last_of_the_nucleus(p):
    falling = np.sort(p)[::-1]
    return falling[np.searchsorted(falling.cumsum(), 0.4)]


@pytest.mark.parametrize(
    ("options", "least"), [({"sampling_top_k": 3}, third), ({"top_p": 0.4}, last_of_the_nucleus)]
)
def test_sampling_stays_within_top_k_and_the_nucleus(teacher, options, least):
    """Every sampled token is at least as probable as the last one that the option keeps."""
    prompt = PROMPTS[2]
    completions = generate(teacher, prompts=[prompt], n=32, seed=9, **options)[0]
    free = generate(teacher, prompts=[prompt], n=32, seed=9)[0]

    def outside(completion):
        sequence = np.concatenate([prompt, completion.token_ids])
        p = among_tokens(teacher, sequence, len(prompt))
        return sum(
            row[token] < least(row) * (1 - 1e-4)
            for row, token in zip(p, completion.token_ids, strict=True)
        )

    assert sum(map(outside, completions)) == 0
    assert len({completion.token_ids.tobytes() for completion in completions}) > 16
    assert sum(map(outside, free)) > 32  # so the options did something


def test_padding_of_the_output_layer_is_never_generated(teacher):
    rows = generate(teacher, seed=3, n=64, temperature=2.0, max_new_tokens=20)
    assert max(int(c.token_ids.max()) for row in rows for c in row) < teacher.tokens < 272
