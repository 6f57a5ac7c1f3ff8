"""A stock vLLM as teacher, against a socket that answers as vLLM does, or wrongly."""

import contextlib
import json
import logging
import time
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import (
    ConfigurationError,
    InvalidRequestError,
    MalformedRequestError,
    TeacherAnswerError,
    TeacherChangedError,
    TeacherUnauthorizedError,
    TeacherUnreachableError,
    TokenizerMismatchError,
)
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.vllm import VllmTeacher
from tests.support.stub_vllm import StubVllm, as_json

ROWS = 272
SEQUENCES = [(np.array([9, 8, 7, 6, 5], np.uint32), 2), (np.array([4, 250], np.uint32), 1)]
SAMPLING = Sampling(max_new_tokens=8, temperature=0.5, seed=7, stop_token_ids=[1, 9])


def steep(rows=ROWS):
    p = 0.8 ** np.arange(rows)
    return np.random.default_rng(0).permutation(p / p.sum())


@pytest.fixture
def stub(tokenizer):
    with StubVllm(tokenizer, steep()).serving() as stub:
        yield stub


@contextlib.contextmanager
def connected(*stubs, **options):
    options = {"tokenizer": stubs[0].tokenizer, "rows": 260, "top_k": 4, "timeout": 10.0, **options}
    with VllmTeacher([s.url for s in stubs], **options) as teacher:
        teacher.connect()
        for stub in stubs:
            stub.requests.clear()
        yield teacher


@pytest.mark.parametrize("k", [1, 4, 20])
def test_scores_are_the_top_k_the_next_token_and_what_is_left(stub, k):
    p = stub.probabilities
    with connected(stub, top_k=k) as teacher:
        teacher.take_traffic()
        scored = teacher.score(SEQUENCES, ScoreOptions(k))
        received, rows = teacher.take_traffic()
    assert rows == 4
    assert received > 100
    top = np.argsort(-p)[:k]
    for answer, (ids, start) in zip(scored, SEQUENCES, strict=True):
        for t, next_id in enumerate(ids[start:].tolist()):
            assert answer.token_ids[t].tolist() == top.tolist()
            np.testing.assert_allclose(answer.logprobs[t], np.log(p[top]), rtol=1e-6)
            assert answer.next_token_logprob[t] == pytest.approx(np.log(p[next_id]), rel=1e-6)
            rest = p.sum() - p[list({*top.tolist(), next_id})].sum()
            assert answer.tail_logprob[t] == pytest.approx(np.log(rest), abs=1e-4)


def test_the_tail_is_never_negative_mass_and_empty_only_when_all_is_named(tokenizer):
    sure = np.zeros(ROWS)
    sure[3] = 1.0
    with StubVllm(tokenizer, sure, max_logprobs=ROWS).serving() as stub:
        with connected(stub) as teacher:
            (_, short) = teacher.score(SEQUENCES, ScoreOptions(4))
        with connected(stub, top_k=ROWS) as teacher:
            (_, whole) = teacher.score(SEQUENCES, ScoreOptions(ROWS))
    assert short.tail_logprob.tolist() == [pytest.approx(np.log(2.0**-24))]
    assert whole.tail_logprob.tolist() == [-np.inf]


def test_log_probs_that_round_to_more_than_one_leave_the_smallest_tail(stub):
    def over(request):
        answer = stub.completions(request)
        for choice in answer["choices"]:
            for row in choice["prompt_logprobs"][1:]:
                for entry in row.values():
                    entry["logprob"] = float(np.log(0.2001))  # five of them
        return as_json(answer)

    with connected(stub) as teacher:
        stub.script = [over]
        (_, scored) = teacher.score(SEQUENCES, ScoreOptions(4))
    assert scored.tail_logprob.tolist() == [pytest.approx(np.log(2.0**-24))]


@pytest.mark.parametrize(("rows", "known"), [(272, 272), (272, 260), (260, 272), (260, 700)])
def test_the_teachers_rows_are_counted_though_vllm_does_not_tell(tokenizer, rows, known):
    with StubVllm(tokenizer, steep(known)).serving() as stub, connected(stub, rows=rows) as teacher:
        assert teacher.info.vocab_size == known


def test_what_vllm_does_not_tell_is_said_once(stub, caplog):
    with caplog.at_level(logging.WARNING), connected(stub) as teacher:
        teacher.score(SEQUENCES, ScoreOptions(4))
    (record,) = caplog.records
    assert "stub with vLLM 0.32.0, which reports no fingerprints" in record.message
    assert "its context (64), how many token ids it knows (272)" in record.message


def test_one_token_less_than_the_context_can_be_scored(stub):
    with connected(stub) as teacher:
        assert teacher.info.max_model_len == 63


def test_more_log_probs_than_vllm_serves_are_refused_with_the_flag_that_raises_its_limit(stub):
    with pytest.raises(ConfigurationError) as caught, connected(stub, top_k=64):
        pass
    assert "--top_k_logprobs 64" in str(caught.value)
    assert "greater than max allowed: 20" in str(caught.value)
    assert "vllm serve stub --max-logprobs 64" in str(caught.value)


