"""Each row of a generation is what it would be alone, sampled by the book."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InternalError
from shared.sampling import uniforms
from teacher_server.backends.base import GenerateJob
from teacher_server.backends.generation import generate_completions, within_context
from tests.support.reference import dense_logprobs, sample


def job(prompt, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0, seed=0, stops=()):
    prompt = np.array(prompt, np.uint32)
    key = (seed, prompt.tobytes(), 0)
    return GenerateJob(prompt, max_new_tokens, temperature, top_p, top_k, key, tuple(stops))


def generate(model, jobs, eos=(), waiting=None, vocab_size=260):
    """Completions in the order of jobs; each must come once, those nobody waits for not at all."""
    found = {}

    def ended(rows):
        assert not found.keys() & rows.keys()
        found.update(rows)

    everyone = [True] * len(jobs)
    generate_completions(
        model, jobs, eos, 0, waiting or (lambda: everyone), ended, vocab_size=vocab_size
    )
    return [found[row] for row in sorted(found)]


def kept(dense, top_k, top_p):
    """Log-probs [V] with −inf outside the top-k, then outside the nucleus."""
    order = np.argsort(-dense)
    keep = np.ones(len(dense), bool)
    if top_k:
        keep[order[top_k:]] = False
    p = np.where(keep, np.exp(dense), 0.0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]  # mass of the more probable tokens
    keep[order[before >= top_p]] = False
    return np.where(keep, dense, -np.inf)


def alone(model, item):
    """Token by token without a cache: the slow twin."""
    ids = item.prompt.astype(np.int64)
    draws = uniforms("generate", *item.key, count=item.max_new_tokens)
    for draw in draws:
        temperature = item.temperature or 1.0
        row = dense_logprobs(model, np.append(ids, 0), len(ids), temperature)[0]
        if item.temperature == 0:
            ids = np.append(ids, row.argmax())
        else:
            ids = np.append(ids, sample(kept(row, item.sampling_top_k, item.top_p), draw))
        if ids[-1] in item.stop_token_ids:
            break
    return ids[len(item.prompt) :].tolist()


def test_any_mixture_of_rows_equals_sampling_each_alone(llama):
    rng = np.random.default_rng(0)
    jobs = [
        job(rng.integers(0, 260, length), new, temperature, top_p, top_k, seed)
        for seed, (length, new, temperature, top_p, top_k) in enumerate(
            [
                (3, 8, 1.0, 1.0, 0),
                (17, 5, 0.0, 1.0, 0),
                (1, 12, 0.7, 1.0, 0),
                (9, 8, 1.0, 0.8, 0),
                (9, 8, 1.0, 1.0, 5),
                (4, 10, 1.3, 0.6, 20),
                (30, 1, 2.0, 1.0, 0),
            ]
        )
    ]
    for item, completion in zip(jobs, generate(llama, jobs), strict=True):
        assert completion.token_ids.tolist() == alone(llama, item)
        assert completion.finish_reason == "length"


def test_a_row_stops_at_its_own_tokens_and_keeps_them(llama):
    free = generate(llama, [job([5, 6, 7], 10)])[0].token_ids.tolist()
    stop = free[4]
    end = free.index(stop) + 1
    stopped, other = generate(llama, [job([5, 6, 7], 10, stops=[stop]), job([5, 6, 7], 10)])
    assert stopped.token_ids.tolist() == free[:end]
    assert stopped.finish_reason == "stop"
    assert other.token_ids.tolist() == free
    ended = generate(llama, [job([5, 6, 7], 10)], eos=[stop])[0]
    assert (ended.token_ids.tolist(), ended.finish_reason) == (free[:end], "stop")


def test_the_seed_decides_and_nothing_else_does(llama):
    first, again, other = generate(llama, [job([9, 8], seed=s) for s in (1, 1, 2)])
    assert first.token_ids.tolist() == again.token_ids.tolist()
    assert first.token_ids.tolist() != other.token_ids.tolist()


def test_sampling_follows_the_models_distribution(llama):
    jobs = [job([5, 6, 7], 1, seed=seed) for seed in range(2_000)]
    drawn = np.array([c.token_ids[0] for c in generate(llama, jobs)])
    p = np.exp(dense_logprobs(llama, np.array([5, 6, 7, 0]), 3, 1.0)[0])
    counts = np.bincount(drawn, minlength=len(p))
    likely = p > 0.01
    error = (counts[likely] - 2_000 * p[likely]) / np.sqrt(2_000 * p[likely] * (1 - p[likely]))
    assert likely.sum() > 5
    assert abs(error).max() < 4.5


def test_generation_ends_when_nobody_waits(llama):
    asked = []

    def waiting():
        asked.append(True)
        return [False, len(asked) < 3]

    assert generate(llama, [job([5], 60), job([6], 60)], waiting=waiting) == []
    assert len(asked) == 3


def test_a_row_is_told_with_the_token_that_ends_it(llama):
    """Each at its own length, in the very step; none is told twice."""
    told = []
    jobs = [job([5], 4), job([6], 2), job([7, 8], 4)]
    generate_completions(llama, jobs, (), 0, lambda: [True] * 3, told.append, vocab_size=260)
    assert [sorted(rows) for rows in told] == [[], [1], [], [0, 2]]
    assert [len(told[-1][row].token_ids) for row in (0, 2)] == [4, 4]


def test_a_checkpoints_own_sampling_defaults_are_not_applied(llama):
    model = copy.deepcopy(llama)
    plain = generate(model, [job([5, 5, 5], 12, temperature=0.0)])[0].token_ids.tolist()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 4
    assert generate(model, [job([5, 5, 5], 12, temperature=0.0)])[0].token_ids.tolist() == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(llama, temperature):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(InternalError, match="not finite while generating"):
        generate(model, [job([5, 6], temperature=temperature)])


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12))
def test_groups_stay_within_the_context(lengths):
    limit = max(prompt + new for prompt, new in lengths)
    jobs = [job([1] * prompt, new) for prompt, new in lengths]
    groups = within_context(jobs, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(jobs)))
    for group in groups:
        assert max(lengths[i][0] for i in group) + max(lengths[i][1] for i in group) <= limit


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_of_the_output_layer_are_never_generated(llama, temperature):
    jobs = [job([5, 6], 8, temperature, seed=seed) for seed in range(20)]
    everything = np.concatenate([c.token_ids for c in generate(llama, jobs)])
    assert everything.max() >= 100
    restricted = np.concatenate([c.token_ids for c in generate(llama, jobs, vocab_size=100)])
    assert restricted.max() < 100
