"""Scores of prompts that repeat are the same with the engine's prefix cache as without."""

import numpy as np

from shared import wire
from shared.protocol import (
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
)
from tests.api.test_score import error
from tests.support.http import post
from tests.support.monitoring import exposed

MSGPACK = wire.MSGPACK_MEDIA_TYPE
PROMPT = np.random.default_rng(5).integers(0, 260, 160).astype(np.uint32)


def scored(url, completions, prompt=PROMPT):
    sequences = [
        ScoreSequence(
            token_ids=np.concatenate([prompt, completion]).astype(np.uint32),
            completion_start=len(prompt),
        )
        for completion in completions
    ]
    request = ScoreRequest(sequences=sequences, top_k=10)
    return request, post(f"{url}/v1/score", request, ScoreResponse, MSGPACK)


def test_other_completions_of_a_prompt_that_the_cache_holds(teacher):
    rng = np.random.default_rng(0)
    for _ in range(3):
        completions = [rng.integers(0, 260, int(rng.integers(1, 50))) for _ in range(4)]
        assert error(teacher.model, *scored(teacher.url, completions)) < teacher.tolerance


def test_a_completion_that_the_cache_holds_too_is_scored_at_every_position(teacher):
    completion = np.random.default_rng(1).integers(0, 260, 60)
    for length in (60, 60, 33, 1):  # again, and as the beginning of what was scored
        asked, answer = scored(teacher.url, [completion[:length]])
        assert len(answer.sequences[0]) == length
        assert error(teacher.model, asked, answer) < teacher.tolerance


def test_a_completion_that_the_teacher_has_written_is_scored(teacher):
    request = GenerateRequest(prompts=[PROMPT], max_new_tokens=40, temperature=0.0, top_k=10)
    answer = post(f"{teacher.url}/v1/generate", request, GenerateResponse, MSGPACK)
    completion = answer.completions[0][0]
    asked, again = scored(teacher.url, [completion.token_ids])
    assert error(teacher.model, asked, again) < teacher.tolerance
    difference = completion.scores.next_token_logprob - again.sequences[0].next_token_logprob
    assert abs(difference).max() < teacher.tolerance


def prefix_tokens(url):
    """Tokens of scored sequences by what became of them."""
    return {
        sample.labels["result"]: sample.value
        for family in exposed(url)
        for sample in family.samples
        if sample.name == "teacher_prefix_tokens_total" and sample.labels["kind"] == "score"
    }


def test_tokens_that_the_cache_held_and_those_computed_are_counted(teacher):
    prompt = np.random.default_rng(9).integers(0, 260, 200).astype(np.uint32)
    scored(teacher.url, [np.arange(5, 9)], prompt)
    before = prefix_tokens(teacher.url)
    scored(teacher.url, [np.arange(9, 14)], prompt)
    after = prefix_tokens(teacher.url)
    hit, miss = (after[name] - before[name] for name in ("hit", "miss"))
    assert 204 <= hit + miss <= 205  # the last token need not be read
    assert (hit >= 128) if teacher.backend == "vllm" else (hit == 0)
