"""The arrays of one scored sequence check themselves."""

import numpy as np
import pytest
from pydantic import ValidationError

from shared.errors import TeacherAnswerError
from shared.sparse import SparseLogprobs


def scores(**changes):
    arrays = {
        "token_ids": np.array([[1, 2], [3, 4], [5, 6]], np.uint32),
        "logprobs": np.full((3, 2), -1.0, np.float32),
        "next_token_logprob": np.full(3, -2.0, np.float32),
        "tail_logprob": np.full(3, -3.0, np.float32),
        "requested_logprobs": np.full((3, 4), -4.0, np.float32),
    }
    return SparseLogprobs(**{**arrays, **changes})


def test_length_and_bytes_count_what_travels():
    assert len(scores()) == 3
    assert scores().nbytes == 4 * (6 + 6 + 3 + 3 + 12)
    half = scores(logprobs=np.zeros((3, 2), np.float16), requested_logprobs=None)
    assert half.nbytes == 24 + 12 + 12 + 12


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("logprobs", (3, 1)),
        ("logprobs", (2, 2)),
        ("next_token_logprob", (2,)),
        ("tail_logprob", (4,)),
        ("requested_logprobs", (2, 4)),
    ],
)
def test_shapes_that_disagree_are_refused(field, shape):
    with pytest.raises(ValidationError, match=f"{field} has shape"):
        scores(**{field: np.zeros(shape, np.float32)})


def test_finite_scores_and_an_empty_tail_are_accepted():
    scores(tail_logprob=np.array([-np.inf, -1.0, -np.inf], np.float32)).require_finite("row 1")
    scores(requested_logprobs=None).require_finite("row 1")


FIELDS = ["logprobs", "next_token_logprob", "tail_logprob", "requested_logprobs"]


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in FIELDS for value in (np.nan, np.inf)]
    + [(field, -np.inf) for field in FIELDS if field != "tail_logprob"],
)
def test_non_finite_scores_are_refused_with_sequence_field_and_row(field, value):
    array = getattr(scores(), field).copy()
    array[2, ...] = value
    with pytest.raises(TeacherAnswerError) as refusal:
        scores(**{field: array}).require_finite("line 17")
    assert str(refusal.value).startswith(f"line 17: the teacher answered {field}[2")
    assert str(value) in str(refusal.value)
