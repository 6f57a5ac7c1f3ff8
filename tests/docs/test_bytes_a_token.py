"""The bytes a token that pages name are those that the wire carries."""

import re

import numpy as np
import pytest

from shared.protocol import ScoreResponse, TeacherIdentity
from shared.sparse import SparseLogprobs
from shared.wire import MSGPACK_MEDIA_TYPE, dump
from tests.support.repository import ROOT, pages

# "392 bytes a token", "392 bytes for each completion token", "costs 392 bytes at k = 64".
_NAMED = re.compile(r"(\d{3,})\s+bytes\s+(?:(?:a|for\s+each)\s+(?:\w+\s+)?token|at\s+k\s+=\s+64)\b")


def answer(tokens, completions, dtype=np.float16):
    """Return the bytes of an answer at k = 64."""
    one = SparseLogprobs(
        token_ids=np.zeros((tokens, 64), np.uint32),
        logprobs=np.full((tokens, 64), -1, dtype),
        next_token_logprob=np.full(tokens, -1, np.float32),
        tail_logprob=np.full(tokens, -1, np.float32),
    )
    teacher = TeacherIdentity(
        model="org/model", fingerprint="0" * 64, dtype="bfloat16", backend="vllm", version="0.32.0"
    )
    message = ScoreResponse(sequences=[one] * completions, teacher=teacher, request_id="r" * 32)
    return len(dump(message, MSGPACK_MEDIA_TYPE))


def test_all_pages_name_the_same_numbers():
    named = [n for page in pages() for n in _NAMED.findall((ROOT / page).read_text())]
    assert len(named) >= 8
    assert set(named) == {"392", "520"}


@pytest.mark.parametrize(("dtype", "size"), [(np.float16, 392), (np.float32, 520)])
def test_a_token_takes_that_number(dtype, size):
    assert answer(129, 8, dtype) - answer(128, 8, dtype) == 8 * size


@pytest.mark.parametrize("tokens", [16, 256])
def test_a_completion_and_an_answer_take_some_200_more(tokens):
    completion = answer(tokens, 9) - answer(tokens, 8)
    assert completion - 392 * tokens == pytest.approx(200, abs=20)
    assert answer(tokens, 1) - completion == pytest.approx(200, abs=20)


def test_answers_of_twelve_tokens_take_410_bytes_for_each():
    assert round(answer(12, 8) / (12 * 8), -1) == 410
