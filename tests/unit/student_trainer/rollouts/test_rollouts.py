"""The student's own completions: exact distribution, and randomness that follows the sample."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from shared.errors import RolloutError
from student_trainer.rollouts import RolloutRequest, TransformersRollouts
from student_trainer.rollouts.sampling import sample_tokens
from tests.support.models import small_model

STOP = 1
MANY_STOPS = range(1, 9)  # completions of very different lengths


@pytest.fixture(scope="module")
def model():
    return small_model()


def engine(
    model, *, temperature=1.0, batch_size=None, max_new_tokens=24, vocab_size=64, stop_ids=(STOP,)
):
    rollouts = TransformersRollouts(
        model, stop_ids=stop_ids, pad_token_id=0, max_new_tokens=max_new_tokens,
        temperature=temperature, batch_size=batch_size, vocab_size=vocab_size,
    )  # fmt: skip
    rollouts.prepare()  # whose forward passes no test means to count
    return rollouts


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


class CountConversions(TorchDispatchMode):
    """Count conversions of a tensor of some shape to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += (kwargs or {}).get("dtype") is torch.bfloat16
        return func(*args, **(kwargs or {}))


def in_bfloat16():
    """A small model that computes in bfloat16, as accelerate makes one of `--bf16`."""
    model = small_model()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    return model


def test_weights_are_converted_once_and_not_for_each_token():
    model = in_bfloat16()
    rollouts = engine(model, max_new_tokens=12, stop_ids=())
    weight = model.model.layers[0].mlp.up_proj.weight
    with CountConversions(weight.shape) as counted:
        (group,) = rollouts.generate(requests(3))
    assert all(len(rollout.token_ids) == 12 for _, rollout in group)
    # The gate and up projections of each layer and the output layer have this shape.
    assert counted.count == 2 * len(model.model.layers) + 1
    assert not torch.is_autocast_enabled("cpu")


def test_a_step_between_two_groups_trains_and_is_seen():
    model = in_bfloat16()
    rollouts = engine(model, stop_ids=MANY_STOPS)
    groups = rollouts.generate(requests(12))
    next(groups)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(torch.nan)
    with pytest.raises(RolloutError, match="not finite"):
        next(groups)


def assert_greedy(model, asked, rollouts):
    """Each token is the most probable one of one forward pass without a cache."""
    for request, rollout in zip(asked, rollouts, strict=True):
        ids = torch.tensor([*request.prompt_ids, *rollout.token_ids], dtype=torch.long)[None]
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[0].argmax(-1)
        start = len(request.prompt_ids)
        assert best[start - 1 : -1].tolist() == rollout.token_ids.tolist()


@pytest.mark.parametrize("batch_size", [None, 3])
def test_greedy_takes_the_most_probable_token(model, batch_size):
    asked = requests(10)
    rollouts = run(engine(model, temperature=0.0, batch_size=batch_size), asked)
    assert_greedy(model, asked, rollouts)


def test_greedy_writes_what_transformers_own_generate_writes(model):
    asked = requests(10)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=STOP, pad_token_id=0)
    for request, rollout in zip(asked, run(engine(model, temperature=0.0), asked), strict=True):
        ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
        written = model.generate(ids, generation_config=config)[0, ids.shape[1] :]
        assert written.tolist() == rollout.token_ids.tolist()


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


@contextmanager
def watched(model):
    """The shape of the input of each forward pass."""
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        yield shapes
    finally:
        hook.remove()


def test_a_finished_row_is_handed_over_at_once_and_costs_nothing_any_more(model):
    rollouts = engine(model, stop_ids=MANY_STOPS)
    with watched(model) as shapes:
        given = []
        for group in rollouts.generate(requests(12)):
            lengths = {len(rollout.token_ids) for _, rollout in group}
            assert lengths == {len(shapes)}  # as many forward passes as tokens
            given += [len(rollout.token_ids) for _, rollout in group]
    assert len(set(given)) > 3
    assert given == sorted(given)
    assert all(width == 1 for _, width in shapes[1:])
    assert sum(rows for rows, _ in shapes) == sum(given)  # no row is run that writes nothing


