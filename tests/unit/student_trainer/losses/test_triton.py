"""The Triton kernel against the closed form; on a CPU through Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.losses import (
    Divergence,
    HardLabels,
    SparseDistribution,
    closed_form,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from student_trainer.losses.kernels import choose_kernel
from tests.support.losses import BETAS, TAILS, top_k

triton = pytest.importorskip("student_trainer.losses.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def ragged(teacher, generator):
    """The same teacher with columns padded and rows of different length, one of them empty."""
    rows, k = teacher.token_ids.shape
    kept = torch.randint(1, k + 1, (rows, 1), generator=generator)
    kept[0] = 0
    padded = torch.arange(k) >= kept
    lost = teacher.logprobs.masked_fill(~padded, -math.inf)
    tail = torch.cat([lost, teacher.tail_logprob[:, None]], dim=1).logsumexp(dim=1)
    order = torch.randperm(k + 3, generator=generator)
    ids = torch.cat([teacher.token_ids.masked_fill(padded, -1), torch.full((rows, 3), -1)], 1)
    logprobs = torch.cat([teacher.logprobs, torch.full((rows, 3), math.nan)], 1)
    return SparseDistribution(ids[:, order], logprobs[:, order], tail)


def both(logits, teacher, divergence, **arguments):
    """(objective, gradient, statistics) of the twins, for the same input."""
    results = []
    for module in (closed_form, triton):
        matrix = logits.to(module.logits_dtype(logits.dtype), copy=True)
        objective, statistics = module.divergence_and_gradient(
            matrix, teacher, divergence, with_gradient=True, **arguments
        )
        results.append((objective, matrix, statistics))
    return results


def assert_twins(slow, fast, dtype):
    assert fast[0].dtype == torch.float32
    torch.testing.assert_close(fast[0], slow[0], rtol=2e-5, atol=2e-6)
    assert fast[1].dtype == dtype
    scale = float(slow[1].abs().max().clamp_min(1e-6))
    torch.testing.assert_close(
        fast[1].float(),
        slow[1],
        rtol=TOLERANCES[dtype],
        atol=4e-6 * scale + 1e-6,  # a gradient near 0 may be a difference of probabilities near 1
    )
    for name, column in vars(slow[2]).items():
        torch.testing.assert_close(
            getattr(fast[2], name), column, rtol=2e-5, atol=4e-6, equal_nan=True, msg=name
        )


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([2, 17, 64, 100, 4097, 5000]),
    k=st.integers(1, 40),
    beta=st.sampled_from(BETAS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    tail=st.sampled_from(TAILS),
    dtype=st.sampled_from(list(TOLERANCES)),
    softcap=st.sampled_from([None, 5.0]),
    weighted=st.booleans(),
    labelled=st.sampled_from(["no", "measured", "weighted"]),
)
def test_the_kernel_equals_the_closed_form(
    seed, vocab_size, k, beta, temperature, tail, dtype, softcap, weighted, labelled
):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(4, vocab_size, generator=generator)).to(dtype)
    teacher_logits = 3 * torch.randn(4, vocab_size, generator=generator)
    teacher = ragged(top_k(teacher_logits, min(k, vocab_size), temperature), generator)
    labels = None
    if labelled != "no":
        ids = torch.randint(vocab_size, (4,), generator=generator)
        labels = HardLabels(
            ids, torch.rand(4, generator=generator) if labelled == "weighted" else None
        )
    weights = torch.rand(4, generator=generator) if weighted else None
    slow, fast = both(
        logits.to(DEVICE), teacher.to(DEVICE), Divergence(beta, temperature, tail),
        scale=1 / 3, softcap=softcap,
        weights=None if weights is None else weights.to(DEVICE),
        labels=None if labels is None else labels.to(DEVICE),
    )  # fmt: skip
    assert_twins(slow, fast, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("vocab_size", [5, 100, 4097, 5000])
def test_rows_may_be_padded_and_the_gradient_may_go_elsewhere(vocab_size, dtype):
    """The padding holds NaN, which must not reach a number."""
    torch.manual_seed(0)
    logits = torch.randn(3, vocab_size, device=DEVICE)
    teacher = top_k(torch.randn(3, vocab_size), 4).to(DEVICE)
    labels = HardLabels(torch.arange(3), torch.ones(3)).to(DEVICE)
    expected = logits.clone()
    slow = closed_form.divergence_and_gradient(
        expected, teacher, Divergence(), labels=labels, with_gradient=True
    )
    stride = -(-vocab_size // 16) * 16 + 16
    for unaligned in (0, 3):
        rows = torch.full((3, stride + unaligned), math.nan, device=DEVICE)[:, :vocab_size]
        rows.copy_(logits)
        found = torch.full((3, stride), math.nan, device=DEVICE, dtype=dtype)[:, :vocab_size]
        fast = triton.divergence_and_gradient(
            rows, teacher, Divergence(), labels=labels, with_gradient=True, out=found
        )
        torch.testing.assert_close(fast[0], slow[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(found.float(), expected, rtol=TOLERANCES[dtype], atol=1e-6)


def test_rows_that_overlap_are_refused():
    logits = torch.zeros(3, 20, device=DEVICE)
    with pytest.raises(ValueError, match=r"out must have contiguous rows, got strides \(1, 3\)"):
        triton.divergence_and_gradient(
            logits, top_k(torch.zeros(3, 20), 2).to(DEVICE), Divergence(), with_gradient=True,
            out=torch.zeros(20, 3, device=DEVICE).T,
        )  # fmt: skip


@pytest.mark.parametrize("beta", BETAS)
def test_the_whole_vocabulary_as_support_leaves_no_tail(beta):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 50)
    slow, fast = both(
        student.to(DEVICE), top_k(teacher, 50).to(DEVICE), Divergence(beta), scale=1.0
    )
    assert_twins(slow, fast, torch.float32)
    assert not fast[2].gap_bound.any()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shift", [-2e4, -90.0, 90.0, 2e4])
def test_extreme_rows_stay_finite_and_equal(beta, shift):
    student = torch.linspace(-1.0, 1.0, 40)[None].repeat(3, 1)
    student[:, :8] += shift
    ids = torch.arange(8)[None].repeat(3, 1)
    logprobs = torch.full((3, 8), -math.log(8.0))
    logprobs[1] = -60.0
    tail = torch.tensor([-math.inf, 0.0, -60.0])
    teacher = SparseDistribution(ids, logprobs, tail)
    slow, fast = both(student.to(DEVICE), teacher.to(DEVICE), Divergence(beta), scale=1.0)
    assert fast[0].isfinite().all()
    assert fast[1].isfinite().all()
    torch.testing.assert_close(fast[0], slow[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(fast[1], slow[1], rtol=2e-4, atol=2e-5)


def test_the_same_input_gives_the_same_bits():
    torch.manual_seed(0)
    logits, teacher = torch.randn(3, 5000).to(DEVICE), top_k(torch.randn(3, 5000), 30).to(DEVICE)
    runs = [both(logits, teacher, Divergence(), scale=1.0)[1] for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("beta", BETAS)
def test_linear_loss_by_triton_equals_that_by_torch(beta, dtype):
    """With a padded vocabulary, a bias, soft-capping, chunks and an upstream gradient."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(DEVICE, dtype) for shape in ((7, 6), (40, 6), (40,))]
    teacher = top_k(2 * torch.randn(7, 33), 5).to(DEVICE)
    found = []
    for kernel in ("torch", "triton"):
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        loss, statistics = linear_sparse_jsd(
            hidden,
            weight,
            teacher,
            Divergence(beta, temperature=1.5),
            bias=bias,
            softcap=3.0,
            vocab_size=33,
            chunk_size=3,
            normalizer=4,
            kernel=kernel,
        )
        gradients = torch.autograd.grad(3 * loss, (hidden, weight, bias))
        found.append((loss, statistics.divergence, *gradients))
    for slow, fast in zip(*found, strict=True):
        assert fast.dtype == slow.dtype
        norm = slow.float().norm()
        assert (fast.float() - slow.float()).norm() <= 3 * TOLERANCES[dtype] * norm


