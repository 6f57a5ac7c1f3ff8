"""`linear_sparse_jsd` against the divergence of logits that exist, and what it alone offers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    fused,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from tests.support.losses import BETAS, TAILS, assert_close, top_k

N, D, V, K = 7, 5, 12, 4


def problem(dtype=torch.float64, seed=0):
    """Return hidden [N, D], weight [V, D], bias [V], all requiring gradients, and the teacher."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(N, D), (V, D), (V,)]
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )
    teacher = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return hidden, weight, bias, top_k(teacher, K)


def through_logits(hidden, weight, bias, teacher, divergence, *, normalizer=1.0, vocab_size=None):
    logits = (hidden @ weight.T + (0.0 if bias is None else bias))[:, :vocab_size]
    return sparse_generalized_jsd(logits, teacher, divergence).loss.sum() / normalizer


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    beta=st.sampled_from(BETAS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    tail=st.sampled_from(TAILS),
    chunk_size=st.sampled_from([1, 2, 3, N, 100, None]),
    with_bias=st.booleans(),
    normalizer=st.sampled_from([1, 3, 0.25]),
)
def test_linear_equals_sparse_on_its_logits_for_every_chunk_size(
    seed, beta, temperature, tail, chunk_size, with_bias, normalizer
):
    hidden, weight, bias, teacher = problem(seed=seed)
    bias = bias if with_bias else None
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    divergence = Divergence(beta, temperature, tail)
    expected = through_logits(hidden, weight, bias, teacher, divergence, normalizer=normalizer)
    actual = linear_sparse_jsd(
        hidden, weight, teacher, divergence, bias=bias, chunk_size=chunk_size, normalizer=normalizer
    ).loss
    assert actual.shape == ()
    assert_close(actual, expected)
    for one, other in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("beta", BETAS)
def test_vocab_size_equals_slicing_the_logits(beta):
    hidden, weight, bias, _ = problem()
    teacher = top_k(torch.randn(N, 9, dtype=torch.float64), K)
    expected = through_logits(hidden, weight, bias, teacher, Divergence(beta), vocab_size=9)
    actual = linear_sparse_jsd(
        hidden,
        weight,
        teacher,
        Divergence(beta),
        bias=bias,
        vocab_size=9,
        chunk_size=3,
        normalizer=1,
    ).loss
    assert_close(actual, expected)
    inputs = (hidden, weight, bias)
    for one, other in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(one, other)
    _, grad_weight, grad_bias = gradients(
        linear_sparse_jsd(
            hidden, weight, teacher, Divergence(beta), bias=bias, vocab_size=9, normalizer=1
        ).loss,
        *inputs,
    )
    assert not grad_weight[9:].any()
    assert not grad_bias[9:].any()
    assert grad_weight[:9].abs().min() > 0


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("beta", BETAS)
def test_softcap_equals_capping_the_logits(beta, softcap):
    hidden, weight, bias, teacher = problem()
    logits = softcap * torch.tanh((hidden @ weight.T + bias) / softcap)
    divergence = Divergence(beta, temperature=2.0)
    expected = sparse_generalized_jsd(logits, teacher, divergence).loss.sum()
    actual = linear_sparse_jsd(
        hidden, weight, teacher, divergence, bias=bias, softcap=softcap, chunk_size=3, normalizer=1
    ).loss
    assert_close(actual, expected)
    inputs = (hidden, weight, bias)
    for one, other in zip(gradients(actual, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(trained):
    hidden, weight, bias, teacher = problem()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    (expected,) = gradients(
        through_logits(*inputs.values(), teacher, Divergence()), inputs[trained]
    )
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == trained)
    loss = linear_sparse_jsd(
        hidden, weight, teacher, Divergence(), bias=bias, chunk_size=2, normalizer=1
    ).loss
    kept = [saved is not None for saved in loss.grad_fn.saved_tensors]
    assert kept == [name == trained for name in inputs]
    loss.backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is not None) == (name == trained)
    assert_close(inputs[trained].grad, expected)


def test_without_any_gradient_the_value_is_the_same():
    hidden, weight, bias, teacher = problem()
    arguments = {"bias": bias, "normalizer": 1}
    expected = linear_sparse_jsd(hidden, weight, teacher, Divergence(), **arguments).loss
    with torch.no_grad():
        value = linear_sparse_jsd(hidden, weight, teacher, Divergence(), **arguments).loss
    assert not value.requires_grad
    assert value.item() == expected.item()


def test_without_gradients_none_is_computed(monkeypatch):
    """Autograd says that trained weights need one all the same: [V, d] for nothing."""
    hidden, weight, bias, teacher = problem()
    monkeypatch.setattr(fused, "add_product", lambda *_, **__: pytest.fail("a weight gradient"))
    with torch.no_grad():
        linear_sparse_jsd(hidden, weight, teacher, Divergence(), bias=bias, normalizer=1)


@pytest.mark.parametrize("upstream", [-2.5, 0.0, 1.0])
def test_upstream_gradient_scales_all_gradients(upstream):
    hidden, weight, bias, teacher = problem()
    inputs = (hidden, weight, bias)
    loss = linear_sparse_jsd(hidden, weight, teacher, Divergence(), bias=bias, normalizer=1).loss
    expected = gradients(through_logits(*inputs, teacher, Divergence()), *inputs)
    for one, other in zip(gradients(upstream * loss, *inputs), expected, strict=True):
        assert_close(one, upstream * other)


