"""A teacher behind a store, against a teacher on a real socket that counts what it is asked."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from shared import wire
from shared.errors import TeacherChangedError, TeacherUnreachableError
from shared.protocol import Completion
from shared.sparse import SparseLogprobs
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.database import checksum
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from student_trainer.teacher.store import AnswerStore
from tests.support.cache import corrupt_one_record, database, rewritten
from tests.support.stub import IDENTITY, StubTeacher, info, packed, score_response, scores

K = 3


@contextlib.contextmanager
def cached(folder, url, *, starts_alone=False, dtype="float16", connect=True, model=None):
    client = SparseGkdTeacher([url], timeout=2.0, logprob_dtype=dtype, model=model)
    store = AnswerStore(folder, max_bytes=8 << 20)
    with CachedTeacher(
        client, store, logprob_dtype=dtype, starts_alone=starts_alone
    ) as teacher:  # fmt: skip
        if connect:
            teacher.connect()
        yield teacher


@pytest.fixture
def stub():
    with StubTeacher().serving() as stub:
        yield stub


def ids(*values):
    return np.array(values, np.uint32)


def asked(stub):
    """Token ids of the sequences or prompts of each request."""
    return [
        [tuple(s.token_ids.tolist()) for s in request.sequences]
        if hasattr(request, "sequences")
        else [tuple(p.tolist()) for p in request.prompts]
        for request in stub.requests
    ]


A, B, C = (ids(5, 6, 7), 1), (ids(5, 6, 8), 1), (ids(9, 6, 8), 1)
SAMPLING = Sampling(
    max_new_tokens=8, temperature=0.0, seed=0, stop_token_ids=[1], top_k=K, score_temperature=1.0
)


def test_only_what_is_missing_of_a_request_is_asked(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        first = teacher.score([A, B], ScoreOptions(K))
        again = teacher.score([C, B, A, C], ScoreOptions(K))
        assert teacher.take_lookups() == (6, 2, 0)
        assert teacher.take_lookups() == (0, 0, 0)
    assert asked(stub) == [[(5, 6, 7), (5, 6, 8)], [(9, 6, 8)]]
    for one, other in ((again[1], first[1]), (again[2], first[0]), (again[3], again[0])):
        for name in ("token_ids", "logprobs", "next_token_logprob", "tail_logprob"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_whatever_changes_the_answer_is_another_question(stub, tmp_path):
    other_teacher = IDENTITY.model_copy(update={"fingerprint": "2" * 64})
    with cached(tmp_path, stub.url) as teacher:
        teacher.score([A], ScoreOptions(K))
        teacher.score([A], ScoreOptions(K + 1))
        teacher.score([A], ScoreOptions(K, temperature=2.0))
        teacher.score([(A[0], 2)], ScoreOptions(K))
        assert len(stub.requests) == 4
    with cached(tmp_path, stub.url, dtype="float32") as teacher:
        teacher.score([A], ScoreOptions(K))
        assert len(stub.requests) == 5
    stub.info = info(other_teacher)
    with cached(tmp_path, stub.url) as teacher:
        teacher.score([A], ScoreOptions(K))
        assert len(stub.requests) == 6
    stub.info = info()
    with cached(tmp_path, stub.url) as teacher:  # all of it is there
        teacher.score([A], ScoreOptions(K))
        teacher.score([A], ScoreOptions(K, temperature=2.0))
        assert len(stub.requests) == 6


def test_draws_are_asked_for_again_and_never_mistaken_for_a_top_k(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        for seed in (7, 7, None):
            teacher.score([A], ScoreOptions(K, sample_seed=seed))
    assert [request.sample_seed for request in stub.requests] == [7, 7, None]


def test_requested_ids_are_part_of_the_question(stub, tmp_path):
    def answer(request):
        response = score_response(request)
        wanted = request.sequences[0].requested_token_ids
        scores = response.sequences[0].model_copy(
            update={"requested_logprobs": -wanted.astype(np.float32)}
        )
        return packed(response.model_copy(update={"sequences": [scores]}))

    stub.script = [answer, answer]
    with cached(tmp_path, stub.url) as teacher:
        for wanted in (ids(20, 21), ids(20, 22), ids(20, 21)):
            rows = np.tile(wanted, (2, 1))
            (score,) = teacher.score([A], ScoreOptions(K), requested=[rows])
            np.testing.assert_array_equal(score.requested_logprobs, -rows.astype(np.float32))
    assert len(stub.requests) == 2


def test_a_completion_is_written_once_for_its_prompt_seed_and_sampling(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        first = teacher.generate([ids(5, 6), ids(7)], SAMPLING)
        again = teacher.generate([ids(8), ids(7), ids(5, 6)], SAMPLING)
        assert asked(stub) == [[(5, 6), (7,)], [(8,)]]
        for change in (
            {"seed": 1}, {"temperature": 0.5}, {"stop_token_ids": [1, 2]}, {"max_new_tokens": 4},
        ):  # fmt: skip
            teacher.generate([ids(7)], replace(SAMPLING, **change))
            assert asked(stub)[-1] == [(7,)]
        assert len(stub.requests) == 6
    assert [c.token_ids.tolist() for c in again] == [[8, 1], [7, 1], [5, 1]]
    np.testing.assert_array_equal(again[2].scores.logprobs, first[0].scores.logprobs)


def test_scores_that_came_with_a_completion_serve_the_sequence_too(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        teacher.generate([ids(5, 6)], SAMPLING)
        teacher.score([(ids(5, 6, 5, 1), 2)], ScoreOptions(K))
        assert len(stub.requests) == 1
        # At another k the completion is known, and its scores alone are asked for.
        (completion,) = teacher.generate([ids(5, 6)], replace(SAMPLING, top_k=K + 1))
        assert completion.scores.token_ids.shape == (2, K + 1)
        assert asked(stub)[1:] == [[(5, 6, 5, 1)]]
        assert teacher.generate([ids(5, 6)], replace(SAMPLING, top_k=None))[0].scores is None
        assert len(stub.requests) == 2


def test_live_goes_past_the_store(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        for _ in range(2):
            teacher.live.score([A], ScoreOptions(K))
        assert teacher.take_lookups() == (0, 0, 0)
        teacher.score([A], ScoreOptions(K))
    assert len(stub.requests) == 3


def test_a_corrupt_answer_is_asked_for_anew_and_counted(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        teacher.score([A, B], ScoreOptions(K))
    corrupt_one_record(tmp_path)
    with cached(tmp_path, stub.url) as teacher:
        scores = teacher.score([A, B], ScoreOptions(K))
        assert teacher.take_lookups() == (2, 1, 1)
        assert len(stub.requests[-1].sequences) == 1
        np.testing.assert_array_equal(scores[0].logprobs, scores[1].logprobs)
        teacher.score([A, B], ScoreOptions(K))
        assert teacher.take_lookups() == (2, 2, 0)


def lied(field, value):
    """A change of scores, whose checksum is made anew: only what they say is wrong."""

    def change(score):
        array = getattr(score, field).copy()
        array[0] = value
        return score.model_copy(update={field: array})

    return change


LIES = {
    "mass above 1": lied("logprobs", -0.01),
    "above 0": lied("tail_logprob", 1.0),
    "NaN": lied("next_token_logprob", np.nan),
    "an id outside": lied("token_ids", 100),
    "an id twice": lied("token_ids", [2, 7, 2]),
    "the least probable first": lied("logprobs", [-6.0, -5.0, -4.7]),
    "a row too few": lambda score: scores(1, K),
    "too narrow": lambda score: scores(2, K - 1),
    "a completion": lambda score: Completion(token_ids=ids(5), finish_reason="stop"),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_a_record_that_cannot_be_an_answer_is_asked_for_anew_and_told_once(
    stub, tmp_path, caplog, change
):
    with cached(tmp_path, stub.url) as teacher:
        right = teacher.score([A, B], ScoreOptions(K))
        keys = [teacher._score_key(sequence, ScoreOptions(K)) for sequence in (A, B)]

    def rewrite(stored):  # a checksum is of key and record
        (key,) = (key for key in keys if checksum(key, stored[16:]) == stored[:16])
        score = wire.load(SparseLogprobs, stored[16:], wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 20)
        record = wire.dump(change(score), wire.MSGPACK_MEDIA_TYPE)
        return checksum(key, record) + record

    assert rewritten(tmp_path, rewrite, all=True) == 2
    with cached(tmp_path, stub.url) as teacher:
        again = teacher.score([A, B], ScoreOptions(K))
        assert teacher.take_lookups() == (2, 0, 2)
        for one, other in zip(again, right, strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
        teacher.score([A, B], ScoreOptions(K))
        assert teacher.take_lookups() == (2, 2, 0)
    assert len(stub.requests) == 2
    assert caplog.text.count("is not what was written") == 1


def test_a_completion_that_cannot_be_one_is_written_anew(stub, tmp_path):
    sampling = replace(SAMPLING, top_k=None)
    with cached(tmp_path, stub.url) as teacher:
        right = teacher.generate([ids(5, 6)], sampling)
        key = teacher._completion_key(ids(5, 6), sampling)

    def rewrite(stored):
        wrong = Completion(token_ids=ids(5, 100), finish_reason="stop")
        record = wire.dump(wrong, wire.MSGPACK_MEDIA_TYPE)
        return checksum(key, record) + record

    rewritten(tmp_path, rewrite)
    with cached(tmp_path, stub.url) as teacher:
        assert teacher.count_completions([ids(5, 6)], sampling) == 0
        (again,) = teacher.generate([ids(5, 6)], sampling)
        assert again.token_ids.tolist() == right[0].token_ids.tolist() == [5, 1]


def test_another_processs_answer_that_cannot_be_right_does_not_stand(stub, tmp_path):
    with cached(tmp_path, stub.url) as teacher:
        store, key = teacher._store, teacher._score_key(A, ScoreOptions(K))

        def answer(request):
            wrong = LIES["mass above 1"](scores(2, K))
            store.add({key: wire.dump(wrong, wire.MSGPACK_MEDIA_TYPE)})
            return packed(score_response(request))

        stub.script = [answer]
        (used,) = teacher.score([A], ScoreOptions(K))
        np.testing.assert_array_equal(used.logprobs, scores(2, K).logprobs)


def test_a_note_with_a_flipped_bit_is_not_used(stub, tmp_path):
    with cached(tmp_path, stub.url):
        pass
    file = database(tmp_path)
    data = bytearray(file.read_bytes())
    place = data.find(b"max_model_len")
    assert place > 0
    while place > 0:
        data[place + len(b"max_model_len")] ^= 0x01
        place = data.find(b"max_model_len", place + 1)
    file.write_bytes(data)
    with cached(tmp_path, stub.url, starts_alone=True) as teacher:
        assert teacher.connected
        assert teacher.info.max_model_len == 64


def test_without_a_teacher_the_answers_of_then_are_given(tmp_path, caplog):
    with StubTeacher(info=info(max_model_len=48)).serving() as stub:
        url = stub.url
        with cached(tmp_path, url) as teacher:
            scores = teacher.score([A], ScoreOptions(K))
    with cached(tmp_path, url, starts_alone=True) as teacher:
        assert teacher.info.max_model_len == 48
        (stored,) = teacher.submit(teacher.score, [A], ScoreOptions(K)).result(10)
        np.testing.assert_array_equal(stored.logprobs, scores[0].logprobs)
        with pytest.raises(TeacherUnreachableError) as error:
            teacher.submit(teacher.score, [A, B, C], ScoreOptions(K)).result(30)
        assert "2 of 3 scores are missing in --teacher_cache" in str(error.value)
        assert "`student-trainer precompute`" in str(error.value)
        with pytest.raises(TeacherUnreachableError, match="7 of 9 answers that this run needs"):
            teacher.require(7, 9)
        teacher.require(0, 9)
    assert "is switched off: the answers of" in caplog.text
    # Where the run will need it in any case, it is waited for at once.
    with cached(tmp_path, url, connect=False) as teacher, pytest.raises(TeacherUnreachableError):
        teacher.connect()


def test_a_note_that_is_corrupt_is_told_and_the_teacher_asked(stub, tmp_path, caplog):
    with cached(tmp_path, stub.url) as teacher:
        teacher._store.note(stub.url, b"\xc1 no message")
    with cached(tmp_path, stub.url, starts_alone=True) as teacher:
        assert teacher.connected
    assert "note of its teacher is corrupt" in caplog.text


def test_a_teacher_that_still_loads_is_waited_for_though_the_store_knows_one(tmp_path):
    with StubTeacher().serving() as stub, cached(tmp_path, stub.url):
        pass
    with (
        StubTeacher(info=info(max_model_len=48), not_ready=2).serving() as stub,
        cached(tmp_path, stub.url, starts_alone=True) as teacher,
    ):
        assert teacher.info.max_model_len == 48


def test_a_store_that_does_not_know_the_teacher_waits_for_it(tmp_path):
    with (
        cached(tmp_path, "http://127.0.0.1:9", starts_alone=True, connect=False) as teacher,
        pytest.raises(TeacherUnreachableError, match="--teacher_timeout"),
    ):
        teacher.connect()


def test_the_only_teacher_of_a_store_is_known_at_any_address_and_two_are_not(tmp_path):
    with StubTeacher().serving() as stub, cached(tmp_path, stub.url) as teacher:
        teacher.score([A], ScoreOptions(K))
    with cached(tmp_path, "http://127.0.0.1:9", starts_alone=True) as teacher:
        assert len(teacher.score([A], ScoreOptions(K))) == 1
    other = info(IDENTITY.model_copy(update={"model": "other"}))
    with StubTeacher(info=other).serving() as second, cached(tmp_path, second.url):
        pass
    with (
        cached(tmp_path, "http://127.0.0.1:9", starts_alone=True, connect=False) as teacher,
        pytest.raises(TeacherUnreachableError),
    ):
        teacher.connect()
    with cached(tmp_path, second.url, starts_alone=True) as teacher:
        assert teacher.info.teacher.model == "other"


def test_two_models_of_one_address_are_two_teachers(tmp_path):
    code = IDENTITY.model_copy(update={"model": "code", "fingerprint": "2" * 64})
    several = info().model_copy(update={"models": [IDENTITY, code]})
    with StubTeacher(info=several).serving() as stub:
        url = stub.url
        with cached(tmp_path, url, model=IDENTITY.model):
            pass
    with cached(tmp_path, url, starts_alone=True, model="code") as teacher:
        assert teacher.info.teacher == code  # the server has told of it
    with (
        cached(tmp_path, url, starts_alone=True, connect=False, model="maths") as teacher,
        pytest.raises(TeacherUnreachableError),
    ):
        teacher.connect()
    port = int(url.rsplit(":", 1)[1])
    with StubTeacher(info=several).serving(port), cached(tmp_path, url, model="code"):
        pass
    for model in (IDENTITY.model, "code"):
        with cached(tmp_path, url, starts_alone=True, model=model) as teacher:
            assert teacher.info.teacher.model == model


def test_a_teacher_that_comes_back_for_what_is_missing_must_be_the_same(tmp_path):
    with StubTeacher().serving() as stub, cached(tmp_path, stub.url) as teacher:
        teacher.score([A], ScoreOptions(K))
    port = int(stub.url.rsplit(":", 1)[1])
    with (
        cached(tmp_path, stub.url, starts_alone=True) as teacher,
        StubTeacher().serving(port) as same,
    ):
        teacher.score([A, B], ScoreOptions(K))
        assert asked(same) == [[(5, 6, 8)]]
    other = info(IDENTITY.model_copy(update={"fingerprint": "2" * 64}))
    with (
        cached(tmp_path, stub.url, starts_alone=True) as teacher,
        StubTeacher(info=other).serving(port) as changed,
    ):
        with pytest.raises(TeacherChangedError, match="is another one now"):
            teacher.score([C], ScoreOptions(K))
        assert changed.requests == []


def test_two_who_ask_at_once_learn_from_the_first_answer(stub, tmp_path):
    """Both ask before either has stored: they agree all the same."""
    with cached(tmp_path, stub.url) as teacher:
        store = teacher._store
        key = teacher._score_key(A, ScoreOptions(K))

        def answer(request):  # another process is faster, by a different batch: a bit differs
            (right,) = score_response(request).sequences
            other = right.model_copy(update={"tail_logprob": right.tail_logprob - 1})
            store.add({key: wire.dump(other, wire.MSGPACK_MEDIA_TYPE)})
            return packed(score_response(request))

        stub.script = [answer]
        (used,) = teacher.score([A], ScoreOptions(K))
        (stored,) = teacher.score([A], ScoreOptions(K))
    np.testing.assert_array_equal(used.tail_logprob, stored.tail_logprob)
    assert used.tail_logprob[0] < scores(2, K).tail_logprob[0] - 0.5
