"""The sparse divergence on hard inputs: half precision, extremes, nothing, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    generalized_jsd,
    sparse_generalized_jsd,
)
from tests.support.losses import BETAS, TAILS, assert_close, plain, top_k, value_and_gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_logits_are_computed_in_float32(dtype, beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 30).to(dtype).float()
    support = top_k(teacher, 5)
    value, gradient = value_and_gradient(student, support, Divergence(beta))
    half_value, half_gradient = value_and_gradient(student.to(dtype), support, Divergence(beta))
    assert half_value.dtype == torch.float32
    assert_close(half_value, value, 0.0)
    assert half_gradient.dtype == dtype
    assert_close(half_gradient, gradient.to(dtype), 0.0)


@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_logits_under_autocast_give_the_same(beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 30)
    support = top_k(teacher, 5)
    value, gradient = value_and_gradient(student, support, Divergence(beta))
    with torch.autocast("cpu", torch.bfloat16):
        cast_value, cast_gradient = value_and_gradient(student, support, Divergence(beta))
    assert_close(cast_value, value, 0.0)
    assert_close(cast_gradient, gradient, 0.0)


def extremes(dtype):
    """(student logits, teacher): all the student's mass on one side, the teacher's on any."""
    ramp = torch.linspace(-1.0, 1.0, 40, dtype=dtype)[None]
    ids = torch.arange(8)[None]
    nearly_all = torch.full((1, 8), -math.log(8.0), dtype=dtype)
    # Student: far up or down on the support, by more than float32 can exponentiate.
    for shift in (-2e4, -200.0, -90.0, 0.0, 90.0, 200.0, 2e4):
        student = ramp.clone()
        student[:, :8] += shift
        for offset in (-1e4, 1e4):
            # Teacher: all on the support (tail −inf or small), all on the tail, on one token.
            for support, tail in (
                (nearly_all, -math.inf),
                (nearly_all, -60.0),
                (torch.full_like(nearly_all, -60.0), 0.0),
                (torch.full_like(nearly_all, -math.inf).index_fill_(1, ids[0, :1], 0.0), -80.0),
            ):
                yield (
                    student + offset,
                    SparseDistribution(ids, support, torch.full((1,), tail, dtype=dtype)),
                )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", BETAS)
def test_extreme_rows_stay_finite_and_exact_in_float32(beta, tail):
    # Renormalised over a support 2e4 nats below the maximum, float32 has 3 digits left.
    tolerance = 1e-5 if tail == "bucket" else 1e-3
    compared = 0
    for student, teacher in extremes(torch.float32):
        value, gradient = value_and_gradient(student, teacher, Divergence(beta, tail=tail))
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        if tail == "bucket":
            assert abs(gradient.sum().item()) < tolerance * gradient.abs().sum().clamp_min(1.0)
        if teacher.logprobs.isneginf().any() or teacher.tail_logprob.isneginf().any():
            continue  # what stands for log 0 depends on the dtype
        double = SparseDistribution(
            teacher.token_ids, teacher.logprobs.double(), teacher.tail_logprob.double()
        )
        exact_value, exact_gradient = value_and_gradient(
            student.double(), double, Divergence(beta, tail=tail)
        )
        torch.testing.assert_close(value.double(), exact_value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            gradient.double(), exact_gradient, rtol=tolerance, atol=tolerance
        )
        compared += 1
    assert compared == 28


@pytest.mark.parametrize("beta", BETAS)
def test_a_tail_that_underflows_still_pulls_towards_its_tokens(beta):
    """The student is 200 nats off the tail that holds the teacher: forward KL must say so."""
    student = torch.tensor([[100.0, -100.0, -101.0]])
    teacher = SparseDistribution(
        torch.tensor([[0]]), torch.tensor([[-30.0]]), torch.tensor([-(math.exp(-30.0))])
    )
    value, gradient = value_and_gradient(student, teacher, Divergence(beta))
    double = SparseDistribution(
        teacher.token_ids, teacher.logprobs.double(), teacher.tail_logprob.double()
    )
    exact_value, exact_gradient = value_and_gradient(
        student.double(), double, Divergence(beta), plain
    )
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=1e-6)
    if beta == 0.0:
        assert value.item() == pytest.approx(200.0 - math.log1p(math.exp(-1.0)), abs=1e-3)
        assert gradient[0, 1].item() == pytest.approx(-1 / (1 + math.exp(-1.0)), abs=1e-5)


def test_student_logits_of_minus_infinity_are_tokens_without_probability():
    student = torch.tensor([[1.0, 0.5, -math.inf, -math.inf]])
    support = SparseDistribution(
        torch.tensor([[0, 1]]), torch.tensor([[-0.4, -1.2]]), torch.tensor([-3.5])
    )
    for beta in (0.1, 0.5, 1.0):
        value, gradient = value_and_gradient(student, support, Divergence(beta))
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient[0, 2:].tolist() == [0.0, 0.0]


def test_no_rows_give_an_empty_divergence():
    empty = SparseDistribution(
        torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0)
    )
    value, gradient = value_and_gradient(torch.zeros(0, 5), empty, Divergence())
    assert value.shape == (0,)
    assert gradient.shape == (0, 5)


def teacher_with(**changes):
    fields = {
        "token_ids": torch.tensor([[0, 1]]),
        "logprobs": torch.tensor([[-1.0, -1.0]]),
        "tail_logprob": torch.tensor([-1.3]),
    }
    return SparseDistribution(**{**fields, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -0.1}, r"beta -0\.1"),
        ({"beta": 1.1}, r"beta 1\.1"),
        ({"beta": math.nan}, "beta nan"),
        ({"temperature": 0.0}, r"temperature 0\.0"),
        ({"temperature": -1.0}, r"temperature -1\.0"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"tail": "drop"}, "'drop' must be 'bucket' or 'renormalize'"),
    ],
)
def test_parameters_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)
    with pytest.raises(ValueError, match=message):
        replace(Divergence(), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.tensor([[0, 4]])}, "holds 4; ids must be below the vocabulary of 4"),
        ({"token_ids": torch.tensor([[0, -2]])}, "holds -2"),
        ({"logprobs": torch.tensor([[-1.0, math.nan]])}, r"teacher\.logprobs holds NaN"),
        ({"logprobs": torch.tensor([[-1.0, math.inf]])}, r"teacher\.logprobs holds NaN or \+inf"),
        ({"tail_logprob": torch.tensor([math.nan])}, r"teacher\.tail_logprob holds NaN"),
        ({"tail_logprob": torch.tensor([math.inf])}, r"teacher\.tail_logprob holds NaN or \+inf"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sparse_generalized_jsd(torch.zeros(1, 4), teacher_with(**changes), Divergence())


@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 1, 4)])
def test_student_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"student_logits must be \[N, V\] with N = 1"):
        sparse_generalized_jsd(torch.zeros(shape), teacher_with(), Divergence())


@pytest.mark.parametrize(("student", "teacher"), [((1, 4), (1, 5)), ((2, 4), (1, 4)), ((4,), (4,))])
def test_dense_logits_of_different_shapes_are_refused(student, teacher):
    with pytest.raises(ValueError, match=r"must both be \[N, V\]"):
        generalized_jsd(torch.zeros(student), torch.zeros(teacher), Divergence())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.tensor([[0, 1]], dtype=torch.int32)}, r"int64 \[N, K\]"),
        ({"token_ids": torch.tensor([0, 1])}, r"int64 \[N, K\]"),
        ({"token_ids": torch.zeros(1, 0, dtype=torch.int64)}, "K at least 1"),
        ({"logprobs": torch.zeros(1, 3)}, r"logprobs must be \[N, K\] = \[1, 2\]"),
        ({"tail_logprob": torch.zeros(1, 1)}, r"tail_logprob must be \[N\] = \[1\]"),
    ],
)
def test_a_distribution_whose_shapes_do_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        teacher_with(**changes)