def test_gradients_accumulate_over_calls():
    hidden, weight, bias, teacher = problem()
    arguments = {"bias": bias, "normalizer": N}
    (expected,) = gradients(
        linear_sparse_jsd(hidden, weight, teacher, Divergence(), **arguments).loss, weight
    )
    for rows in (slice(0, 3), slice(3, N)):
        one = linear_sparse_jsd(hidden[rows], weight, teacher[rows], Divergence(), **arguments)
        one.loss.backward()
    assert_close(weight.grad, expected)


def test_statistics_are_those_of_the_logits_in_the_order_of_the_rows():
    hidden, weight, bias, teacher = problem()
    loss, statistics = linear_sparse_jsd(
        hidden, weight, teacher, Divergence(), bias=bias, chunk_size=2, normalizer=4
    )
    divergence, expected = sparse_generalized_jsd(hidden @ weight.T + bias, teacher, Divergence())
    assert_close(loss, divergence.sum() / 4)
    for name, column in vars(statistics).items():
        assert column.dtype == torch.float32
        assert not column.requires_grad
        assert_close(column, getattr(expected, name), 1e-6)


def test_no_rows_give_zero_and_zero_gradients():
    _, weight, _, teacher = problem()
    hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    loss, statistics = linear_sparse_jsd(hidden, weight, teacher[:0], Divergence(), normalizer=1)
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    assert loss.item() == 0.0
    assert grad_hidden.shape == (0, D)
    assert not grad_weight.any()
    assert statistics.divergence.shape == (0,)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_is_near_float32(dtype, tolerance, beta):
    hidden, weight, bias, teacher = problem(dtype)
    inputs = (hidden, weight, bias)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = through_logits(*exact, teacher, Divergence(beta))
    loss = linear_sparse_jsd(
        hidden, weight, teacher, Divergence(beta), bias=bias, chunk_size=2, normalizer=1
    ).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for one, other in zip(gradients(loss, *inputs), gradients(expected, *exact), strict=True):
        assert one.dtype == dtype
        assert (one.float() - other).norm() < tolerance * other.norm()


def test_autocast_projects_in_its_dtype_and_computes_in_float32():
    hidden, weight, bias, teacher = problem(torch.float32)
    inputs = (hidden, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_sparse_jsd(
            hidden, weight, teacher, Divergence(), bias=bias, normalizer=1
        ).loss
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    expected = linear_sparse_jsd(
        halves[0], halves[1], teacher, Divergence(), bias=halves[2], normalizer=1
    ).loss
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    for one, other in zip(gradients(loss, *inputs), gradients(expected, *halves), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


def test_autocast_takes_mixed_dtypes():
    hidden, weight, _, teacher = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_sparse_jsd(
            hidden.bfloat16(), weight, teacher, Divergence(), normalizer=1
        ).loss
        same = linear_sparse_jsd(hidden, weight, teacher, Divergence(), normalizer=1).loss
    assert mixed.item() == same.item()


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_give_finite_values_and_gradients(beta, scale):
    hidden, weight, _, teacher = problem(torch.float32)
    weight = (weight.detach() * scale).requires_grad_()
    loss = linear_sparse_jsd(
        hidden, weight, teacher, Divergence(beta), chunk_size=3, normalizer=N
    ).loss
    assert math.isfinite(loss.item())
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size 0 must be at least 1"),
        ({"normalizer": 0}, "normalizer 0 must be above 0"),
        ({"normalizer": -1.0}, r"normalizer -1\.0"),
        ({"normalizer": math.nan}, "normalizer nan"),
        ({"vocab_size": V + 1}, f"vocab_size {V + 1} must be from 1 to {V}"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"softcap": 0.0}, r"softcap 0\.0 must be above 0"),
        ({"softcap": math.inf}, "softcap inf"),
        ({"bias": torch.zeros(V - 1)}, r"bias must be \[V\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    hidden, weight, _, teacher = problem()
    with pytest.raises(ValueError, match=message):
        linear_sparse_jsd(hidden, weight, teacher, Divergence(), **{"normalizer": 1, **arguments})


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (torch.zeros(N - 1, D), torch.zeros(V, D), r"hidden must be \[N, d\] with N = 7"),
        (torch.zeros(1, N, D), torch.zeros(V, D), r"hidden must be \[N, d\]"),
        (torch.zeros(N, D), torch.zeros(V, D + 1), r"weight must be \[V, d\] with d = 5"),
        (torch.zeros(N, D), torch.zeros(D), r"weight must be \[V, d\]"),
        (torch.zeros(N, D), torch.zeros(V, D).bfloat16(), "weight is torch.bfloat16, hidden is"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(hidden, weight, message):
    teacher = problem()[3]
    with pytest.raises(ValueError, match=message):
        linear_sparse_jsd(hidden, weight, teacher, Divergence(), normalizer=1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", V, f"holds {V}; ids must be below the vocabulary of {V}"),
        ("token_ids", -2, "holds -2"),
        ("logprobs", math.nan, "logprobs holds NaN"),
        ("tail_logprob", math.inf, "tail_logprob holds NaN or"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_refused(name, value, message):
    hidden, weight, _, teacher = problem()
    names = ("token_ids", "logprobs", "tail_logprob")
    fields = {field: getattr(teacher, field).clone() for field in names}
    fields[name].view(-1)[2] = value
    with pytest.raises(ValueError, match=message):
        linear_sparse_jsd(hidden, weight, SparseDistribution(**fields), Divergence(), normalizer=1)


def test_ids_beyond_the_restricted_vocabulary_are_refused():
    hidden, weight, _, teacher = problem()
    with pytest.raises(ValueError, match="must be below the vocabulary of 3"):
        linear_sparse_jsd(hidden, weight, teacher, Divergence(), normalizer=1, vocab_size=3)
