"""Errors cross HTTP as problem documents and come out as what they were."""

import pytest

from shared.errors import ProtocolError, SparseGKDError, error_from_problem
from shared.protocol import Problem

KINDS = ProtocolError.__subclasses__()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_round_trip(kind):
    sent = kind("k 7 is over 5", field="top_k", retry_after=2.0)
    problem = sent.to_problem("id-1")
    assert Problem.model_validate(problem).status == kind.status
    assert problem["type"] == f"urn:sparse-gkd:problem:{kind.slug()}"
    got = error_from_problem(kind.status, problem, retry_after=2.0)
    assert type(got) is kind
    assert isinstance(got, SparseGKDError)
    assert (got.detail, got.field, got.request_id) == ("k 7 is over 5", "top_k", "id-1")
    assert got.retry_after == 2.0


def test_every_kind_has_a_status_and_a_type_of_its_own():
    assert len(KINDS) == 11
    assert len({kind.status for kind in KINDS}) == len(KINDS)
    assert len({kind.slug() for kind in KINDS}) == len(KINDS)


def test_a_field_that_is_unknown_is_left_out():
    assert "field" not in KINDS[0]("detail").to_problem("id")


@pytest.mark.parametrize("problem", [{}, {"detail": None, "field": 3, "request_id": []}])
def test_a_strange_problem_document_still_gives_an_error(problem):
    error = error_from_problem(418, problem)
    assert type(error) is ProtocolError
    assert "418" in error.detail
    assert error.field is None
    assert error.request_id is None
