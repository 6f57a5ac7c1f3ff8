"""Scored samples become the teacher's distribution, row by row with the completion mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.sparse import SparseLogprobs
from student_trainer.data.sample import Sample
from student_trainer.losses import (
    Divergence,
    generalized_jsd,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from student_trainer.pipeline.targets import ScoredSample, hard_labels, sparse_distribution


def sample(completion, mask=None, prompt=(9, 9)):
    ids = np.array([*prompt, *completion], dtype=np.uint32)
    learned = np.ones(len(completion), bool) if mask is None else np.array(mask, bool)
    return Sample(ids, len(prompt), learned, "dataset")


def scores_of(probabilities, k, next_ids, requested=None):
    """Return the answer of a teacher with these log-probs [T, V]."""
    p = np.asarray(probabilities, dtype=np.float64)
    top = np.argsort(-p, axis=1)[:, :k]
    named = np.zeros_like(p, dtype=bool)
    np.put_along_axis(named, top, True, axis=1)
    rows = np.arange(len(p))
    named[rows, next_ids] = True
    if requested is not None:
        np.put_along_axis(named, np.asarray(requested), True, axis=1)
    tail = np.where(named, 0.0, p).sum(1)
    with np.errstate(divide="ignore"):
        return SparseLogprobs(
            token_ids=top.astype(np.uint32),
            logprobs=np.log(np.take_along_axis(p, top, 1)).astype(np.float32),
            next_token_logprob=np.log(p[rows, next_ids]).astype(np.float32),
            tail_logprob=np.log(tail).astype(np.float32),
            requested_logprobs=None
            if requested is None
            else np.log(np.take_along_axis(p, np.asarray(requested), 1)).astype(np.float32),
        )


P = [[0.5, 0.3, 0.1, 0.06, 0.04], [0.05, 0.6, 0.05, 0.1, 0.2]]


def masses(distribution):
    """Each row as {id: probability, "tail": probability}."""
    out = []
    for ids, logprobs, tail in zip(
        distribution.token_ids, distribution.logprobs, distribution.tail_logprob, strict=True
    ):
        row = {int(i): float(p.exp()) for i, p in zip(ids, logprobs, strict=True) if i >= 0}
        out.append({**row, "tail": float(tail.exp())})
    return out


def assert_masses(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert abs(a[key] - value) < 1e-6, key


def test_support_is_top_k_joined_with_the_next_token_no_id_twice():
    item = ScoredSample(sample([3, 1]), scores_of(P, 2, [3, 1]))
    assert_masses(
        masses(sparse_distribution([item], 5)),
        [{0: 0.5, 1: 0.3, 3: 0.06, "tail": 0.14}, {1: 0.6, 4: 0.2, "tail": 0.2}],
    )


def test_only_learned_rows_are_kept():
    item = ScoredSample(sample([3, 1], mask=[False, True]), scores_of(P, 2, [3, 1]))
    assert_masses(masses(sparse_distribution([item], 5)), [{1: 0.6, 4: 0.2, "tail": 0.2}])


def test_teacher_mass_outside_the_shared_vocabulary_goes_to_the_tail():
    item = ScoredSample(sample([3, 1]), scores_of(P, 2, [3, 1]))
    assert_masses(
        masses(sparse_distribution([item], 4)),
        [{0: 0.5, 1: 0.3, 3: 0.06, "tail": 0.14}, {1: 0.6, "tail": 0.4}],
    )


def requested_item(requested, **arguments):
    scores = scores_of(P, 2, [3, 1], requested)
    return ScoredSample(sample([3, 1], **arguments), scores, np.array(requested, np.uint32))


def test_requested_ids_join_the_support_with_no_id_twice():
    """They repeat the top-k (0, 1), the next token (3 and 1), each other, and name new ones."""
    item = requested_item([[3, 0, 2, 2], [4, 1, 1, 0]])
    assert_masses(
        masses(sparse_distribution([item], 5)),
        [
            {0: 0.5, 1: 0.3, 3: 0.06, 2: 0.1, "tail": 0.04},
            {1: 0.6, 4: 0.2, 0: 0.05, "tail": 0.15},
        ],
    )
    distribution = sparse_distribution([item], 5)
    for row in distribution.token_ids.tolist():
        named = [i for i in row if i >= 0]
        assert len(named) == len(set(named))


def test_requested_ids_follow_the_mask_and_the_shared_vocabulary():
    item = requested_item([[3, 0, 2, 2], [4, 1, 1, 0]], mask=[False, True])
    assert_masses(masses(sparse_distribution([item], 4)), [{1: 0.6, 0: 0.05, "tail": 0.35}])


def test_the_union_with_every_id_is_the_dense_distribution():
    item = requested_item([[4, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    found = masses(sparse_distribution([item], 5))
    assert_masses(found, [{**dict(enumerate(row)), "tail": 0.0} for row in P])


def test_rows_sum_to_one_and_samples_keep_their_order():
    first = ScoredSample(sample([3]), scores_of(P[:1], 1, [3]))
    second = ScoredSample(sample([1]), scores_of(P[1:], 4, [1]))
    found = masses(sparse_distribution([first, second], 5))
    assert np.allclose([sum(row.values()) for row in found], 1.0, atol=1e-6)
    assert 0 in found[0]
    assert found[1][1] > 0.59


def test_without_scores_rows_are_one_hot_at_the_next_token():
    distribution = sparse_distribution([ScoredSample(sample([3, 1]), None)], 5)
    assert distribution.token_ids.tolist() == [[3], [1]]
    assert distribution.logprobs.tolist() == [[0.0], [0.0]]
    assert torch.isneginf(distribution.tail_logprob).all()


def test_hard_labels_count_where_the_dataset_or_the_teacher_wrote():
    scored = [
        ScoredSample(sample([3, 1], mask=[False, True]), None),
        ScoredSample(replace(sample([2, 4]), source="student"), None),
        ScoredSample(replace(sample([0]), source="teacher"), None),
    ]
    weights, labels = hard_labels(scored, 0.25)
    assert labels.token_ids.tolist() == [1, 2, 4, 0]
    assert labels.weights.tolist() == [0.25, 0.0, 0.0, 0.25]
    assert weights.tolist() == [0.75, 1.0, 1.0, 0.75]


def test_without_an_sft_weight_labels_are_only_measured():
    weights, labels = hard_labels([ScoredSample(sample([3, 1]), None)], 0.0)
    assert weights is None
    assert labels.weights is None
    assert labels.token_ids.tolist() == [3, 1]


def peaked(rows, vocab_size, seed):
    """Log-probs [rows, V] float64, from nearly uniform to nearly certain."""
    slopes = np.linspace(0.1, 6.0, rows)[:, None]
    logits = -slopes * np.log(np.arange(1, vocab_size + 1))
    logits = np.random.default_rng(seed).permuted(logits, axis=1)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def halved(scores):
    more = scores.requested_logprobs
    return scores.model_copy(
        update={
            "logprobs": scores.logprobs.astype(np.float16),
            "requested_logprobs": None if more is None else more.astype(np.float16),
        }
    )


@pytest.mark.parametrize("with_requested", [False, True])
def test_log_probs_rounded_to_float16_still_make_a_distribution(with_requested):
    """The divergence to themselves is as near to 0 as in float32; unmoved it is 2e-4 off."""
    log_p = peaked(rows=200, vocab_size=1000, seed=0)
    generator = np.random.default_rng(1)
    next_ids = generator.integers(1000, size=200)
    requested = generator.integers(1000, size=(200, 8)) if with_requested else None
    exact = scores_of(np.exp(log_p), 32, next_ids, requested)
    more = None if requested is None else requested.astype(np.uint32)
    logits = torch.from_numpy(log_p)

    def self_divergence(scores):
        item = ScoredSample(sample(next_ids), scores, more)
        teacher = sparse_distribution([item], 1000)
        total = teacher.logprobs.double().exp().sum(1) + teacher.tail_logprob.double().exp()
        values = sparse_generalized_jsd(logits, teacher, Divergence(0.0)).loss
        return float(values.abs().max()), float((total - 1.0).abs().max()), teacher

    value, off, rounded = self_divergence(halved(exact))
    assert value < 1e-6
    assert off < 1e-6
    unmoved = exact.model_copy(
        update={"logprobs": exact.logprobs.astype(np.float16).astype(np.float32)}
    )
    assert self_divergence(unmoved)[0] > 1e-4
    _, _, original = self_divergence(exact)
    assert rounded.token_ids.tolist() == original.token_ids.tolist()
    named = original.token_ids >= 0
    moved = (rounded.logprobs - original.logprobs).abs()[named]
    assert bool((moved <= 2.0**-10 * (original.logprobs.abs()[named] + 12.0)).all())
    # The token that came next travels in float32, and is taken from there.
    assert rounded.logprobs[:, 0].tolist() == original.logprobs[:, 0].tolist()


def test_a_far_log_prob_does_not_let_the_others_of_its_row_move_far():
    """The next token is certain, so float32 cannot tell what is left for the others: e⁻¹⁸."""
    scores = SparseLogprobs(
        token_ids=np.array([[1, 2, 3]], np.uint32),
        logprobs=np.array([[0.0, -18.0, -65504.0]], np.float16),
        next_token_logprob=np.array([0.0], np.float32),
        tail_logprob=np.array([-np.inf], np.float32),
    )
    found = sparse_distribution([ScoredSample(sample([1]), scores)], 5)
    assert found.token_ids.tolist() == [[1, -1, 2, 3]]
    assert found.logprobs[0, 2].item() == pytest.approx(-18.0, rel=2.0**-11)


def test_float16_rows_without_a_rest_keep_their_values_in_bounds():
    """A tail of all mass, no tail, and a top-k that float16 rounds to certainty."""
    scores = SparseLogprobs(
        token_ids=np.array([[1, 2]] * 3, np.uint32),
        logprobs=np.array([[-30, -31], [-0.7, -0.7], [-1e-9, -25]], np.float16),
        next_token_logprob=np.array([-30, -0.7, -25], np.float32),
        tail_logprob=np.array([0.0, -np.inf, -30.0], np.float32),
    )
    found = sparse_distribution([ScoredSample(sample([1, 1, 2]), scores)], 5).logprobs.numpy()
    named = np.array([[-30, -31], [-0.7, -0.7], [-25, 0]])
    np.testing.assert_allclose(
        np.stack([found[0, [0, 2]], found[1, [0, 2]], found[2, [0, 1]]]), named, rtol=2.0**-10,
        atol=0.02,
    )  # fmt: skip
    assert np.isfinite(found[found != -np.inf]).all()


def drawn_sample(log_p, k, seed, learned=None):
    """Return the answer of a teacher of log-probs [T, V] to a request for draws."""
    draws = torch.multinomial(
        torch.from_numpy(np.exp(log_p)), k, replacement=True,
        generator=torch.Generator().manual_seed(seed),
    ).numpy()  # fmt: skip
    rows = len(log_p)
    scores = SparseLogprobs(
        token_ids=draws.astype(np.uint32),
        logprobs=np.take_along_axis(log_p, draws, 1).astype(np.float32),
        next_token_logprob=np.zeros(rows, np.float32),
        tail_logprob=np.zeros(rows, np.float32),
    )
    return ScoredSample(sample([0] * rows, learned), scores, sampled=True), draws


def test_draws_become_each_tokens_share_of_them_once():
    log_p = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).log_softmax(1).numpy()
    item, draws = drawn_sample(log_p, 16, seed=0, learned=[1, 0, 1, 1])
    teacher = sparse_distribution([item], 9)
    for row, drawn in enumerate(draws[[0, 2, 3]]):
        named = teacher.token_ids[row] >= 0
        shares = dict(
            zip(
                teacher.token_ids[row][named].tolist(),
                teacher.logprobs[row][named].exp().tolist(),
                strict=True,
            )
        )
        wanted = dict(zip(*np.unique(drawn, return_counts=True), strict=True))
        assert shares == pytest.approx({int(i): n / 16 for i, n in wanted.items()})
    assert teacher.tail_logprob.isneginf().all()


def test_draws_outside_the_shared_vocabulary_go_to_the_tail():
    log_p = torch.zeros(2, 8).log_softmax(1).numpy()
    item, draws = drawn_sample(log_p, 32, seed=1)
    teacher = sparse_distribution([item], 5)
    assert int(teacher.token_ids.max()) == 4
    outside = (draws >= 5).mean(axis=1)
    np.testing.assert_allclose(teacher.tail_logprob.exp().numpy(), outside, rtol=1e-5)


def test_the_mean_over_draws_is_the_dense_divergence_and_its_gradient():
    """Within its own standard error, which renormalising the same number of ids is not."""
    generator = torch.Generator().manual_seed(2)
    student, target = torch.randn(2, 3, 40, generator=generator)
    log_p = target.log_softmax(1)
    weights = torch.tensor([1.0, 0.5, 2.0])
    logits = student.requires_grad_()

    def numbers(rows):
        (gradient,) = torch.autograd.grad(rows.sum(), logits)
        return torch.cat([rows.detach(), gradient.flatten()]).double()

    dense = numbers(weights * generalized_jsd(logits, target, Divergence(0.0)))
    found = []
    for seed in range(1500):
        teacher = sparse_distribution([drawn_sample(log_p.numpy(), 4, seed)[0]], 40)
        found.append(
            numbers(sparse_generalized_jsd(logits, teacher, Divergence(0.0), weights=weights).loss)
        )
    found = torch.stack(found)
    error = found.std(0) / 1500**0.5

    def worst(mean):
        return float(((mean - dense).abs() / error).max())

    assert worst(found.mean(0)) < 4.5  # of 123 numbers
    top = scores_of(log_p.exp().numpy(), 4, [0, 0, 0])
    support = sparse_distribution([ScoredSample(sample([0, 0, 0]), top)], 40)
    renormalized = sparse_generalized_jsd(
        logits, support, Divergence(0.0, tail="renormalize"), weights=weights
    ).loss
    assert worst(numbers(renormalized)) > 20


def test_logits_that_never_exist_give_the_same_estimate():
    """Fused against whole logits, value, gradient and statistics."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (5, 30))
    log_p = torch.randn(5, 30, generator=generator).log_softmax(1).numpy()
    teacher = sparse_distribution([drawn_sample(log_p, 7, 0)[0]], 30)
    weights = torch.rand(5, generator=generator)
    results = []
    for fused in (False, True):
        states = hidden.clone().requires_grad_()
        if fused:
            loss, statistics = linear_sparse_jsd(
                states,
                weight,
                teacher,
                Divergence(0.0),
                normalizer=1.0,
                chunk_size=2,
                weights=weights,
            )
        else:
            rows, statistics = sparse_generalized_jsd(
                states @ weight.T, teacher, Divergence(0.0), weights=weights
            )
            loss = rows.sum()
        loss.backward()
        results.append((loss.detach(), states.grad, statistics.divergence))
        assert statistics.teacher_entropy.isnan().all()
        assert statistics.gap_bound.isposinf().all()
        assert (statistics.student_support_mass < 1).all()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
