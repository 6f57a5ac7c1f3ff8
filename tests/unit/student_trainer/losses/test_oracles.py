"""Values and gradients against numbers that were computed independently, in float64."""

import json
import math
from pathlib import Path

import pytest
import torch

from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    generalized_jsd,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)

ORACLES = Path(__file__).parents[5] / "shared" / "oracles" / "gjsd.json"
CASES = json.loads(ORACLES.read_text()) if ORACLES.is_file() else []

pytestmark = pytest.mark.skipif(not CASES, reason=f"{ORACLES} is absent")


def describe(case):
    return f"{case['case']}-beta{case['beta']}-T{case['temperature']}-k{len(case['support'])}"


def row(values):
    return torch.tensor([values], dtype=torch.float64)


def teacher_of(case):
    tail = case["teacher_tail_logprob"]
    return SparseDistribution(
        token_ids=torch.tensor([case["support"]]),
        logprobs=row(case["teacher_logprobs"]),
        tail_logprob=row(-math.inf if tail is None else tail).reshape(1),
    )


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, row(expected), rtol=0.0, atol=1e-10)


def test_there_are_160_cases():
    assert len(CASES) == 160


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_dense_divergence_equals_the_oracle(case):
    value = generalized_jsd(
        row(case["student_logits"]),
        row(case["teacher_logits"]),
        Divergence(case["beta"], case["temperature"]),
    )
    assert value.item() == pytest.approx(case["dense_value"], rel=0.0, abs=1e-10)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_sparse_divergence_and_gradient_equal_the_oracle(case):
    logits = row(case["student_logits"]).requires_grad_()
    value = sparse_generalized_jsd(
        logits, teacher_of(case), Divergence(case["beta"], case["temperature"])
    ).loss
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.item() == pytest.approx(case["value"], rel=0.0, abs=1e-10)
    assert_equal(gradient, case["grad_student_logits"])


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_linear_divergence_and_gradient_equal_the_oracle(case):
    """With the identity as output layer the hidden state is the logits."""
    hidden = row(case["student_logits"]).requires_grad_()
    weight = torch.eye(hidden.shape[1], dtype=torch.float64, requires_grad=True)
    value = linear_sparse_jsd(
        hidden,
        weight,
        teacher_of(case),
        Divergence(case["beta"], case["temperature"]),
        normalizer=1,
    ).loss
    grad_hidden, grad_weight = torch.autograd.grad(value, (hidden, weight))
    assert value.item() == pytest.approx(case["value"], rel=0.0, abs=1e-10)
    assert_equal(grad_hidden, case["grad_student_logits"])
    outer = torch.outer(grad_hidden[0], hidden.detach()[0])
    torch.testing.assert_close(grad_weight, outer, rtol=0.0, atol=1e-10)
