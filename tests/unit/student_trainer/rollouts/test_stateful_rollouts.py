"""Students whose states, caches or positions make a batch write other tokens than each alone."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from shared.errors import RolloutError
from student_trainer.model.probe import record_head_inputs
from student_trainer.rollouts import RolloutRequest, TransformersRollouts
from tests.support.models import DYNAMIC, LONGROPE, STATEFUL, small_model

STOPS = tuple(range(1, 9))  # completions of very different lengths


def build(family, **options):
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
        **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def engine(model, *, batch_size=None, max_new_tokens=16):
    return TransformersRollouts(
        model, stop_ids=STOPS, pad_token_id=0, max_new_tokens=max_new_tokens, temperature=0.0,
        batch_size=batch_size, vocab_size=64,
    )  # fmt: skip


def requests(*lengths):
    rng = np.random.default_rng(0)
    return [
        RolloutRequest(rng.integers(9, 64, length).astype(np.uint32), (5, i))
        for i, length in enumerate(lengths)
    ]


def right_rows(make, asked, rollouts):
    """Return how many equal a plain forward pass of the model, run anew for each token."""
    found = 0
    for index, request in enumerate(asked):
        ids = list(map(int, request.prompt_ids))
        written = rollouts[index].token_ids.tolist()
        for token in written:
            with torch.no_grad():
                best = make()(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            if int(best) != token:
                break
            ids.append(token)
        else:
            found += 1
    return found


def run(rollouts, asked):
    return dict(item for group in rollouts.generate(asked) for item in group)


@contextmanager
def forward_rows(model):
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


HOW = {
    "rwkv": "without a cache, which is slow",
    "recurrent_gemma": "one at a time",
    "minimax": "without a cache, which is slow",
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("family", STATEFUL)
def test_every_row_is_what_the_model_writes_alone(family, batch_size, caplog):
    model = build(family, **STATEFUL[family])
    asked = requests(3, 11, 2, 7, 9, 5)
    with caplog.at_level(logging.WARNING):
        rollouts = run(engine(model, batch_size=batch_size), asked)
        run(engine(model), asked[:1])  # another engine of the model: tried and told once
    assert right_rows(lambda: model, asked, rollouts) == 6
    told = [r.message for r in caplog.records if "rollouts are generated" in r.message]
    assert len(told) == 1
    assert told[0].endswith(HOW[family])


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_model_that_is_right_in_a_batch_stays_batched(family, caplog):
    model = build(family, **({"state_size": 8} if family == "mamba" else {}))
    rollouts = engine(model)
    rollouts.prepare()
    assert not [r for r in caplog.records if "rollouts are generated" in r.message]
    with forward_rows(model) as rows:
        asked = requests(3, 11, 2, 7, 9, 5)
        written = run(rollouts, asked)
    assert rows[0] == (6, 11)
    assert right_rows(lambda: model, asked, written) == 6


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(("family", "options"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_sequences_that_pass_the_original_length_are_right(family, options, batch_size):
    model = build(family, **options)

    def make():  # dynamic positions keep the longest sequence of before
        return model if options is LONGROPE else build(family, **options)

    asked = requests(3, 20, 2, 30, 18, 22)  # two never pass 24 tokens, three do, one begins beyond
    rollouts = run(engine(model, batch_size=batch_size), asked)
    assert right_rows(make, asked, rollouts) == 6
    assert right_rows(make, asked[::-1], run(engine(model), asked[::-1])) == 6


def test_sequences_below_the_original_length_are_batched_and_long_ones_cached():
    model = build("phi3", **LONGROPE)
    rollouts = engine(model, max_new_tokens=4)
    rollouts.prepare()
    with forward_rows(model) as rows:
        run(rollouts, requests(3, 20, 30))
    assert rows[0] == (2, 20)  # 24 tokens at most
    alone = [width for count, width in rows if count == 1]
    assert 30 in alone
    assert all(width == 1 for width in alone[alone.index(30) + 1 :])


def test_an_encoder_is_refused():
    with pytest.raises(RolloutError, match=r"BertLMHeadModel \(bert\) .*--rollout_engine vllm"):
        engine(build("bert")).prepare()


def test_a_model_that_answers_otherwise_each_time_is_refused(monkeypatch):
    forward, calls = LlamaModel.forward, []

    def changing(self, *args, **kwargs):
        calls.append(1)
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.roll(len(calls), dims=-1)
        return output

    monkeypatch.setattr(LlamaModel, "forward", changing)
    with pytest.raises(RolloutError, match="uncached: other states than alone"):
        engine(small_model()).prepare()


def test_half_precision_is_no_fault(caplog):
    for family, options in {"llama": {}, "mixtral": {"num_local_experts": 4}}.items():
        engine(build(family, **options).bfloat16()).prepare()
    assert not [r for r in caplog.records if "rollouts are generated" in r.message]


def test_a_trial_is_judged_by_the_dtype_that_the_head_computes_in():
    """Under autocast the states are float32, and all that makes them rounds to bfloat16."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16), record_head_inputs(model) as seen:
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert [states.dtype for states in seen] == [torch.bfloat16]


def test_a_lack_of_memory_is_no_fault_of_the_model(monkeypatch):
    writer = engine(build("llama"))

    def forward(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(writer), "_generates_correctly", forward)
    with pytest.raises(torch.OutOfMemoryError):
        writer.prepare()
