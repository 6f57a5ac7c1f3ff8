"""The clients of a run's teachers, and the answers that they keep under whatever name."""

import numpy as np
import pytest

from student_trainer.config.arguments import ModelArguments, TeacherArguments
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.cache import CachedTeacher
from student_trainer.teacher.store import AnswerStore
from student_trainer.training.teachers import open_teachers
from tests.support.cache import corrupt_one_record
from tests.support.stub import IDENTITY, StubTeacher, info

A = (np.array([5, 6, 7], np.uint32), 1)
B = (np.array([5, 6, 8], np.uint32), 1)


def score(urls, cache, *sequences, alone=False, names=(None,)):
    """Score with the teachers of these names; return how often the cache had no answer."""
    flags = TeacherArguments(list(urls), teacher_cache=str(cache), teacher_timeout=2.0)
    with open_teachers(flags, ModelArguments("student"), starts_alone=alone) as teachers:
        teachers.connect()
        for name in names:
            teachers.of(name).score(list(sequences), ScoreOptions(3))
        looked_up, found, _ = teachers.take_lookups()
    return looked_up - found


@pytest.fixture
def stub():
    with StubTeacher().serving() as stub:
        yield stub


def test_a_teacher_that_gets_a_name_keeps_its_answers(stub, tmp_path):
    assert score([stub.url], tmp_path, A) == 1
    assert score([f"math={stub.url}"], tmp_path, A, B) == 1
    assert score([f"maths={stub.url}"], tmp_path, A, B) == 0
    assert score([stub.url], tmp_path, A, B) == 0


def test_a_teacher_that_gets_a_name_is_known_without_its_server(tmp_path):
    with StubTeacher().serving() as stub:
        score([stub.url], tmp_path, A)
    assert score([f"math={stub.url}"], tmp_path, A, alone=True) == 0


def test_a_named_teacher_is_known_at_another_address_among_several(tmp_path):
    code = info(IDENTITY.model_copy(update={"model": "code", "fingerprint": "2" * 64}))
    with StubTeacher().serving() as one, StubTeacher(info=code).serving() as two:
        urls = [f"math={one.url}", f"code={two.url}"]
        assert score(urls, tmp_path, A, names=("math", "code")) == 2
    gone = ["math=http://127.0.0.1:9", "code=http://127.0.0.1:9"]
    assert score(gone, tmp_path, A, alone=True, names=("math", "code")) == 0


def test_the_first_of_a_servers_models_is_not_taken_for_one_that_is_named(tmp_path):
    code = IDENTITY.model_copy(update={"model": "code", "fingerprint": "2" * 64})
    several = info(models=[IDENTITY, code])
    with StubTeacher(info=several).serving() as stub:
        score([stub.url], tmp_path, A)
    flags = TeacherArguments([f"code={stub.url}"], teacher_cache=str(tmp_path))
    with open_teachers(flags, ModelArguments("student"), starts_alone=True) as teachers:
        assert teachers.connect()[0].teacher == code


def test_the_folder_that_an_earlier_version_made_for_a_teacher_is_used_further_on(stub, tmp_path):
    AnswerStore(tmp_path / "math", max_bytes=1 << 20).close()
    urls = [f"math={stub.url}", f"code={stub.url}"]
    flags = TeacherArguments(urls, teacher_cache=str(tmp_path))
    with open_teachers(flags, ModelArguments("student")) as teachers:
        stores = [client._store._folder for _, client in teachers.items()]
    assert stores == [tmp_path / "math", tmp_path]


def test_a_corrupt_answer_of_a_shared_store_is_counted_once(stub, tmp_path):
    score([stub.url], tmp_path, A)
    corrupt_one_record(tmp_path)
    flags = TeacherArguments([f"math={stub.url}", f"code={stub.url}"], teacher_cache=str(tmp_path))
    with open_teachers(flags, ModelArguments("student")) as teachers:
        teachers.connect()
        client = teachers.of("code")
        assert isinstance(client, CachedTeacher)
        client.score([A], ScoreOptions(3))
        assert teachers.take_lookups() == (1, 0, 1)
