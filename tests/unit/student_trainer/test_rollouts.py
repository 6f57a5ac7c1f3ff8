"""The student's own completions: exact distribution, and randomness that follows the sample."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from student_trainer.rollouts import RolloutRequest, TransformersRollouts
from student_trainer.rollouts.transformers import _Sample

STOP = 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def engine(model, *, temperature=1.0, batch_size=None, max_new_tokens=24, vocab_size=64):
    return TransformersRollouts(
        model, stop_ids=[STOP], pad_token_id=0, max_new_tokens=max_new_tokens,
        temperature=temperature, batch_size=batch_size, vocab_size=vocab_size,
    )  # fmt: skip


def requests(count):
    rng = np.random.default_rng(0)
    return [
        RolloutRequest(rng.integers(2, 64, rng.integers(2, 12)).astype(np.uint32), (5, i))
        for i in range(count)
    ]


def run(engine, asked):
    rollouts = dict(item for group in engine.generate(asked) for item in group)
    return [rollouts[i] for i in range(len(asked))]


def test_the_same_key_gives_the_same_completion_whatever_the_batch(model):
    asked = requests(12)
    together = run(engine(model), asked)
    alone = run(engine(model, batch_size=1), asked)
    backwards = run(engine(model, batch_size=5), asked[::-1])[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()


def test_completions_end_with_the_stop_token_or_are_truncated(model):
    rollouts = run(engine(model), requests(40))
    assert {r.truncated for r in rollouts} == {True, False}
    for rollout in rollouts:
        stops = np.flatnonzero(rollout.token_ids == STOP)
        if rollout.truncated:
            assert len(rollout.token_ids) == 24
            assert not len(stops)
        else:
            assert stops.tolist() == [len(rollout.token_ids) - 1]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_samples_follow_the_softmax_at_the_temperature(model, temperature):
    prompt = np.array([5, 6, 7], dtype=np.uint32)
    asked = [RolloutRequest(prompt, (9, i)) for i in range(6000)]
    rollouts = run(engine(model, temperature=temperature, max_new_tokens=1), asked)
    counts = np.bincount([r.token_ids[0] for r in rollouts], minlength=64)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1).double().numpy() * len(asked)
    chi_square = ((counts - expected) ** 2 / expected)[expected >= 5].sum()
    degrees = int((expected >= 5).sum())
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_greedy_takes_the_most_probable_token(model):
    asked = requests(3)
    for request, rollout in zip(asked, run(engine(model, temperature=0.0), asked), strict=True):
        ids = torch.tensor([*request.prompt_ids, *rollout.token_ids], dtype=torch.long)[None]
        with torch.no_grad():
            best = model(ids).logits[0].argmax(-1)
        start = len(request.prompt_ids)
        assert best[start - 1 : -1].tolist() == rollout.token_ids.tolist()


def test_ids_outside_the_shared_vocabulary_are_never_sampled(model):
    rollouts = run(engine(model, temperature=3.0, vocab_size=10), requests(40))
    assert max(int(r.token_ids.max()) for r in rollouts) == 9


def test_the_checkpoints_sampling_defaults_change_nothing(model):
    plain = run(engine(model), requests(6))
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True)
    try:
        with_defaults = run(engine(model), requests(6))
        assert model.generation_config.repetition_penalty == 5.0  # put back afterwards
    finally:
        model.generation_config = own
    assert [r.token_ids.tolist() for r in plain] == [r.token_ids.tolist() for r in with_defaults]


def test_training_mode_is_restored(model):
    model.train()
    run(engine(model), requests(2))
    assert model.training


def test_groups_come_out_as_they_finish(model):
    groups = list(engine(model, batch_size=4).generate(requests(10)))
    assert [len(group) for group in groups] == [4, 4, 2]


def test_no_uniform_reaches_an_id_of_zero_probability():
    scores = torch.randn(3, 10)
    scores[:, 6:] = -torch.inf
    draws = np.array([[1 - 2**-53], [1 - 2**-30], [0.0]])
    chosen = _Sample(draws, 1, 1.0)(torch.zeros(3, 1, dtype=torch.long), scores).argmax(dim=-1)
    assert chosen.tolist()[:2] == [5, 5]
    assert chosen.max() < 6
