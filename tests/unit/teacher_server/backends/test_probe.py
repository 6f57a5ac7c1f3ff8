"""The trials of a model as it loads: what a neighbour, a later token or a cache changes."""

import numpy as np
import pytest
import torch
from transformers import LlamaModel

from shared.errors import ConfigurationError
from teacher_server.backends import probe
from teacher_server.backends.base import GenerateJob, ScoreJob, ScoreOptions
from tests.support.models import DYNAMIC, LONGROPE, STATEFUL, save_model, save_tokenizer
from tests.support.reference import load_model
from tests.unit.teacher_server.backends.test_transformers_backend import (
    backend,
    error_of,
    generated,
)


def saved(folder, family, **options):
    save_tokenizer(folder)
    save_model(folder, family=family, **options)
    return folder


def score_jobs(*lengths):
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 260, length).astype(np.uint32) for length in lengths]
    return [ScoreJob(some, 1, top_k=5) for some in ids]


def generate_jobs(*lengths, max_new_tokens=12):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 260, length).astype(np.uint32) for length in lengths]
    return [
        GenerateJob(p, max_new_tokens - i, 0.0, 1.0, 0, (i,), score=ScoreOptions(3))
        for i, p in enumerate(prompts)
    ]


def forward_rows(model):
    """Return a list that gets the number of rows of each forward pass from now on."""
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def assert_greedy(folder, job, completion, *, each_new=False):
    """Each token is the most probable one of a plain forward pass, perhaps of a new model."""
    ids = list(map(int, job.prompt))
    model = load_model(folder)
    for token in completion.token_ids.tolist():
        model = load_model(folder) if each_new else model
        with torch.no_grad():
            best = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :260].argmax()
        assert token == int(best)
        ids.append(token)


@pytest.mark.parametrize(
    ("family", "options"), [("phi3", LONGROPE), ("llama", LONGROPE), ("llama", DYNAMIC)]
)
def test_a_longer_neighbour_changes_no_positions(family, options, tmp_path, caplog):
    served = backend(saved(tmp_path, family, **options))
    told = [r for r in caplog.records if "computed apart" in r.message]
    assert len(told) == ("max_position_embeddings" not in options)
    assert all("over 24 tokens" in record.message for record in told)
    jobs = score_jobs(9, 60, 24, 31, 25, 30)
    for asked in (jobs, jobs[::-1], jobs[3:4], jobs[2:3]):  # what came before changes nothing
        for job, answer in zip(asked, served.score_batch(asked), strict=True):
            assert error_of(job, answer, load_model(tmp_path)) < 1e-4


def test_sequences_of_one_kind_still_share_a_forward_pass(tmp_path):
    served = backend(saved(tmp_path, "phi3", **LONGROPE))
    rows = forward_rows(served._model.get_decoder())
    served.score_batch(score_jobs(9, 60, 24, 31))
    assert rows == [2, 2]


def test_any_other_model_that_its_neighbours_change_scores_one_by_one(
    tmp_path, monkeypatch, caplog
):
    folder = saved(tmp_path, "llama")
    forward = LlamaModel.forward

    def by_width(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * kwargs["input_ids"].shape[1]
        return output

    monkeypatch.setattr(LlamaModel, "forward", by_width)
    served = backend(folder)
    assert "LlamaForCausalLM scores a sequence otherwise beside a longer one" in caplog.text
    for job, answer in zip(score_jobs(9, 40), served.score_batch(score_jobs(9, 40)), strict=True):
        assert error_of(job, answer, load_model(folder)) < 1e-4


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_refused(family, tmp_path):
    with pytest.raises(ConfigurationError, match=f"a later token changes .* this {family} model"):
        backend(saved(tmp_path, family))


def test_an_encoders_architecture_made_causal_is_served(tmp_path):
    served = backend(saved(tmp_path, "bert", is_decoder=True))
    jobs = score_jobs(9, 40, 17)
    for job, answer in zip(jobs, served.score_batch(jobs), strict=True):
        assert error_of(job, answer, load_model(tmp_path)) < 1e-5


@pytest.mark.parametrize("family", STATEFUL)
def test_a_model_whose_state_minds_the_padding_writes_alone(family, tmp_path, caplog):
    served = backend(saved(tmp_path, family, **STATEFUL[family]))
    told = caplog.text.count("completions are generated one at a time")
    # It is told by a trial. With other releases of torch than the pinned one this recurrent_gemma,
    # of random weights, is right in a batch.
    assert told == 1 or (family == "recurrent_gemma" and not torch.__version__.startswith("2.13."))
    jobs = generate_jobs(3, 11, 6, 9)
    for job, completion in zip(jobs, generated(served, jobs), strict=True):
        assert_greedy(tmp_path, job, completion)


def test_a_model_that_is_right_in_a_batch_writes_in_a_batch(tmp_path, caplog):
    served = backend(saved(tmp_path, "llama"))
    assert not caplog.records
    rows = forward_rows(served._model)
    jobs = generate_jobs(3, 11, 6, 9)
    for job, completion in zip(jobs, generated(served, jobs), strict=True):
        assert_greedy(tmp_path, job, completion)
    assert rows[0] == 4


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_completions_that_grow_past_the_original_length_are_right(family, tmp_path):
    served = backend(saved(tmp_path, family, **LONGROPE))
    jobs = generate_jobs(3, 18, 30, 9, 22)  # two stay below, two go past it, one begins beyond
    for job, completion in zip(jobs, generated(served, jobs), strict=True):
        assert_greedy(tmp_path, job, completion)


def test_completions_under_dynamic_positions_are_right(tmp_path):
    served = backend(saved(tmp_path, "llama", **DYNAMIC))
    jobs = generate_jobs(18, 3, 22, 20, max_new_tokens=24)
    served.score_batch(score_jobs(60))
    for job, completion in zip(jobs, generated(served, jobs), strict=True):
        assert_greedy(tmp_path, job, completion, each_new=True)  # a model keeps its longest


def test_a_teacher_that_cannot_generate_still_scores(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ValueError("a cache of its own")

    monkeypatch.setattr(probe, "generate_completions", broken)
    served = backend(saved(tmp_path, "llama"))
    assert not served.facts.capabilities.generate
    assert "LlamaForCausalLM (llama) does not generate right" in caplog.text
    assert "--backend vllm" in caplog.text
    job = score_jobs(9)[0]
    assert error_of(job, served.score_batch([job])[0], load_model(tmp_path)) < 1e-5


def test_rounding_is_no_fault_and_a_wrong_state_is():
    torch.manual_seed(0)
    states, noise = torch.randn(5, 400), torch.randn(5, 400)
    for dtype, rounding, fault in ((torch.float32, 1e-4, 0.1), (torch.bfloat16, 0.1, 0.5)):
        assert probe.same_states(states + rounding * noise, states, dtype)
        assert not probe.same_states(states + fault * noise, states, dtype)
