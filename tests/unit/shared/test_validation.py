"""The refusals of a teacher: each names the field, the value and the limit."""

import numpy as np
import pytest

from shared.errors import InvalidRequestError
from shared.protocol import (
    PROTOCOL_VERSION,
    Capabilities,
    GenerateRequest,
    InfoResponse,
    Limits,
    ScoreRequest,
    TeacherIdentity,
    TokenizerIdentity,
)
from shared.validation import check_generate_request, check_score_request


def info(*, limits=None, **capabilities):
    return InfoResponse(
        protocol_version=PROTOCOL_VERSION,
        teacher=TeacherIdentity(model="m", fingerprint="f", dtype="d", backend="b", version="v"),
        tokenizer=TokenizerIdentity(
            fingerprint="t", vocab_size=100, special_token_ids={}, chat_template=None
        ),
        vocab_size=100,
        max_model_len=16,
        eos_token_ids=[1],
        limits=Limits(**{"max_top_k": 50, "max_requested_token_ids": 4, **(limits or {})}),
        capabilities=Capabilities(
            **{"temperature": True, "requested_token_ids": True, "generate": True, **capabilities}
        ),
    )


def score(sequences=None, **options):
    sequences = (
        [{"token_ids": [1, 2, 3], "completion_start": 1}] if sequences is None else sequences
    )
    return ScoreRequest.model_validate({"sequences": sequences, "top_k": 5, **options})


def one(**changes):
    return score([{"token_ids": [1, 2, 3], "completion_start": 1, **changes}])


def generate(**changes):
    return GenerateRequest.model_validate({"prompts": [[1, 2]], "max_new_tokens": 4, **changes})


def test_what_is_within_every_limit_is_accepted():
    check_score_request(score(top_k=50, temperature=2.0), info())
    check_score_request(one(token_ids=[99] * 16, completion_start=15), info())
    check_score_request(one(requested_token_ids=[[0, 1, 2, 99]] * 2), info())
    check_generate_request(generate(max_new_tokens=14, top_k=50, stop_token_ids=[99]), info())


def test_draws_are_refused_where_the_teacher_makes_none():
    check_score_request(score(sample_seed=7), info(sample_seed=True))
    with pytest.raises(InvalidRequestError, match="draws no samples") as caught:
        check_score_request(score(sample_seed=7), info())
    assert caught.value.field == "sample_seed"


SMALL = {"max_sequences": 2, "max_tokens": 20, "max_logprobs": 30}
TWO = [{"token_ids": [1] * 11, "completion_start": 10}] * 2


@pytest.mark.parametrize(
    ("request_", "teacher", "field", "numbers"),
    [
        (score([]), info(), "sequences", "send at least one"),
        (score(top_k=51), info(), "top_k", "51 is over the limit 50"),
        (one(token_ids=[]), info(), "sequences.0.token_ids", "no tokens"),
        (one(token_ids=[1, 100, 2]), info(), "sequences.0.token_ids", "100 is outside.* of 100"),
        (one(token_ids=[1] * 17), info(), "sequences.0.token_ids", "17 tokens.* context is 16"),
        (one(completion_start=0), info(), "sequences.0.completion_start", "0 must be from 1 to 2"),
        (one(completion_start=3), info(), "sequences.0.completion_start", "3 must be from 1 to 2"),
        (one(completion_start=-1), info(), "sequences.0.completion_start", "-1 must be from 1"),
        (one(requested_token_ids=[[1]]), info(), "sequences.0.requested_token_ids", "1 rows for 2"),
        (
            one(requested_token_ids=[[1] * 5] * 2),
            info(),
            "sequences.0.requested_token_ids",
            "5 ids in a row; the limit is 4",
        ),
        (
            one(requested_token_ids=[[1], [100]]),
            info(),
            "sequences.0.requested_token_ids",
            "100 is outside",
        ),
        (
            one(requested_token_ids=[[1], [2]]),
            info(requested_token_ids=False),
            "sequences.0.requested_token_ids",
            "cannot score requested ids",
        ),
        (
            score(temperature=0.5),
            info(temperature=False),
            "temperature",
            "0.5: this teacher's backend cannot apply a temperature",
        ),
        (score(TWO + TWO), info(limits=SMALL), "sequences", "4 sequences; the limit is 2"),
        (score(TWO), info(limits=SMALL), "sequences", "22 tokens; the limit is 20"),
        (
            score([{"token_ids": [1] * 9, "completion_start": 2}]),
            info(limits=SMALL),
            "sequences",
            "35 log-probs in the answer; the limit is 30",
        ),
    ],
)
def test_a_score_request_out_of_bounds_is_refused(request_, teacher, field, numbers):
    with pytest.raises(InvalidRequestError, match=numbers) as refusal:
        check_score_request(request_, teacher)
    assert refusal.value.field == field
    assert refusal.value.status == 422


@pytest.mark.parametrize(
    ("request_", "teacher", "field", "numbers"),
    [
        (generate(prompts=[]), info(), "prompts", "send at least one"),
        (generate(prompts=[[1], []]), info(), "prompts.1", "no tokens"),
        (generate(prompts=[[1], [7, 100]]), info(), "prompts.1", "100 is outside"),
        (
            generate(max_new_tokens=15),
            info(),
            "prompts.0",
            "2 tokens.*15.*17 tokens.* context is 16",
        ),
        (generate(n=3), info(limits=SMALL), "prompts", "3 sequences; the limit is 2"),
        (generate(max_new_tokens=9, n=2), info(limits=SMALL), "prompts", "22 tokens; the limit"),
        (generate(stop_token_ids=[1, 100]), info(), "stop_token_ids", "100 is outside"),
        (generate(top_k=51), info(), "top_k", "51 is over the limit 50"),
        (generate(top_k=8), info(limits=SMALL), "top_k", "32 log-probs.*limit is 30"),
        (
            generate(top_k=2, score_temperature=2.0),
            info(temperature=False),
            "score_temperature",
            "cannot apply a temperature",
        ),
        (generate(), info(generate=False), "prompts", "does not generate"),
    ],
)
def test_a_generate_request_out_of_bounds_is_refused(request_, teacher, field, numbers):
    with pytest.raises(InvalidRequestError, match=numbers) as refusal:
        check_generate_request(request_, teacher)
    assert refusal.value.field == field


def test_a_teacher_without_temperature_accepts_one():
    check_score_request(score(temperature=1.0), info(temperature=False))


def test_a_prompt_of_zero_length_arrays_is_an_empty_prompt():
    empty = GenerateRequest(prompts=[np.zeros(0, np.uint32)], max_new_tokens=1)
    with pytest.raises(InvalidRequestError, match="no tokens"):
        check_generate_request(empty, info())