def test_waiting_prompts_take_the_places_of_finished_rows(model):
    asked, many = requests(24), engine(model, batch_size=8, stop_ids=MANY_STOPS)
    with watched(model) as shapes:
        together = [len(r.token_ids) for r in run(many, asked)]
    assert sum(rows for rows, _ in shapes) == sum(together)
    decoding = [rows for rows, width in shapes if width == 1]
    assert max(decoding) == 8
    full = sum(rows >= 6 for rows in decoding)
    assert full > 0.5 * len(decoding)


def test_places_are_taken_when_a_quarter_of_them_is_free(model):
    rollouts = engine(model, batch_size=8, stop_ids=MANY_STOPS)
    with watched(model) as shapes:
        run(rollouts, requests(24))
    prefills = [rows for rows, width in shapes if width > 1]
    assert prefills[0] == 8
    assert min(prefills[1:-1]) >= 2


FAMILIES = {
    "sliding windows": ("gemma2", {"sliding_window": 8, "head_dim": 8}),
    "states instead of keys": ("mamba", {"state_size": 8}),
    "learned positions": ("gpt2", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_other_caches_and_positions_are_followed(family, batch_size):
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.2, **options,
    )  # fmt: skip
    other = AutoModelForCausalLM.from_config(config)
    asked = requests(9)
    together = run(engine(other, batch_size=batch_size, stop_ids=MANY_STOPS), asked)
    alone = run(engine(other, batch_size=1, stop_ids=MANY_STOPS), asked)
    assert len({len(r.token_ids) for r in alone}) > 2
    assert [r.token_ids.tolist() for r in together] == [r.token_ids.tolist() for r in alone]
    assert_greedy(other.eval(), asked, run(engine(other, temperature=0.0), asked))


def test_adapters_write_what_the_merged_model_writes():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(small_model(), config)
    asked = requests(6)
    written = run(engine(adapted, batch_size=4), asked)
    merged = run(engine(adapted.merge_and_unload(), batch_size=4), asked)
    plain = run(engine(small_model(), batch_size=4), asked)
    assert [r.token_ids.tolist() for r in written] == [r.token_ids.tolist() for r in merged]
    assert [r.token_ids.tolist() for r in written] != [r.token_ids.tolist() for r in plain]


def test_gradient_checkpointing_takes_no_cache_away():
    training = small_model().train()
    training.gradient_checkpointing_enable()
    rollouts = engine(training)
    with watched(training) as shapes:
        written = run(rollouts, requests(6))
    assert all(width == 1 for _, width in shapes[1:])
    plain = run(engine(small_model()), requests(6))
    assert [r.token_ids.tolist() for r in written] == [r.token_ids.tolist() for r in plain]
    assert training.training


def test_a_diverged_student_is_told_so():
    broken = small_model()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(RolloutError, match="not finite"):
            run(engine(broken, temperature=temperature), requests(2))


def test_no_uniform_reaches_an_id_of_zero_probability():
    logits = torch.randn(3, 1200)
    logits[:, 6:] = -torch.inf
    logits[2, :600] = -torch.inf
    logits[2, 700] = 0.0
    draws = torch.tensor([1 - 2**-53, 1 - 2**-30, 0.0], dtype=torch.float64)
    assert sample_tokens(logits, draws, 1.0).tolist() == [5, 5, 700]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("vocab_size", [3, 512, 5000])
def test_blocks_find_the_token_of_the_whole_cumulative_sum(vocab_size, temperature):
    torch.manual_seed(vocab_size)
    logits = 4 * torch.randn(400, vocab_size)
    draws = torch.rand(400, dtype=torch.float64)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    whole = torch.searchsorted(cdf, draws[:, None], right=True)[:, 0]
    assert torch.equal(sample_tokens(logits, draws, temperature), whole)
