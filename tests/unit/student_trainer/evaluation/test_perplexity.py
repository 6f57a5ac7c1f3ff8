"""Perplexity and divergence of many rows in a forward pass are those of each row alone."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.sparse import SparseLogprobs
from student_trainer.data.sample import Sample
from student_trainer.evaluation.perplexity import measure
from student_trainer.losses import Divergence
from tests.support.models import save_model

V, K = 260, 5
# (tokens of the prompt, of the completion): one token before it, none in it, and very unequal ones.
ROWS = [(1, 3), (4, 0), (1, 1), (7, 90), (60, 2), (2, 5), (1, 0), (30, 33), (3, 4)]


def sample(prompt, completion, seed):
    ids = np.random.default_rng(seed).integers(2, V - 3, prompt + completion).astype(np.uint32)
    mask = np.ones(completion, bool)
    mask[1:2] = False  # as where another turn stands between
    return Sample(ids, prompt, mask, "dataset")


def scored(one, seed):
    rng = np.random.default_rng(seed)
    shape = len(one.completion_mask), K + 2
    shares = np.log(rng.dirichlet(np.ones(K + 2), shape[0])).astype(np.float32).reshape(shape)
    others = [
        rng.choice(np.setdiff1d(np.arange(V), [i]), K, replace=False) for i in one.completion_ids
    ]
    return SparseLogprobs(
        token_ids=np.array(others, np.uint32).reshape(-1, K),
        logprobs=shares[:, :K],
        next_token_logprob=shares[:, K],
        tail_logprob=shares[:, K + 1],
    )


@pytest.fixture(params=["llama", "qwen2", "gemma2"])
def model(request, tmp_path):
    save_model(tmp_path, family=request.param, vocab_size=V, max_position_embeddings=128)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.fixture
def passes(model):
    """Return the shape of each forward pass."""
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def measured(model, samples, scores, **options):
    return measure(model, samples, scores, divergence=Divergence(0.5), vocab_size=V - 3, **options)


@pytest.mark.parametrize("pass_tokens", [70, 300, 100_000])
def test_many_rows_at_once_have_the_figures_of_each_alone(model, passes, pass_tokens):
    samples = [sample(*sizes, seed) for seed, sizes in enumerate(ROWS)]
    scores = [scored(one, seed) for seed, one in enumerate(samples)]
    alone = measured(model, samples, scores, pass_tokens=1)
    assert {count for count, _ in passes} == {1}
    passes.clear()
    together = measured(model, samples, scores, pass_tokens=pass_tokens)
    assert together == pytest.approx(alone, rel=1e-5)
    assert max(count for count, _ in passes) > 2
    assert all(count == 1 or count * width <= pass_tokens for count, width in passes)


def test_perplexity_is_that_of_the_models_own_logits(model):
    samples = [sample(*sizes, seed) for seed, sizes in enumerate(ROWS)]
    total = tokens = 0
    for one in samples:
        ids = torch.from_numpy(one.token_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0, :, : V - 3].double().log_softmax(-1)
        for place in one.completion_start + np.flatnonzero(one.completion_mask):
            total -= float(logprobs[place - 1, ids[place]])
            tokens += 1
    found = measured(model, samples, None)
    assert found == {"perplexity": pytest.approx(math.exp(total / tokens), rel=1e-5)}


def test_rows_without_a_single_token_have_no_figure(model):
    assert measured(model, [sample(4, 0, 0)], None) == {}
    assert measured(model, [], None) == {}
