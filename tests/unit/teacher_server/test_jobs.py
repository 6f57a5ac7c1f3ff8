"""Requests as jobs, and keys that no field of a job is missing from."""

import dataclasses
import itertools

import numpy as np
import pytest

from shared.protocol import GenerateRequest, ScoreRequest, ScoreSequence
from shared.text import StopStrings
from teacher_server.backends.base import GenerateJob, ScoreJob, ScoreOptions
from teacher_server.jobs import generate_jobs, job_key, score_jobs, total_answer_bytes, total_tokens


def ids(*values, shape=(-1,)):
    return np.array(values, np.uint32).reshape(shape)


SCORE = ScoreJob(token_ids=ids(1, 2, 3), completion_start=1, top_k=2)
OPTIONS = ScoreOptions(top_k=2)
STOP = StopStrings(("a", "b"))
GENERATE = GenerateJob(
    prompt=ids(1, 2), max_new_tokens=4, temperature=1.0, top_p=1.0, sampling_top_k=0,
    key=(7, b"12", 0), stop_token_ids=(1, 2), score=OPTIONS, client="a", stop=STOP,
)  # fmt: skip
# Other values of each field, of both jobs and of what they are made of.
CHANGES = {
    ScoreJob: {
        "token_ids": [ids(1, 2, 4), ids(1, 2), ids(1, 2, 3, 0), ids()],
        "completion_start": [2],
        "top_k": [3],
        "temperature": [0.5, np.nextafter(1.0, 2.0)],
        "requested_token_ids": [
            ids(1, 2, shape=(2, 1)), ids(1, 2, shape=(1, 2)), ids(shape=(2, 0)), ids(shape=(3, 0)),
        ],
        "logprob_dtype": ["float16"],
        "draw_key": [b"", b"x"],
        "client": ["a", "None"],
        "adapter": ["", "None", "math"],
    },
    ScoreOptions: {"top_k": [3], "temperature": [0.5], "logprob_dtype": ["float16"]},
    StopStrings: {
        "texts": [("a",), ("b", "a"), ("ab",), ("a", "b", ""), ("a;b",)],
        "skip_special_tokens": [False],
    },
    GenerateJob: {
        "prompt": [ids(1), ids(2, 1)],
        "max_new_tokens": [5],
        "temperature": [0.0],
        "top_p": [0.5],
        "sampling_top_k": [1],
        "key": [(8, b"12", 0), (7, b"13", 0), (7, b"12", 1), (7, b"1", b"2", 0), (7, b"12")],
        "stop_token_ids": [(), (1,), (12,), (2, 1)],
        "score": [None],
        "client": ["", "b"],
        "stop": [None],
        "adapter": ["", "None", "math"],
    },
}  # fmt: skip


def variants(value):
    """``value`` with another value in one field, its own or one of a dataclass that it holds."""
    for name, others in CHANGES[type(value)].items():
        inner = getattr(value, name)
        if dataclasses.is_dataclass(inner):
            others = [*others, *variants(inner)]
        for other in others:
            yield dataclasses.replace(value, **{name: other})


@pytest.mark.parametrize("kind", list(CHANGES), ids=lambda kind: kind.__name__)
def test_every_field_is_changed_here(kind):
    assert list(CHANGES[kind]) == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("job", [SCORE, GENERATE], ids=["score", "generate"])
def test_a_change_of_any_field_is_another_key(job):
    jobs = [job, *variants(job)]
    assert len({job_key(one) for one in jobs}) == len(jobs) > 15


@pytest.mark.parametrize("job", [SCORE, GENERATE], ids=["score", "generate"])
def test_a_field_that_is_added_later_counts(job):
    added = dataclasses.make_dataclass(
        type(job).__name__, [("later", int, 0)], bases=(type(job),), frozen=True
    )
    values = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    assert len({job_key(one) for one in (job, added(**values), added(**values, later=1))}) == 3


@pytest.mark.parametrize("job", [SCORE, GENERATE], ids=["score", "generate"])
def test_equal_jobs_have_one_key_wherever_their_arrays_lie(job):
    copy = {
        field.name: np.repeat(value, 2)[::2] if isinstance(value, np.ndarray) else value
        for field in dataclasses.fields(job)
        for value in [getattr(job, field.name)]
    }
    assert job_key(type(job)(**copy)) == job_key(job)


def test_a_field_that_cannot_be_hashed_is_an_error_and_not_left_out():
    with pytest.raises(TypeError, match="a job holds a dict"):
        job_key(dataclasses.replace(SCORE, client={}))


def test_a_request_to_score_is_a_job_for_each_sequence():
    request = ScoreRequest(
        sequences=[
            ScoreSequence(token_ids=ids(1, 2, 3), completion_start=1),
            ScoreSequence(
                token_ids=ids(1, 2), completion_start=1, requested_token_ids=ids(5, shape=(1, 1))
            ),
        ],
        top_k=4, temperature=0.5, logprob_dtype="float16",
    )  # fmt: skip
    first, second = score_jobs(request, "a")
    assert first.job.token_ids.tolist() == [1, 2, 3]
    shown = {"top_k": 4, "temperature": 0.5, "logprob_dtype": "float16", "client": "a"}
    for one in (first, second):
        assert {name: getattr(one.job, name) for name in shown} == shown
        assert (one.job.completion_start, one.job.draw_key) == (1, None)
        assert one.key == job_key(one.job)
    assert first.job.requested_token_ids is None
    assert second.job.requested_token_ids.tolist() == [[5]]
    assert total_tokens([first, second]) == 5
    assert total_answer_bytes([first, second]) == 3 * (8 * 4 + 8) + 4


def test_draws_depend_on_seed_and_content_alone():
    def draw_keys(seed, *sequences):
        asked = [ScoreSequence(token_ids=ids(*one), completion_start=1) for one in sequences]
        jobs = score_jobs(ScoreRequest(sequences=asked, top_k=1, sample_seed=seed), "a")
        return [one.job.draw_key for one in jobs]

    first, second = draw_keys(1, (1, 2), (1, 3))
    assert first != second
    assert draw_keys(1, (9, 9), (1, 2))[1] == first
    assert draw_keys(2, (1, 2))[0] != first


def test_a_request_to_generate_is_a_job_for_each_completion():
    request = GenerateRequest(
        prompts=[ids(1), ids(2)], n=2, max_new_tokens=3, temperature=0.0, top_k=4,
        score_temperature=0.5, stop_token_ids=ids(9, 8, 9),
    )  # fmt: skip
    jobs = [one.job for one in generate_jobs(request, "a", STOP)]
    assert [(job.prompt.tolist(), job.key[2]) for job in jobs] == [
        ([1], 0), ([1], 1), ([2], 0), ([2], 1)
    ]  # fmt: skip
    for job in jobs:
        assert job.score == ScoreOptions(top_k=4, temperature=0.5)
        assert (job.stop_token_ids, job.stop, job.client) == ((8, 9), STOP, "a")


@pytest.mark.parametrize(
    ("options", "alike"),
    [({"temperature": 0.0}, True), ({"temperature": 1.0, "seed": 3}, True), ({}, False)],
    ids=["greedy", "seeded", "unseeded"],
)
def test_a_request_sent_twice_has_the_same_keys_unless_it_draws_anew(options, alike):
    request = GenerateRequest(prompts=[ids(1)], n=2, max_new_tokens=3, **options)
    first, second = ([one.key for one in generate_jobs(request, "a")] for _ in range(2))
    assert (first == second) is alike
    assert all(a != b for a, b in itertools.combinations(first, 2))
