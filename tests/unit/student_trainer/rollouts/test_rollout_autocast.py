"""Under autocast, weights are converted once for many tokens, and training finds no such copy."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from student_trainer.rollouts import RolloutRequest, TransformersRollouts
from tests.support.models import small_model

TOKENS = 12


class Conversions(TorchDispatchMode):
    """A count of the conversions of one weight to bfloat16."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.count = weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        to = (kwargs or {}).get("dtype")
        if function is torch.ops.aten._to_copy.default and to == torch.bfloat16:
            self.count += args[0].data_ptr() == self.weight.data_ptr()
        return function(*args, **(kwargs or {}))


@pytest.fixture
def model():
    """A model that accelerate has prepared for --bf16: each call is a block of autocast."""
    model = small_model()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def groups(model, stop_ids=()):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 64, 5 + i).astype(np.uint32) for i in range(4)]
    engine = TransformersRollouts(
        model, stop_ids=stop_ids, pad_token_id=0, max_new_tokens=TOKENS, temperature=1.0,
        batch_size=None, vocab_size=64,
    )  # fmt: skip
    engine.prepare()
    return engine.generate([RolloutRequest(p, (1, i)) for i, p in enumerate(prompts)])


def tokens(groups):
    return {index: rollout.token_ids.tolist() for group in groups for index, rollout in group}


def test_a_weight_is_converted_once_for_all_tokens(model, monkeypatch):
    rollouts = groups(model)
    with Conversions(model.lm_head.weight) as kept:
        found = tokens(rollouts)
    assert kept.count == 1
    monkeypatch.setattr(torch, "autocast_increment_nesting", lambda: 0)
    monkeypatch.setattr(torch, "autocast_decrement_nesting", lambda: 0)
    rollouts = groups(model)
    with Conversions(model.lm_head.weight) as anew:
        assert tokens(rollouts) == found
    assert anew.count == TOKENS


def test_training_between_groups_and_after_them_gets_gradients(model):
    rollouts = groups(model, stop_ids=range(2, 12))
    seen = 0
    for _ in rollouts:
        seen += 1
        assert_trains(model)
    assert seen > 1
    assert_trains(model)


def test_training_after_rollouts_that_were_given_up_gets_gradients(model):
    rollouts = groups(model, stop_ids=range(2, 12))
    next(rollouts)
    rollouts.close()
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()
    assert_trains(model)


def assert_trains(model):
    model.zero_grad()
    assert not model(torch.tensor([[5]])).logits.equal(_with_other_head(model))
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def _with_other_head(model):
    with torch.no_grad():
        model.lm_head.weight.neg_()
        logits = model(torch.tensor([[5]])).logits
        model.lm_head.weight.neg_()
        return logits
