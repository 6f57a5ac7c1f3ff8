"""Per-token weights and the cross-entropy of hard labels, in the pass of the divergence."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.losses import (
    Divergence,
    HardLabels,
    generalized_jsd,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from tests.support.losses import BETAS, TAILS, assert_close, plain, top_k

N, D, V = 6, 5, 12


def problem(seed, k):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, teacher = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((N, D), (V, D), (N, V))
    )
    weights, shares = torch.rand(2, N, generator=generator, dtype=torch.float64)
    weights[0], shares[1] = 0.0, 0.0
    labels = torch.randint(V, (N,), generator=generator)  # on the support or off it
    return hidden.requires_grad_(), weight.requires_grad_(), 2 * teacher, weights, shares, labels


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, V),
    beta=st.sampled_from(BETAS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    tail=st.sampled_from(TAILS),
)
def test_the_mixture_equals_its_parts_by_autograd(seed, k, beta, temperature, tail):
    hidden, weight, teacher_logits, weights, shares, labels = problem(seed, k)
    teacher = top_k(teacher_logits, k, temperature)
    divergence = Divergence(beta, temperature, tail)
    logits = hidden @ weight.T
    cross_entropy = F.cross_entropy(logits / temperature, labels, reduction="none")
    expected = weights * plain(logits, teacher, divergence) + shares * cross_entropy
    rows, statistics = sparse_generalized_jsd(
        hidden @ weight.T,
        teacher,
        divergence,
        weights=weights,
        labels=HardLabels(labels, shares),
    )
    assert_close(rows, expected)
    assert_close(statistics.cross_entropy, cross_entropy.detach().float(), 1e-5)
    unweighted = plain(logits, teacher, divergence)
    assert_close(statistics.divergence, unweighted.detach().float(), 1e-5)
    loss = linear_sparse_jsd(
        hidden, weight, teacher, divergence, weights=weights, labels=HardLabels(labels, shares),
        normalizer=3, chunk_size=4,
    ).loss  # fmt: skip
    assert_close(loss, expected.sum() / 3)
    inputs = (hidden, weight)
    for value in (rows.sum() / 3, loss):
        for one, other in zip(
            torch.autograd.grad(value, inputs),
            torch.autograd.grad(expected.sum() / 3, inputs, retain_graph=True),
            strict=True,
        ):
            assert_close(one, other)


def test_labels_without_weights_are_measured_and_change_nothing():
    hidden, weight, teacher_logits, _, _, labels = problem(0, 3)
    teacher = top_k(teacher_logits, 3)
    loss, statistics = linear_sparse_jsd(
        hidden, weight, teacher, Divergence(), normalizer=1, labels=HardLabels(labels)
    )
    plain_loss, without = linear_sparse_jsd(hidden, weight, teacher, Divergence(), normalizer=1)
    assert loss.item() == plain_loss.item()
    (one,), (other,) = (torch.autograd.grad(x, hidden) for x in (loss, plain_loss))
    assert torch.equal(one, other)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert_close(statistics.cross_entropy, expected.detach().float(), 1e-6)
    assert without.cross_entropy.isnan().all()


def test_a_weight_of_zero_removes_a_row():
    hidden, weight, teacher_logits, _, _, _ = problem(0, 3)
    teacher = top_k(teacher_logits, 3)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    loss = linear_sparse_jsd(
        hidden, weight, teacher, Divergence(1.0), weights=weights, normalizer=1
    ).loss
    first = linear_sparse_jsd(hidden[:3], weight, teacher[:3], Divergence(1.0), normalizer=1).loss
    assert_close(loss, first)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert not gradient[3:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.ones(N - 1)}, r"weights must be \[N\] = \[6\], got \[5\]"),
        ({"weights": torch.full((N,), math.nan)}, "weights hold NaN"),
        ({"labels": HardLabels(torch.zeros(N - 1, dtype=torch.int64))}, r"labels must be \[N\]"),
        ({"labels": HardLabels(torch.full((N,), V))}, f"labels hold {V}; ids must be from 0"),
        ({"labels": HardLabels(torch.full((N,), -1))}, "labels hold -1"),
        (
            {"labels": HardLabels(torch.zeros(N, dtype=torch.int64), torch.full((N,), math.inf))},
            "label weights hold NaN or an infinity",
        ),
    ],
)
def test_weights_and_labels_that_do_not_fit_are_refused(arguments, message):
    hidden, weight, teacher_logits, *_ = problem(0, 3)
    teacher = top_k(teacher_logits, 3)
    with pytest.raises(ValueError, match=message):
        linear_sparse_jsd(hidden, weight, teacher, Divergence(), normalizer=1, **arguments)
    with pytest.raises(ValueError, match=message):
        sparse_generalized_jsd(hidden @ weight.T, teacher, Divergence(), **arguments)


@pytest.mark.parametrize(
    ("token_ids", "weights"),
    [
        (torch.zeros(N), None),
        (torch.zeros(N, 1, dtype=torch.int64), None),
        (torch.zeros(N, dtype=torch.int64), torch.zeros(N + 1)),
    ],
)
def test_labels_of_wrong_shape_or_dtype_are_refused(token_ids, weights):
    with pytest.raises(ValueError, match="label"):
        HardLabels(token_ids, weights)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, V),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    scale=st.sampled_from([0.3, 2.0, 8.0]),
)
def test_the_dense_divergence_lies_within_the_gap_bound(seed, k, beta, scale):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, N, V, generator=generator, dtype=torch.float64)
    dense = generalized_jsd(student, teacher, Divergence(beta))
    value, statistics = sparse_generalized_jsd(student, top_k(teacher, k), Divergence(beta))
    gap = dense - value
    assert (gap <= statistics.gap_bound + 1e-6).all()
    if k >= V - 1:  # a tail of one token hides nothing
        assert not statistics.gap_bound.any()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_gap_bound_is_reached_by_disjoint_tails(beta):
    """Teacher and student agree on token 0 and use different tokens off the support."""
    student = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64).log().clamp_min(-60)
    teacher = torch.tensor([[0.8, 0.0, 0.1, 0.1]], dtype=torch.float64).log().clamp_min(-60)
    value, statistics = sparse_generalized_jsd(student, top_k(teacher, 1), Divergence(beta))
    dense = generalized_jsd(student, teacher, Divergence(beta))
    p, q = beta * 0.2, (1 - beta) * 0.4
    assert statistics.gap_bound.item() == pytest.approx(
        -p * math.log(p / (p + q)) - q * math.log(q / (p + q)), rel=1e-5
    )
    assert (dense - value).item() == pytest.approx(statistics.gap_bound.item(), rel=1e-5)


def test_no_bound_is_claimed_where_the_masses_give_none():
    student, teacher = torch.randn(2, N, V, dtype=torch.float64)

    def bound(support, *fields):
        return sparse_generalized_jsd(student, support, Divergence(*fields)).statistics.gap_bound

    for beta in (0.0, 1.0):
        assert bound(top_k(teacher, 3), beta).isposinf().all()
        assert not bound(top_k(teacher, V), beta).any()
    assert bound(top_k(teacher, 3), 0.5, 1.0, "renormalize").isposinf().all()
    certain = top_k(torch.where(teacher == teacher.amax(1, keepdim=True), 0.0, -math.inf), 1)
    assert not bound(certain, 0.0).any()  # P's tail is empty: forward KL hides nothing there
    assert bound(certain, 1.0).isposinf().all()
