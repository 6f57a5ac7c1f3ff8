"""Streamed completions: each leaves when it is finished, and is what the plain answer holds."""

import contextlib
import json

import httpx
import numpy as np
import pytest
import torch

from shared import wire
from shared.protocol import GenerateEnd, GenerateRequest, GenerateResponse, Problem
from tests.support.http import LEFT, client_at, engine_metric, metric, post, until
from tests.support.vllm import only

PROMPTS = [[5, 6, 7], [9], list(range(20, 60))]
BOTH = pytest.mark.parametrize("media_type", [wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE])


@contextlib.contextmanager
def streaming(teacher, media_type=wire.MSGPACK_MEDIA_TYPE, **options):
    """The items of an answer, as they come; the connection is closed when the block ends."""
    asked = GenerateRequest.model_validate({"prompts": PROMPTS, "stream": True, **options})
    with httpx.stream(
        "POST", f"{teacher.url}/v1/generate", content=wire.dump(asked, media_type),
        headers={"content-type": media_type}, timeout=60,
    ) as response:  # fmt: skip
        assert response.status_code == 200, response.read()
        found = response.headers["content-type"]
        assert found == wire.STREAM_MEDIA_TYPES[media_type]
        yield wire.stream_messages(response.iter_raw(), found, max_bytes=1 << 24)


@BOTH
def test_a_stream_holds_what_the_plain_answer_holds(teacher, media_type):
    options = {"seed": 7, "n": 2, "max_new_tokens": 12, "top_k": 9, "score_temperature": 0.5}
    asked = GenerateRequest.model_validate({"prompts": PROMPTS, **options})
    plain = post(f"{teacher.url}/v1/generate", asked, GenerateResponse, media_type)
    with streaming(teacher, media_type, **options) as items:
        *events, end = items
    assert end == GenerateEnd(teacher=plain.teacher, request_id=end.request_id)
    places = [(event.prompt, event.sample) for event in events]
    assert sorted(places) == [(prompt, sample) for prompt in range(3) for sample in range(2)]
    assert {event.teacher for event in events} == {plain.teacher}
    for event in events:
        expected = plain.completions[event.prompt][event.sample]
        found = event.completion
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.finish_reason == expected.finish_reason
        np.testing.assert_array_equal(found.scores.token_ids, expected.scores.token_ids)
        for name in ("logprobs", "next_token_logprob", "tail_logprob"):
            np.testing.assert_allclose(
                getattr(found.scores, name), getattr(expected.scores, name), atol=teacher.tolerance
            )


def one_that_ends_and_one_that_does_not(strict):
    """A request whose first prompt stops at once, and its second not within its first 500 tokens.

    With it, the first one's completion.
    """

    def greedy(prompt, length):
        options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        return strict.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()

    prompts = [[5, 6, 7], [9, 4]]
    short, long = greedy(prompts[0], 10), greedy(prompts[1], 500)
    stop = next(token for token in short if token not in long)
    asked = {
        "prompts": prompts, "max_new_tokens": 3_900, "temperature": 0.0, "stop_token_ids": [stop],
        "top_k": 3,
    }  # fmt: skip
    return asked, short[: short.index(stop) + 1]


def test_a_completion_is_there_before_the_last_one_is_generated(strict):
    """The other one never comes: the deadline falls first, and is told at the end."""
    asked, expected = one_that_ends_and_one_that_does_not(strict)
    with streaming(strict, **asked) as items:
        event, end = items
    assert (event.prompt, event.completion.token_ids.tolist()) == (0, expected)
    assert len(event.completion.scores) == len(expected)
    assert end.problem.status == 504
    assert "not answered within 5 s" in end.problem.detail


def test_a_client_who_leaves_a_stream_frees_the_queue_and_the_model(strict):
    asked, _ = one_that_ends_and_one_that_does_not(strict)
    left = metric(strict.url, LEFT)
    with streaming(strict, **asked) as items:
        assert next(items).prompt == 0
        assert metric(strict.url, "teacher_queued_tokens") > 0
    until(lambda: metric(strict.url, LEFT) == left + 1)  # at the deadline it would be a 504
    assert metric(strict.url, "teacher_queued_tokens") == 0
    short = {"sequences": [{"token_ids": [1, 2, 3], "completion_start": 1}], "top_k": 3}
    assert httpx.post(f"{strict.url}/v1/score", json=short, timeout=10).status_code == 200


@only("vllm")
def test_a_client_who_leaves_a_stream_ends_the_engines_request(strict):
    short = {"sequences": [{"token_ids": [1, 2, 3], "completion_start": 1}], "top_k": 3}

    def running():
        # The gauge moves with the engine's steps, so give it one.
        with client_at(2) as another:
            assert another.post(f"{strict.url}/v1/score", json=short).status_code == 200
        return engine_metric(strict.url, "num_requests_running")

    asked, _ = one_that_ends_and_one_that_does_not(strict)
    left = metric(strict.url, LEFT)
    before = engine_metric(strict.url, "generation_tokens_total")
    with streaming(strict, **asked) as items:
        assert next(items).prompt == 0
        assert running() == 1
    until(lambda: metric(strict.url, LEFT) == left + 1)
    until(lambda: running() == 0)
    assert engine_metric(strict.url, "generation_tokens_total") < before + asked["max_new_tokens"]


def test_json_lines_are_for_people(teacher):
    asked = {"prompts": [[5, 6], [7]], "max_new_tokens": 3, "stream": True, "temperature": 0.0}
    with httpx.stream("POST", f"{teacher.url}/v1/generate", json=asked, timeout=60) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        *events, end = map(json.loads, response.iter_lines())
    assert sorted(event["prompt"] for event in events) == [0, 1]
    assert all(len(event["completion"]["token_ids"]) <= 3 for event in events)
    assert end["problem"] is None
    assert end["request_id"] == response.headers["x-request-id"]


def test_what_is_wrong_before_the_first_completion_is_an_ordinary_refusal(teacher):
    for changes, field in (({"prompts": [[999]]}, "prompts.0"), ({"top_k": 9_999}, "top_k")):
        asked = {"prompts": [[5]], "max_new_tokens": 2, "stream": True, **changes}
        response = httpx.post(f"{teacher.url}/v1/generate", json=asked)
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert Problem.model_validate(response.json()).field == field


@only("vllm")
def test_what_the_engine_refuses_is_an_ordinary_refusal(teacher):
    asked = {"prompts": [[5]], "max_new_tokens": 1, "temperature": 2.5, "stream": True}
    response = httpx.post(f"{teacher.url}/v1/generate", json=asked)
    assert (response.status_code, response.json()["field"]) == (422, "temperature")
