"""Students whose positions depend on the longest sequence of a batch learn each as if alone."""

import copy

import numpy as np
import pytest
import torch

from shared.errors import ConfigurationError
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.sample import Sample
from student_trainer.evaluation.perplexity import measure
from student_trainer.losses import Divergence
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.model.packing import decide_packing
from student_trainer.pipeline.targets import ScoredSample, hard_labels, sparse_distribution
from student_trainer.training.positions import check_positions
from tests.support.models import DYNAMIC, LONGROPE
from tests.unit.student_trainer.rollouts.test_stateful_rollouts import build

KINDS = {"longrope": ("phi3", LONGROPE), "dynamic": ("llama", DYNAMIC)}


def samples(*lengths):
    rng = np.random.default_rng(3)
    return [
        Sample(rng.integers(2, 64, n).astype(np.uint32), 2, np.ones(n - 2, bool), "dataset")
        for n in lengths
    ]


def loss(model, some):
    scored = [ScoredSample(sample, None) for sample in some]
    targets = SparseTargets(
        positions=predicting_positions(some, [s.completion_mask for s in some], packed=False),
        teacher=sparse_distribution(scored, 64),
        divergence=Divergence(0.0),
        normalizer=10.0,
        vocab_size=64,
        labels=hard_labels(scored, 0.0)[1],
    )
    return model(**model_inputs(some, 0, packed=False), sparse_targets=targets)["loss"]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_has_the_loss_and_gradient_of_each_alone(kind):
    family, options = KINDS[kind]
    model = build(family, **options)
    some = samples(9, 40, 24, 31, 5)
    alone = []
    for sample in some:
        single = copy.deepcopy(model)  # has seen nothing yet
        install_sparse_loss(single)
        loss(single, [sample]).backward()
        alone.append((loss(single, [sample]).item(), gradient(single)))
    install_sparse_loss(model)
    together = loss(model, some)
    together.backward()
    assert together.item() == pytest.approx(sum(value for value, _ in alone), rel=1e-5)
    expected = sum(one for _, one in alone)
    assert float((gradient(model) - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_perplexity_does_not_depend_on_what_was_measured_before():
    model = build("llama", **DYNAMIC)
    alone = measure(
        copy.deepcopy(model), samples(30), None, divergence=Divergence(0.0), vocab_size=64
    )
    first = samples(30)[0]
    measure(model, samples(60), None, divergence=Divergence(0.0), vocab_size=64)
    after = measure(model, [first], None, divergence=Divergence(0.0), vocab_size=64)
    assert after["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


def test_one_pass_is_enough_where_no_sequence_passes_the_original_length():
    model = build("phi3", **LONGROPE)
    install_sparse_loss(model)
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    loss(model, samples(9, 24, 17))
    loss(model, samples(9, 40, 31))
    assert shapes == [(3, 24), (1, 9), (2, 40)]


def test_sequences_over_the_original_length_are_not_packed():
    model = build("phi3", **LONGROPE)
    assert decide_packing(model, "on", longest=24)
    for longest in (25, None):
        with pytest.raises(ConfigurationError, match="--packing on: Phi3ForCausalLM does not"):
            decide_packing(model, "on", longest)


def test_an_encoder_learns_nothing():
    with pytest.raises(ConfigurationError, match=r"BertLMHeadModel: a later token changes"):
        install_sparse_loss(build("bert"))
    install_sparse_loss(build("bert", is_decoder=True))


@pytest.mark.parametrize(
    ("kind", "sizes", "longest", "refused"),
    [
        ("longrope", (2, 1), 25, True),
        ("longrope", (2, 1), None, True),
        ("longrope", (2, 8), 24, False),
        ("longrope", (1, 1), 25, False),
        ("longrope", (1, 8), 25, True),  # held-out rows meet in evaluation
        ("dynamic", (1, 1), 24, True),  # one sequence of that length takes two passes
        ("dynamic", (2, 8), 23, False),
    ],
)
def test_ranks_that_share_weights_meet_equally_often(kind, sizes, longest, refused):
    family, options = KINDS[kind]
    config = build(family, **options).config
    if refused:
        with pytest.raises(ConfigurationError, match=r"pass --max_length 2[34]"):
            check_positions(config, longest=longest, batch_sizes={*sizes}, regrouped=False)
    else:
        check_positions(config, longest=longest, batch_sizes={*sizes}, regrouped=False)