def test_logits_of_any_layout_are_taken_and_left_as_they_are():
    torch.manual_seed(0)
    logits = torch.randn(20, 3).to(DEVICE).T.requires_grad_()  # [3, 20], not contiguous
    teacher = top_k(torch.randn(3, 20), 4).to(DEVICE)
    before = logits.detach().clone()
    values, gradients = [], []
    for kernel in ("torch", "triton"):
        rows = sparse_generalized_jsd(logits, teacher, Divergence(), kernel=kernel).loss
        values.append(rows.detach())
        gradients.append(torch.autograd.grad(rows.sum(), logits)[0])
    assert torch.equal(logits, before)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_no_rows_are_no_launch():
    objective, statistics = triton.divergence_and_gradient(
        torch.zeros(0, 9, device=DEVICE), top_k(torch.zeros(0, 9), 2).to(DEVICE),
        Divergence(), with_gradient=True,
    )  # fmt: skip
    assert objective.shape == statistics.divergence.shape == (0,)


def test_auto_takes_triton_on_a_gpu_and_torch_elsewhere():
    assert choose_kernel("auto", torch.zeros(1)) is closed_form
    assert choose_kernel("torch", torch.zeros(1, device=DEVICE)) is closed_form
    assert choose_kernel("triton", torch.zeros(1, device=DEVICE)) is triton
    expected = triton if DEVICE == "cuda" else closed_form
    assert choose_kernel("auto", torch.zeros(1, device=DEVICE)) is expected


def test_what_triton_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="computes in float32, the logits are float64"):
        choose_kernel("triton", torch.zeros(1, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="kernel 'cuda' must be 'auto', 'torch' or 'triton'"):
        choose_kernel("cuda", torch.zeros(1))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU, the logits are on cpu"):
        choose_kernel("triton", torch.zeros(1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is not installed"):
        choose_kernel("triton", torch.zeros(1, device=DEVICE))
    assert choose_kernel("auto", torch.zeros(1, device=DEVICE)) is closed_form
