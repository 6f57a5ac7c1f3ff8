"""The client as a notebook uses it: short reprs, text, closing itself, errors in keywords."""

import gc
import inspect
import warnings
import weakref

import numpy as np
import pytest

from shared.errors import ConfigurationError, TeacherUnreachableError
from shared.identity import tokenizer_identity
from student_trainer import Scored, TeacherClient, teacher_distribution
from tests.support.models import save_tokenizer
from tests.support.server import free_port
from tests.support.stub import StubTeacher, info


@pytest.fixture
def stub(tokenizer):
    facts = info(tokenizer=tokenizer_identity(tokenizer), vocab_size=260)
    with StubTeacher(facts).serving() as served:
        yield served


def test_what_it_returns_is_shown_in_a_line(stub, tokenizer):
    with TeacherClient(stub.url, tokenizer=tokenizer) as client:
        assert repr(client) == f"TeacherClient({stub.url})"
        [scored] = client.score([([10, 11, 12, 13, 14], 1)], top_k=3)
        assert repr(client).startswith(f"TeacherClient({stub.url}, ")
    perplexity = np.exp(-scored.scores.next_token_logprob.mean())
    assert repr(scored) == f"Scored(4 tokens, k=3, perplexity {perplexity:.3g})"
    assert repr(scored.sample) == "Sample(1 + 4 tokens, by the dataset)"
    assert repr(scored.scores) == str(scored.scores) == "SparseLogprobs(4 positions, k=3)"
    assert repr(teacher_distribution([scored], 260)).startswith("SparseDistribution(N=4, K=4, ")
    for shown in (repr(client.info), str(client.info)):
        assert shown.startswith("InfoResponse(")
        assert "260 tokens" in shown
        assert len(shown) < 200


def test_the_text_of_a_completion_is_read_where_there_is_a_tokenizer(stub, tokenizer):
    with TeacherClient(stub.url, tokenizer=tokenizer) as client:
        [scored] = client.score([{"prompt": "a", "completion": "bcd"}], top_k=2)
    assert scored.text == "bcd"
    with TeacherClient(stub.url) as client:
        [bare] = client.score([([10, 11, 12], 1)], top_k=2)
    with pytest.raises(ConfigurationError, match="give TeacherClient tokenizer="):
        _ = bare.text
    assert isinstance(bare, Scored)


def test_a_tokenizer_may_be_named_by_its_folder(stub, tmp_path):
    save_tokenizer(tmp_path / "model")
    for name in (tmp_path / "model", str(tmp_path / "model")):
        with TeacherClient(stub.url, tokenizer=name) as client:
            [scored] = client.score([{"prompt": "a", "completion": "b"}], top_k=2)
            assert scored.text == "b"
    with pytest.raises(ConfigurationError, match=r"tokenizer=: folder \./none does not exist"):
        TeacherClient(stub.url, tokenizer="./none")
    with pytest.raises(ConfigurationError, match="tokenizer='org/none': folder org/none does not"):
        TeacherClient(stub.url, tokenizer="org/none")


def test_errors_name_keywords():
    with pytest.raises(ConfigurationError, match=r"^teacher_url='host:1' must look like"):
        TeacherClient("host:1")
    with pytest.raises(ConfigurationError, match=r"^teacher_timeout=0\.0 must be above 0"):
        TeacherClient("http://host:1", teacher_timeout=0.0)


def test_a_server_that_is_not_there_is_given_up_after_ten_seconds():
    defaults = inspect.signature(TeacherClient).parameters
    assert defaults["absent_timeout"].default == 10.0
    url = f"http://127.0.0.1:{free_port()}"
    client = TeacherClient(url, absent_timeout=0.1)
    with pytest.raises(TeacherUnreachableError, match="raise absent_timeout=") as caught:
        _ = client.info
    assert "Start it with `teacher-server serve MODEL`, check teacher_url=" in str(caught.value)


def test_it_closes_itself(stub):
    gc.collect()  # of what other tests left, whose warnings are not meant
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client = TeacherClient(stub.url)
        client.score([([10, 11, 12], 1)], top_k=2)
        inner, gone = client._teacher._replicas.http._client, weakref.ref(client)
        del client
        gc.collect()
    assert gone() is None
    assert inner.is_closed
    assert [str(one.message) for one in caught if one.category is ResourceWarning] == []
