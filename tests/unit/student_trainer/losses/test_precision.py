"""The gradient survives half precision, near teachers, and masses far apart."""

import math

import pytest
import torch

from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    generalized_jsd,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from student_trainer.losses import projection as projections
from student_trainer.losses.projection import linear, project
from tests.support.losses import BETAS, plain, top_k, value_and_gradient

KERNELS = ["torch", "triton"]


def near(noise, dtype, rows=16, width=64, vocab_size=1_000):
    """(hidden, weight) of ``dtype`` with logits of deviation 5; a teacher ``noise`` off, float64.

    Output layers have a direction that all tokens share; so has this one.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, width, generator=generator) + torch.randn(
        width, generator=generator
    )
    weight = (5 * weight / width**0.5).to(dtype)
    logits = hidden.double() @ weight.double().T
    return (
        hidden,
        weight,
        logits + noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64),
    )


def loss_and_gradients(hidden, weight, teacher, divergence, **arguments):
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_sparse_jsd(*inputs, teacher, divergence, normalizer=1, **arguments).loss
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def cosine(one, other):
    return float(torch.cosine_similarity(one.double().flatten(), other.flatten(), dim=0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_point_where_float64s_do(dtype, noise, beta, kernel):
    hidden, weight, logits = near(noise, dtype)
    teacher = top_k(logits, 32)
    single = SparseDistribution(
        teacher.token_ids, teacher.logprobs.float(), teacher.tail_logprob.float()
    )
    exact = loss_and_gradients(hidden.double(), weight.double(), teacher, Divergence(beta))
    found = loss_and_gradients(hidden, weight, single, Divergence(beta), kernel=kernel)
    assert found[0].item() == pytest.approx(exact[0].item(), rel=2e-3, abs=1e-6)
    assert found[1].dtype == found[2].dtype == dtype
    assert cosine(found[1], exact[1]) > 0.9999
    assert cosine(found[2], exact[2]) > 0.9999


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_rounds_factors_and_no_logits(kernel):
    hidden, weight, logits = near(0.03, torch.bfloat16)
    teacher = top_k(logits, 32)
    exact = loss_and_gradients(hidden.double(), weight.double(), teacher, Divergence())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(
            hidden.float(), weight.float(), teacher, Divergence(), kernel=kernel
        )
    assert cosine(found[1], exact[1]) > 0.9999
    assert cosine(found[2], exact[2]) > 0.9999


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_logit_scale_is_that_of_the_logits(dtype, kernel):
    """5/6 is no bfloat16: hidden states times it would be rounded."""
    if dtype == torch.float64 and kernel == "triton":
        kernel = "torch"
    hidden, weight, logits = near(0.1, dtype)
    scale, teacher = 5 / 6, top_k(logits * 5 / 6, 32)
    inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    capped = 30 * torch.tanh(scale * (inputs[0] @ inputs[1].T) / 30)
    expected = sparse_generalized_jsd(capped, teacher, Divergence()).loss.sum()
    gradients = torch.autograd.grad(expected, inputs)
    found = loss_and_gradients(
        hidden, weight, teacher, Divergence(), softcap=30.0, logit_scale=scale, kernel=kernel
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert found[0].item() == pytest.approx(expected.item(), rel=tolerance)
    for one, other in zip(found[1:], gradients, strict=True):
        limit = 4e-3 if dtype == torch.bfloat16 else tolerance
        assert (one.double() - other).norm() < limit * other.norm()


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_a_logit_scale_that_is_none_is_refused(scale):
    hidden, weight, logits = near(0.1, torch.float32)
    with pytest.raises(ValueError, match=f"logit_scale {scale} must be finite and not 0"):
        loss_and_gradients(hidden, weight, top_k(logits, 4), Divergence(), logit_scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_projections_are_exact_to_float32_in_blocks_of_any_size(dtype, monkeypatch):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, 16), (50, 16), (50,))
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    expected = torch.nn.functional.linear(*wide)
    upstream = torch.randn(2, 3, 50, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, wide, upstream)
    for block in (1, 7 * 4 * 16, 1 << 20):
        monkeypatch.setattr(projections, "BLOCK_BYTES", block)
        logits = linear(hidden, weight, bias)
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
        flat = project(hidden.flatten(0, 1).detach(), weight.detach(), bias.detach())
        assert torch.equal(flat, logits.detach().flatten(0, 1))
        found = torch.autograd.grad(logits, (hidden, weight, bias), upstream.to(logits.dtype))
        for one, other in zip(found, gradients, strict=True):
            assert one.dtype == dtype
            assert (one.double() - other).norm() < 1e-2 * other.norm()


def float32(teacher):
    return SparseDistribution(
        teacher.token_ids, teacher.logprobs.float(), teacher.tail_logprob.float()
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tail", [-54.0, -86.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
def test_a_diffuse_student_and_a_faint_tail_leave_the_gradient_exact(beta, tail, kernel):
    """The h of the tail, which the student is full of, is some 50 nats, and so is its mean."""
    torch.manual_seed(0)
    student = torch.randn(3, 2_000, dtype=torch.float64).float()
    ids = torch.arange(8).repeat(3, 1)
    logprobs = torch.randn(3, 8, dtype=torch.float64).log_softmax(dim=-1)
    teacher = SparseDistribution(ids, logprobs, torch.full((3,), tail, dtype=torch.float64))
    _, exact = value_and_gradient(student.double(), teacher, Divergence(beta), plain)
    _, found = value_and_gradient(student, float32(teacher), Divergence(beta), kernel=kernel)
    error = (found.double() - exact).abs()
    assert (error[:, 8:].sum(dim=1) < 3e-7).all()
    assert (error[:, :8] < 3e-7).all()
    assert (found.sum(dim=1).abs() < 1e-6).all()


@pytest.mark.parametrize("beta", BETAS)
def test_the_dense_reference_keeps_its_gradient_far_from_the_teacher(beta):
    """The student is sure of a token that the teacher gives e⁻⁶⁰."""
    torch.manual_seed(0)
    teacher = torch.randn(3, 50, dtype=torch.float64)
    student = torch.randn(3, 50, dtype=torch.float64)
    teacher[:, 0] -= 60
    student[:, 0] += 12
    student, teacher = student.float(), teacher.float()
    value, found = value_and_gradient(student, teacher, Divergence(beta), generalized_jsd)
    expected, exact = value_and_gradient(
        student.double(), teacher.double(), Divergence(beta), generalized_jsd
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert float((found.double() - exact).abs().max()) < 3e-7


def test_a_teacher_logit_of_minus_infinity_leaves_the_reference_infinite():
    teacher = torch.tensor([[-math.inf, 0.0]])
    student = torch.tensor([[3.0, 0.0]])
    assert generalized_jsd(student, teacher, Divergence(1.0)).isposinf().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lowest", [-88.0, -100.0, -1e3, -65504.0])
@pytest.mark.parametrize("where", ["support", "tail"])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_no_floor_makes_improbable_tokens_cheaper(beta, where, lowest, kernel):
    torch.manual_seed(0)
    student = torch.randn(2, 30, dtype=torch.float64).float()
    logprobs = torch.randn(2, 4, dtype=torch.float64).log_softmax(dim=-1)
    tail = torch.full((2,), -1.0, dtype=torch.float64)
    if where == "support":
        logprobs[:, 1] = lowest
    else:
        tail[:] = lowest
    teacher = SparseDistribution(torch.tensor([[3, 9, 1, 20]] * 2), logprobs, tail)
    value, gradient = value_and_gradient(student.double(), teacher, Divergence(beta), plain)
    found, slope = value_and_gradient(student, float32(teacher), Divergence(beta), kernel=kernel)
    torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        slope.double(), gradient, rtol=1e-5, atol=3e-7 * float(gradient.abs().max())
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_mass_is_never_more_than_some_mass(kernel):
    """Reverse KL to −∞ stays finite, and is no cheaper than to the least token that is named."""
    student = torch.zeros(1, 6)
    values = []
    for tail in (-200.0, -math.inf):
        teacher = SparseDistribution(
            torch.tensor([[0, 1]]), torch.tensor([[-1e-6, -300.0]]), torch.tensor([tail])
        )
        value, gradient = value_and_gradient(student, teacher, Divergence(1.0), kernel=kernel)
        assert gradient.isfinite().all()
        assert abs(gradient.sum().item()) < 1e-5 * gradient.abs().sum().item()
        values.append(value.item())
    assert math.isfinite(values[1])
    assert values[1] == pytest.approx(values[0] + 100 * 4 / 6, rel=1e-5)


@pytest.mark.parametrize("log_mass", [-1e30, -3.4e38])
@pytest.mark.parametrize("kernel", KERNELS)
def test_log_masses_at_the_end_of_float32_give_finite_numbers(kernel, log_mass):
    teacher = SparseDistribution(
        torch.tensor([[0, 1]]), torch.tensor([[0.0, log_mass]]), torch.tensor([log_mass])
    )
    for beta in BETAS:
        value, gradient = value_and_gradient(
            torch.zeros(1, 6), teacher, Divergence(beta), kernel=kernel
        )
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_an_id_twice_in_a_row_is_refused_and_pads_are_not():
    logprobs, tail = torch.full((2, 3), -2.0), torch.tensor([-1.0, -1.0])
    padded = SparseDistribution(torch.tensor([[0, -1, -1], [2, 1, 0]]), logprobs, tail)
    twice = SparseDistribution(torch.tensor([[0, 1, 2], [3, 1, 3]]), logprobs, tail)
    message = "teacher.token_ids names 3 twice in row 1; name each id once"
    sparse_generalized_jsd(torch.zeros(2, 5), padded, Divergence())
    with pytest.raises(ValueError, match=message):
        sparse_generalized_jsd(torch.zeros(2, 5), twice, Divergence())
    with pytest.raises(ValueError, match=message):
        linear_sparse_jsd(torch.zeros(2, 4), torch.zeros(5, 4), twice, Divergence(), normalizer=1)