def test_a_teacher_that_goes_while_it_is_checked_is_named(stub):
    stub.script = [lambda request: (503, {}, b"")]
    with pytest.raises(TeacherUnreachableError, match=f"{stub.url} was ready and does not answer"):
        VllmTeacher([stub.url], tokenizer=stub.tokenizer, rows=260, top_k=4).connect()


def test_another_tokenization_is_refused_with_the_place(stub):
    real = stub.tokenizer

    def other(text, **options):
        ids = real(text, **options)["input_ids"]
        return {"input_ids": [*ids[:40], 7, *ids[41:]]}

    stub.tokenizer = other
    with (
        pytest.raises(TokenizerMismatchError, match=r"part at token 40 \(\[7\] and \[\d+\]\)"),
        connected(stub, tokenizer=real),
    ):
        pass


def test_replicas_must_serve_one_model(stub, tokenizer):
    with (
        StubVllm(tokenizer, steep(), model="other").serving() as other,
        pytest.raises(TeacherChangedError, match=r"model='stub'.*model='other'"),
        connected(stub, other),
    ):
        pass


def test_a_replica_that_fails_is_left_out_and_rejoins(stub, tokenizer):
    with StubVllm(tokenizer, steep()).serving() as other, connected(stub, other) as teacher:
        stub.script = [lambda request: (500, {}, b"engine dead")]
        for _ in range(3):
            teacher.score(SEQUENCES, ScoreOptions(4))
        assert (len(stub.requests), len(other.requests)) == (1, 3)
        deadline = time.monotonic() + 10
        while len(stub.requests) == 1:
            assert time.monotonic() < deadline, "it does not rejoin"
            teacher.score(SEQUENCES, ScoreOptions(4))
            time.sleep(0.05)


def score_for_seconds(teacher):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        teacher.score(SEQUENCES, ScoreOptions(4))
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "accept_change"), [({"model": "other"}, True), ({"version": "0.33.0"}, False)]
)
def test_a_replica_that_comes_back_as_another_teacher_stops_the_run(
    stub, tokenizer, change, accept_change
):
    with (
        StubVllm(tokenizer, steep()).serving() as other,
        connected(stub, other, accept_change=accept_change) as teacher,
    ):
        stub.script = [lambda request: (500, {}, b"engine dead")]
        for name, value in change.items():
            setattr(stub, name, value)
        with pytest.raises(TeacherChangedError, match="is another teacher now"):
            score_for_seconds(teacher)
    assert len(stub.requests) == 1


def test_another_version_is_accepted_when_told_so(stub, tokenizer, caplog):
    with (
        caplog.at_level(logging.WARNING),
        StubVllm(tokenizer, steep()).serving() as other,
        connected(stub, other, accept_change=True) as teacher,
    ):
        stub.script = [lambda request: (500, {}, b"engine dead")]
        stub.version = "0.33.0"
        deadline = time.monotonic() + 10
        while len(stub.requests) < 2:
            assert time.monotonic() < deadline, "it does not rejoin"
            teacher.score(SEQUENCES, ScoreOptions(4))
            time.sleep(0.05)
    assert f"{stub.url} is vLLM 0.33.0 now" in caplog.text


def test_a_temperature_is_refused_as_vllm_would_ignore_it(stub):
    with connected(stub) as teacher:
        assert not teacher.info.capabilities.temperature
        assert not teacher.info.capabilities.requested_token_ids
        with pytest.raises(InvalidRequestError, match=r"temperature 0\.7: vLLM never applies"):
            teacher.score(SEQUENCES, ScoreOptions(4, temperature=0.7))
        hotter = replace(SAMPLING, top_k=4, score_temperature=2.0)
        with pytest.raises(InvalidRequestError, match="temperature 2"):
            teacher.generate([SEQUENCES[0][0]], hotter)
    assert stub.requests[0]["temperature"] == 0.5  # of the sampling, which vLLM does apply


def test_token_ids_outside_the_teachers_vocabulary_are_refused(stub):
    outside = [(np.array([4, ROWS], np.uint32), 1)]
    with (
        connected(stub) as teacher,
        pytest.raises(MalformedRequestError, match="Token id 272 is out of vocabulary"),
    ):
        teacher.score(outside, ScoreOptions(4))


def test_completions_are_scored_in_a_second_pass(stub):
    prompts = [np.array([3, 4], np.uint32), np.array([7], np.uint32)]
    with connected(stub) as teacher:
        with_scores = teacher.generate(prompts, replace(SAMPLING, top_k=4))
        without = teacher.submit(teacher.generate, prompts, SAMPLING).result()
    assert [c.token_ids.tolist() for c in with_scores + without] == [[5, 1]] * 4
    assert [c.scores.token_ids.shape for c in with_scores] == [(2, 4)] * 2
    assert [c.scores for c in without] == [None, None]
    sampled, scored, _ = stub.requests
    assert scored["prompt"] == [[3, 4, 5, 1], [7, 5, 1]]
    asked = {"seed": 7, "temperature": 0.5, "stop_token_ids": [1, 9], "max_tokens": 8}
    # Said outright, since the checkpoint's generation_config.json may set others.
    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {**sampled, **asked, **plain} == sampled


