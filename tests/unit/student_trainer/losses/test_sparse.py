"""The sparse divergence: its properties, its closed-form gradient, its tail."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    closed_form,
    generalized_jsd,
    sparse_generalized_jsd,
)
from tests.support.losses import (
    BETAS,
    TAILS,
    assert_close,
    plain,
    top_k,
    value_and_gradient,
)

FIVE_TEACHER = [2.0, 1.0, 0.5, -1.0, -2.0]
FIVE_STUDENT = [0.2, 1.5, -0.5, 0.7, -1.0]


@st.composite
def problems(draw):
    """Student logits, teacher logits [N, V] float64, k, and a divergence with the tail's bucket."""
    vocab_size = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
    student, teacher = scale * torch.randn(
        2, draw(st.integers(1, 3)), vocab_size, generator=generator, dtype=torch.float64
    )
    divergence = Divergence(draw(st.sampled_from(BETAS)), draw(st.sampled_from([0.5, 1.0, 2.0])))
    return student, teacher, draw(st.integers(1, vocab_size)), divergence


@settings(deadline=None)
@given(problems())
def test_sparse_never_exceeds_dense(problem):
    student, teacher, k, divergence = problem
    support = top_k(teacher, k, divergence.temperature)
    sparse = sparse_generalized_jsd(student, support, divergence).loss
    assert (sparse <= generalized_jsd(student, teacher, divergence) + 1e-12).all()
    assert (sparse >= -1e-12).all()


@settings(deadline=None)
@given(problems())
def test_sparse_equals_dense_when_the_support_is_the_vocabulary(problem):
    student, teacher, _, divergence = problem
    support = top_k(teacher, teacher.shape[1], divergence.temperature)
    assert support.tail_logprob.isneginf().all()
    value, gradient = value_and_gradient(student, support, divergence)
    dense_value, dense_gradient = value_and_gradient(student, teacher, divergence, generalized_jsd)
    assert_close(value, dense_value)
    assert_close(gradient, dense_gradient)


@settings(deadline=None)
@given(problems(), st.sampled_from(TAILS))
def test_value_and_gradient_vanish_when_student_equals_teacher(problem, tail):
    _, teacher, k, divergence = problem
    support = top_k(teacher, k, divergence.temperature)
    value, gradient = value_and_gradient(teacher, support, replace(divergence, tail=tail))
    assert_close(value, torch.zeros_like(value))
    assert_close(gradient, torch.zeros_like(gradient))


@settings(deadline=None)
@given(problems(), st.sampled_from(TAILS))
def test_gradient_sums_to_zero_over_the_vocabulary(problem, tail):
    student, teacher, k, divergence = problem
    support = top_k(teacher, k, divergence.temperature)
    _, gradient = value_and_gradient(student, support, replace(divergence, tail=tail))
    assert_close(gradient.sum(dim=-1), torch.zeros(len(gradient), dtype=torch.float64))


@settings(deadline=None)
@given(problems(), st.sampled_from(TAILS))
def test_closed_form_equals_autograd_of_the_definition(problem, tail):
    student, teacher, k, divergence = problem
    support = top_k(teacher, k, divergence.temperature)
    value, gradient = value_and_gradient(student, support, replace(divergence, tail=tail))
    expected_value, expected_gradient = value_and_gradient(
        student, support, replace(divergence, tail=tail), plain
    )
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)


@settings(deadline=None)
@given(problems(), st.sampled_from(TAILS), st.randoms(use_true_random=False))
def test_permutation_and_padding_of_the_support_change_nothing(problem, tail, random):
    student, teacher, k, divergence = problem
    support = top_k(teacher, k, divergence.temperature)
    order = random.sample(range(k + 3), k + 3)
    ids = torch.cat([support.token_ids, torch.full((len(student), 3), -1)], dim=1)
    junk = torch.tensor([[math.nan, math.inf, 5.0]], dtype=torch.float64)
    logprobs = torch.cat([support.logprobs, junk.expand(len(student), 3)], dim=1)
    shuffled = SparseDistribution(ids[:, order], logprobs[:, order], support.tail_logprob)
    value, gradient = value_and_gradient(student, support, replace(divergence, tail=tail))
    same_value, same_gradient = value_and_gradient(
        student, shuffled, replace(divergence, tail=tail)
    )
    assert_close(same_value, value)
    assert_close(same_gradient, gradient)


@pytest.mark.parametrize("beta", BETAS)
def test_upstream_gradient_scales_each_row(beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, dtype=torch.float64)
    support, weights = top_k(teacher, 3), torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)
    _, gradient = value_and_gradient(student, support, Divergence(beta))
    student.requires_grad_()
    (weighted,) = torch.autograd.grad(
        sparse_generalized_jsd(student, support, Divergence(beta)).loss,
        student,
        grad_outputs=weights,
    )
    assert_close(weighted, gradient * weights[:, None])


