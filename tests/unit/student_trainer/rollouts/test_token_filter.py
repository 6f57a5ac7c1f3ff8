"""Top-p, top-k and min-p leave the tokens that transformers' own warpers leave, in vLLM's order."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from student_trainer.rollouts import TokenFilter, TransformersRollouts
from student_trainer.rollouts.sampling import filter_logits, sample_tokens
from tests.support.models import small_model
from tests.unit.student_trainer.rollouts.test_rollouts import requests, run

FILTERS = st.builds(
    TokenFilter,
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    top_k=st.integers(0, 12),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.just(1.0)),
)
# Of few values, so that there are ties at every edge.
ROWS = st.integers(1, 40).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(-8, 8), min_size=size, max_size=size), min_size=1, max_size=3
    )
)


def warped(logits, token_filter):
    """Return the logits after transformers' warpers, and the distance of a sum to top-p's edge."""
    if token_filter.min_p > 0:
        logits = MinPLogitsWarper(token_filter.min_p)(None, logits)
    if token_filter.top_k > 0:
        logits = TopKLogitsWarper(token_filter.top_k)(None, logits)
    gap = 1.0
    if token_filter.top_p < 1:
        sums = logits.sort(dim=-1).values.double().softmax(-1).cumsum(-1)
        gap = float((sums - (1 - token_filter.top_p)).abs().min())
        logits = TopPLogitsWarper(token_filter.top_p)(None, logits)
    return logits, gap


@settings(max_examples=400, deadline=None)
@given(rows=ROWS, token_filter=FILTERS)
def test_the_tokens_left_are_those_of_transformers_warpers(rows, token_filter):
    logits = torch.tensor(rows, dtype=torch.float32) / 3
    expected, gap = warped(logits, token_filter)
    assume(gap > 1e-5)  # nearer than float32 adds up
    found = filter_logits(logits, token_filter)
    # Which of equal tokens stands at top-p's edge is left to the sort.
    assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)
    kept = found.isfinite()
    assert torch.equal(found[kept], logits[kept])
    if all(len(set(row)) == len(row) for row in rows):
        assert torch.equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, token_filter=FILTERS)
def test_a_row_is_filtered_as_if_it_were_alone(rows, token_filter):
    logits = torch.tensor(rows, dtype=torch.float32) / 3
    alone = [filter_logits(row[None], token_filter)[0] for row in logits]
    assert torch.equal(filter_logits(logits, token_filter), torch.stack(alone))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_of_a_whole_vocabulary_keeps_the_smallest_set_that_holds_it(top_p):
    """Most tokens are too improbable to be sorted, and in one row a single token is left."""
    torch.manual_seed(0)
    logits = torch.randn(4, 30_000) * torch.tensor([1.0, 3.0, 6.0, 0.0])[:, None]
    logits[3, 7] = 50.0
    kept = filter_logits(logits, TokenFilter(top_p=top_p)).isfinite()
    probabilities = logits.double().softmax(-1)
    held = (probabilities * kept).sum(-1)
    assert held.min() >= top_p
    least = probabilities.masked_fill(~kept, 1.0).amin(-1)
    assert probabilities.masked_fill(kept, 0.0).amax(-1).le(least).all()
    assert (held - least).max() < top_p
    assert kept[3].sum() == 1


@pytest.mark.parametrize(
    ("token_filter", "left"),
    [
        (TokenFilter(top_k=2), [0.5, 0.25]),
        (TokenFilter(top_k=3), [0.5, 0.25, 0.125, 0.125]),  # with those equal to the last
        (TokenFilter(top_p=0.8), [0.5, 0.25, 0.125]),
        (TokenFilter(min_p=0.4), [0.5, 0.25]),
        (TokenFilter(top_p=0.3), [0.5]),
        # 0.5 is two thirds of what min-p leaves, and only half of all.
        (TokenFilter(top_p=0.6, min_p=0.4), [0.5]),
    ],
    ids=["top-k", "equal to the last", "top-p", "min-p", "at least one", "min-p before top-p"],
)
def test_draws_have_the_probabilities_of_what_is_left(token_filter, left):
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    draws = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    logits = (2 * probabilities.log()).expand(8000, 4)  # which temperature 2 halves
    tokens = sample_tokens(logits, draws, 2.0, token_filter)
    found = sorted((tokens.bincount(minlength=4).double() / 8000).tolist(), reverse=True)
    expected = [p / sum(left) for p in left] + [0.0] * (4 - len(left))
    assert found == pytest.approx(expected, abs=1e-3)


def filtered(model, token_filter, batch_size=None, temperature=0.7):
    rollouts = TransformersRollouts(
        model, stop_ids=[1], pad_token_id=0, max_new_tokens=24, temperature=temperature,
        batch_size=batch_size, vocab_size=64, token_filter=token_filter,
    )  # fmt: skip
    return [one.token_ids.tolist() for one in run(rollouts, requests(12))]


@pytest.mark.parametrize(
    "token_filter",
    [
        TokenFilter(top_p=0.6),
        TokenFilter(top_k=3),
        TokenFilter(min_p=0.5),
        TokenFilter(0.9, 8, 0.2),
    ],
    ids=["top-p", "top-k", "min-p", "all"],
)
def test_completions_hold_only_tokens_that_are_left_and_do_not_depend_on_the_batch(token_filter):
    model = small_model()
    together = filtered(model, token_filter)
    assert together == filtered(model, token_filter) == filtered(model, token_filter, batch_size=5)
    assert together != filtered(model, TokenFilter())
    for request, ids in zip(requests(12), together, strict=True):
        whole = torch.tensor([[*request.prompt_ids.tolist(), *ids]])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(request.prompt_ids) - 1 : -1, :64]
        left = filter_logits(logits.float() / 0.7, token_filter).isfinite()
        assert left[torch.arange(len(ids)), torch.tensor(ids)].all()
        assert left.sum(-1).max() < 64


def test_one_token_left_is_greedy():
    model = small_model()
    greedy = filtered(model, TokenFilter(), temperature=0.0)
    for token_filter in (TokenFilter(top_k=1), TokenFilter(min_p=1.0), TokenFilter(top_p=1e-6)):
        assert filtered(model, token_filter) == greedy
    assert len(np.unique([ids[0] for ids in greedy])) > 1