def test_long_work_is_split(stub):
    with connected(stub) as teacher:
        answers = teacher.score(SEQUENCES[1:] * 1500, ScoreOptions(4))
    assert [len(request["prompt"]) for request in stub.requests] == [1024, 476]
    assert len(answers) == 1500


def test_what_a_gateway_does_not_wait_for_is_asked_in_halves(stub):
    with connected(stub) as teacher:
        late = (504, {}, b"<html>Gateway Time-out")
        stub.script = [lambda request: late] * 2
        answers = teacher.score(SEQUENCES * 2, ScoreOptions(4))
    assert [len(request["prompt"]) for request in stub.requests] == [4, 2, 1, 1, 2]
    assert [len(scores) for scores in answers] == [3, 1, 3, 1]


def spoilt(change):
    """A right answer of the stub, changed."""

    def make(stub):
        def answer(request):
            right = stub.completions(request)
            change(right)
            return as_json(right)

        return answer

    return make


def first_row(answer):
    return answer["choices"][-1]["prompt_logprobs"][2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(model="other"), TeacherChangedError, "answered as 'other'"),
        (lambda a: a["choices"].pop(), TeacherAnswerError, "2 prompts were sent.*1 choices"),
        (
            lambda a: a["choices"][-1].pop("prompt_logprobs"),
            TeacherAnswerError,
            "5 positions.*None",
        ),
        (
            lambda a: first_row(a).pop("7"),
            TeacherAnswerError,
            "position 0 names 4 tokens",
        ),
        (lambda a: first_row(a).update({"7": None}), TeacherAnswerError, "position 0.*malformed"),
        (
            lambda a: first_row(a).update({"07": {"logprob": -5.0}}),
            TeacherAnswerError,
            "position 0.*malformed.*twice",
        ),
        (
            lambda a: first_row(a).update({"-1": {"logprob": -5.0}}),
            TeacherAnswerError,
            "position 0.*malformed.*outside",
        ),
        (
            lambda a: first_row(a).update({"7": {"logprob": 1e9}}),
            TeacherAnswerError,
            "position 0.*malformed.*above 0",
        ),
        (
            lambda a: first_row(a).update({"7": {"logprob": float("nan")}}),
            TeacherAnswerError,
            r"sequence 0: the teacher answered next_token_logprob\[0\] = nan",
        ),
    ],
)
def test_an_answer_that_cannot_be_used_stops_the_run(stub, change, error, message):
    with connected(stub) as teacher:
        stub.script = [spoilt(change)(stub)]
        with pytest.raises(error, match=message):
            teacher.score(SEQUENCES, ScoreOptions(4))
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    "token_ids", [[-1], [2**40], ["x"], [[1]], [10**6], [1] * 9], ids=lambda given: str(given)
)
def test_a_completion_that_cannot_be_one_stops_the_run(stub, token_ids):
    with connected(stub) as teacher:
        stub.script = [spoilt(lambda a: a["choices"][0].update(token_ids=token_ids))(stub)]
        with pytest.raises(TeacherAnswerError, match="completion"):
            teacher.generate(
                [np.array([5], np.uint32)], Sampling(8, 0.0, seed=0, stop_token_ids=[1])
            )


def test_a_name_that_would_write_over_a_terminal_is_refused(stub):
    stub.model = "\x1b[2J\nWARNING"
    with pytest.raises(TeacherAnswerError, match=r"model is \\x1b\[2J\\nWARNING"), connected(stub):
        pass


def test_what_is_not_vllm_is_refused_with_the_other_protocol(stub):
    stub.get = lambda path: as_json({"data": [{"id": "gpt"}]})
    with pytest.raises(TeacherAnswerError, match="--teacher_protocol sparse-gkd"), connected(stub):
        pass


def test_answers_that_are_no_json_are_refused(stub):
    with connected(stub) as teacher:
        for body in (b"<html>", json.dumps([1]).encode()):
            stub.script = [lambda request, body=body: (200, {}, body)]
            with pytest.raises(TeacherAnswerError, match="/v1/completions answered"):
                teacher.score(SEQUENCES, ScoreOptions(4))


def test_the_key_is_sent_to_vllm_too(tokenizer):
    with StubVllm(tokenizer, steep(), key="k" * 12).serving() as stub:
        with connected(stub, api_key="k" * 12) as teacher:
            assert len(teacher.score(SEQUENCES, ScoreOptions(4))) == 2
        for wrong in (None, "x" * 12):
            with pytest.raises(TeacherUnauthorizedError, match="answers 401"):
                connected(stub, api_key=wrong, timeout=1000.0).__enter__()