@pytest.mark.parametrize("beta", BETAS)
def test_rows_without_any_support_have_no_divergence_and_no_gradient(beta):
    student = torch.randn(2, 6, dtype=torch.float64)
    support = SparseDistribution(
        torch.tensor([[-1, -1], [2, -1]]),
        torch.tensor([[math.nan, 0.0], [-1.0, 0.0]], dtype=torch.float64),
        torch.tensor([0.0, math.log1p(-math.exp(-1.0))], dtype=torch.float64),
    )
    value, gradient = value_and_gradient(student, support, Divergence(beta))
    expected_value, expected_gradient = value_and_gradient(
        student[1:], support[1:], Divergence(beta), plain
    )
    assert_close(value[0], torch.zeros_like(value[0]), 1e-14)
    assert_close(gradient[0], torch.zeros_like(gradient[0]), 1e-14)
    assert_close(value[1:], expected_value)
    assert_close(gradient[1:], expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_teacher_at_beta_0_is_cross_entropy(dtype):
    """Its tail is empty (−inf) although the vocabulary has other tokens."""
    torch.manual_seed(0)
    student = 3 * torch.randn(4, 50, dtype=dtype)
    labels = torch.tensor([3, 0, 49, 7])
    teacher = SparseDistribution(
        labels[:, None], torch.zeros(4, 1, dtype=dtype), torch.full((4,), -math.inf, dtype=dtype)
    )
    value, gradient = value_and_gradient(student, teacher, Divergence(0.0))
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    one_hot = torch.nn.functional.one_hot(labels, 50)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(value, expected, tolerance)
    assert_close(gradient, student.softmax(dim=-1) - one_hot, tolerance)


def test_statistics_describe_each_row():
    student = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 2.0, 1.0, 9.0]], dtype=torch.float64)
    support = top_k(teacher, 2)
    divergence, statistics = sparse_generalized_jsd(student.requires_grad_(), support, Divergence())
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    kept_p, kept_q = p.gather(1, support.token_ids), q.gather(1, support.token_ids)
    outcomes_p, outcomes_q = (
        torch.cat([kept, 1 - kept.sum(1, keepdim=True)], dim=1) for kept in (kept_p, kept_q)
    )
    for column, expected in (
        (statistics.divergence, divergence.detach()),
        (statistics.teacher_support_mass, kept_p.sum(1)),
        (statistics.student_support_mass, kept_q.sum(1)),
        (statistics.teacher_entropy, -(outcomes_p * outcomes_p.log()).sum(1)),
        (statistics.student_entropy, -(outcomes_q * outcomes_q.log()).sum(1)),
        (statistics.top1_agreement, torch.tensor([0.0, 1.0])),
    ):
        assert column.dtype == torch.float32
        assert not column.requires_grad
        assert_close(column, expected.float(), 1e-6)


def test_float32_divergence_is_differentiable_beside_its_statistics():
    student = torch.randn(3, 8, requires_grad=True)
    divergence, statistics = sparse_generalized_jsd(
        student, top_k(torch.randn(3, 8), 2), Divergence()
    )
    assert divergence.requires_grad
    assert not statistics.divergence.requires_grad


def test_inputs_are_left_as_they_are():
    student, teacher = torch.randn(3, 8), top_k(torch.randn(3, 8), 2)
    inputs = [student, teacher.token_ids, teacher.logprobs, teacher.tail_logprob]
    before = [tensor.clone() for tensor in inputs]
    value_and_gradient(student, teacher, Divergence())
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


def truncated_reverse_kl(logits, teacher, divergence):
    """Return what some systems compute: reverse KL over the support alone, no tail."""
    assert divergence == Divergence(1.0)
    log_q = logits.log_softmax(dim=-1).gather(1, teacher.token_ids)
    return (log_q.exp() * (log_q - teacher.logprobs)).sum(dim=-1)


def renormalized(logits, teacher, divergence):
    return sparse_generalized_jsd(logits, teacher, replace(divergence, tail="renormalize")).loss


@pytest.mark.parametrize(
    ("function", "kept"),
    [(truncated_reverse_kl, 0.303), (renormalized, 0.638), (sparse_generalized_jsd, 0.8245)],
    ids=["truncated", "renormalized", "bucket"],
)
def test_only_the_tail_bucket_leaves_the_right_mass_on_the_support(function, kept):
    """Gradient descent on reverse KL with the top 2 of 5 tokens, which hold .8245."""
    student = torch.tensor([FIVE_STUDENT], dtype=torch.float64)
    teacher = top_k(torch.tensor([FIVE_TEACHER], dtype=torch.float64), 2)
    assert teacher.logprobs.exp().sum().item() == pytest.approx(0.8245, abs=5e-5)
    for _ in range(4000):
        value, gradient = value_and_gradient(student, teacher, Divergence(1.0), function)
        student = student - gradient
    assert gradient.abs().max() < 1e-8
    mass = student.softmax(dim=-1)[0, :2].sum().item()
    assert mass == pytest.approx(kept, abs=5e-4)
    assert (value.item() < -0.1) == (function is truncated_reverse_kl)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_vocabulary_that_fills_the_cache_is_read_a_few_rows_at_a_time(
    monkeypatch, rows, temperature
):
    torch.manual_seed(0)
    student, teacher = 4 * torch.randn(2, 5, 9, dtype=torch.float64)
    support = top_k(teacher, 3, temperature)
    monkeypatch.setattr(closed_form, "CACHE_BYTES", rows * 9 * student.element_size())
    divergence = Divergence(0.5, temperature)
    value, gradient = value_and_gradient(student, support, divergence)
    expected, expected_gradient = value_and_gradient(student, support, divergence, plain)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)
