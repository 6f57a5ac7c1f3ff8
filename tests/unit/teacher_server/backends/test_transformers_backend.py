"""The backend on several families of models: the fast path equals the model's own logits."""

import asyncio
import logging
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from shared.errors import ConfigurationError, UnavailableError
from shared.protocol import ScoreSequence
from teacher_server.backends.base import GenerateJob, ScoreJob, ScoreOptions
from teacher_server.backends.transformers import TransformersBackend
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import dense_logprobs, largest_error, load_model


def backend(folder, **options):
    return TransformersBackend(Settings(str(folder), **options), Metrics())


def score_jobs(rng, vocab_size, lengths=(2, 9, 40, 17)):
    return [
        ScoreJob(
            rng.integers(0, vocab_size, length).astype(np.uint32),
            int(rng.integers(1, length)),
            top_k=int(rng.choice([1, 7, vocab_size])),
            temperature=float(rng.choice([0.5, 1.0, 2.0])),
        )
        for length in lengths
    ]


class Told:
    """Callers who all wait; remembers what each was told, in order."""

    def __init__(self, jobs):
        self.count, self.answers = len(jobs), {}

    def waiting(self):
        return [True] * self.count

    def answer(self, index, answer):
        assert index not in self.answers
        self.answers[index] = answer


def generated(served, jobs):
    callers = Told(jobs)
    served.generate_batch(jobs, callers)
    return [callers.answers[index] for index in range(len(jobs))]


def error_of(job, answer, model):
    dense = dense_logprobs(model, job.token_ids, job.completion_start, job.temperature)
    sequence = ScoreSequence(token_ids=job.token_ids, completion_start=job.completion_start)
    return largest_error(answer, dense, sequence)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25, "bos_token_id": 2}),
        ("qwen2", {"tie_word_embeddings": True, "vocab_size": 272}),
        ("mixtral", {"num_local_experts": 2}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "bos_token_id": 2}),
    ],
)
def test_scores_equal_the_models_own_logits(family, config, tmp_path, caplog):
    save_tokenizer(tmp_path)
    save_model(tmp_path, family=family, **config)
    with caplog.at_level(logging.WARNING, logger="teacher_server"):
        served = backend(tmp_path)
    assert "Unknown output layer" not in caplog.text
    assert served.facts.vocab_size == config.get("vocab_size", 260)
    model = load_model(tmp_path)
    jobs = score_jobs(np.random.default_rng(0), served.facts.vocab_size)
    for job, answer in zip(jobs, served.score_batch(jobs), strict=True):
        assert error_of(job, answer, model) < 1e-5


def test_an_unknown_output_layer_falls_back_to_the_models_own_logits(
    llama_folder, monkeypatch, caplog
):
    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 3.0
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with caplog.at_level(logging.WARNING, logger="teacher_server"):
        served = backend(llama_folder)
    assert "Unknown output layer" in caplog.text
    model = load_model(llama_folder)
    jobs = score_jobs(np.random.default_rng(1), 260)
    for job, answer in zip(jobs, served.score_batch(jobs), strict=True):
        assert error_of(job, answer, model) < 1e-5


def test_only_completion_rows_meet_the_head(llama_folder):
    served = backend(llama_folder)
    rows = []
    served._model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    jobs = [ScoreJob(np.arange(50, dtype=np.uint32), 45, top_k=2) for _ in range(3)]
    served.score_batch(jobs)
    assert sum(rows) == 15


def test_a_batch_of_unlike_lengths_takes_several_forward_passes(llama_folder):
    """As completions of unlike lengths that are scored together, which no batcher has grouped."""
    served = backend(llama_folder)
    shapes = []
    states = served._states
    served._states = lambda ids: shapes.append(tuple(ids.shape)) or states(ids)
    rng = np.random.default_rng(0)
    lengths = [20, 20, 110, 20, 24]
    jobs = [ScoreJob(rng.integers(0, 260, n).astype(np.uint32), 5, top_k=4) for n in lengths]
    model = load_model(llama_folder)
    for job, answer in zip(jobs, served.score_batch(jobs), strict=True):
        assert error_of(job, answer, model) < 1e-5
    assert shapes == [(1, 110), (4, 24)]


def test_no_more_logits_are_made_at_once_than_was_said(llama_folder):
    """1 MiB of float32 logits over 260 tokens would be 1,008 rows; 256 are enough for any head."""
    served = backend(llama_folder, score_chunk_mib=1)
    assert served._chunk_bytes == 1 << 20
    served._chunk_bytes = 3 * 4 * 260
    rows = []
    served._model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    served.score_batch([ScoreJob(np.arange(50, dtype=np.uint32), 42, top_k=2)])
    assert rows == [3, 3, 2]


def test_learned_positions_never_run_past_the_context(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path, family="gpt2", max_position_embeddings=16)
    served = backend(tmp_path)
    rng = np.random.default_rng(0)
    jobs = [
        GenerateJob(rng.integers(2, 260, prompt).astype(np.uint32), 16 - prompt, 1.0, 1.0, 0, (i,))
        for i, prompt in enumerate((13, 2, 8))
    ]
    together = generated(served, jobs)
    for job, completion in zip(jobs, together, strict=True):
        assert completion.token_ids.tolist() == generated(served, [job])[0].token_ids.tolist()


def test_a_completion_is_scored_as_the_score_call_would(llama_folder):
    served = backend(llama_folder)
    prompt = np.array([5, 6, 7], np.uint32)
    jobs = [
        GenerateJob(prompt, 6, 1.0, 1.0, 0, (1,), score=ScoreOptions(4, 2.0)),
        GenerateJob(prompt, 6, 1.0, 1.0, 0, (2,)),
    ]
    scored, plain = generated(served, jobs)
    assert plain.scores is None
    ids = np.concatenate([prompt, scored.token_ids])
    again = served.score_batch([ScoreJob(ids, 3, top_k=4, temperature=2.0)])[0]
    np.testing.assert_array_equal(scored.scores.token_ids, again.token_ids)
    np.testing.assert_allclose(scored.scores.tail_logprob, again.tail_logprob, atol=1e-5)


def test_a_completion_is_handed_out_while_others_are_written(llama_folder):
    """Plain ones with their last token, scored ones in a batch every eighth token."""
    served = backend(llama_folder)
    prompt = np.array([5, 6, 7], np.uint32)
    score = ScoreOptions(4)
    jobs = [
        GenerateJob(prompt, length, 1.0, 1.0, 0, (length,), score=wanted)
        for length, wanted in ((20, score), (3, score), (5, None), (7, score), (20, None))
    ]
    batches = []
    scores = served.score_batch
    served.score_batch = lambda asked: batches.append(len(asked)) or scores(asked)
    callers = Told(jobs)
    served.generate_batch(jobs, callers)
    assert list(callers.answers) == [2, 1, 3, 4, 0]
    assert batches == [2, 1]
    assert [len(callers.answers[i].token_ids) for i in range(5)] == [20, 3, 5, 7, 20]


def test_concurrent_calls_are_answered_and_close_refuses_the_rest(llama_folder):
    served = backend(llama_folder, max_batch_tokens=64)
    jobs = score_jobs(np.random.default_rng(2), 260, lengths=(5, 20, 33, 64, 11, 8))

    async def work():
        answers = await asyncio.gather(*map(served.score, jobs))
        late = asyncio.create_task(served.score(jobs[0]))
        await asyncio.sleep(0)
        await served.close()
        return answers, (await asyncio.gather(late, return_exceptions=True))[0]

    answers, late = asyncio.run(work())
    for job, answer in zip(jobs, answers, strict=True):
        assert error_of(job, answer, served._model) < 1e-5
    assert isinstance(late, UnavailableError)


def test_batches_over_the_memory_are_split_and_counted(llama_folder, monkeypatch):
    metrics = Metrics()
    served = TransformersBackend(Settings(str(llama_folder)), metrics)
    score = served.score_batch

    def score_two_at_most(jobs):
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(jobs)

    monkeypatch.setattr(served, "score_batch", score_two_at_most)
    jobs = score_jobs(np.random.default_rng(3), served.facts.vocab_size, lengths=(9,) * 8)

    async def scenario():
        answers = await asyncio.gather(*map(served.score, jobs))
        await served.close()
        return answers

    assert [len(answer) for answer in asyncio.run(scenario())] == [job.rows for job in jobs]
    value = metrics.registry.get_sample_value
    assert value("teacher_out_of_memory_total", {"kind": "score"}) == 3  # of 8, and of 4 twice
    assert value("teacher_out_of_memory_total", {"kind": "generate"}) == 0
    assert value("teacher_queue_seconds_count", {"kind": "score"}) == 8  # waited once each


@pytest.mark.parametrize("lost", [False, True])
def test_it_is_dead_once_its_device_is_lost(llama_folder, monkeypatch, lost):
    served = TransformersBackend(Settings(str(llama_folder)), Metrics())

    def fails(jobs):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def ones(*shape, **options):
        raise RuntimeError("CUDA error: context is destroyed")

    monkeypatch.setattr(served, "score_batch", fails)
    jobs = score_jobs(np.random.default_rng(3), served.facts.vocab_size, lengths=(9,))

    async def scenario():
        with monkeypatch.context() as patch:
            if lost:
                patch.setattr(torch, "ones", ones)
            await asyncio.gather(*map(served.score, jobs), return_exceptions=True)
        await served.close()

    assert served.alive
    asyncio.run(scenario())
    assert served.alive is not lost


def test_it_is_dead_while_a_batch_outlives_all_who_asked(llama_folder, monkeypatch):
    served = TransformersBackend(Settings(str(llama_folder), request_timeout=0.2), Metrics())
    score, hangs = served.score_batch, threading.Event()
    monkeypatch.setattr(served, "score_batch", lambda jobs: hangs.wait(30) and score(jobs))
    jobs = score_jobs(np.random.default_rng(3), served.facts.vocab_size, lengths=(9,))

    async def scenario():
        answer = asyncio.ensure_future(served.score(jobs[0]))
        await asyncio.sleep(0.1)
        seen = [served.alive]
        await asyncio.sleep(0.5)
        seen.append(served.alive)
        hangs.set()
        await answer
        for _ in range(500):  # the answer is out a moment before its thread has ended
            if not served.alive:
                await asyncio.sleep(0.01)
        seen.append(served.alive)
        await served.close()
        return seen

    assert asyncio.run(scenario()) == [True, False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_served_as_told(llama_folder, dtype):
    served = backend(llama_folder, dtype=dtype)
    assert served._model.dtype == getattr(torch, dtype)
    assert served.facts.teacher.dtype == dtype


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        backend(tmp_path)


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        ConfigurationError, match="does not load with AutoModelForCausalLM"
    ) as error:
        backend(tmp_path)
    assert "\n" not in str(error.value)


def test_a_context_over_the_models_is_refused(llama_folder):
    with pytest.raises(ConfigurationError, match=r"--max-model-len 65 is over the model's .* 64"):
        backend(llama_folder, max_model_len=65)
    assert backend(llama_folder, max_model_len=32).facts.max_model_len == 32


def test_a_missing_gpu_is_refused(llama_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="--device cuda: torch sees no GPU"):
        backend(llama_folder, device="cuda")


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_not_rounded_after_the_output_layer(
    llama_folder, monkeypatch, dtype, separable
):
    """Neither where completion rows alone meet it, nor in the model's own logits."""
    served = backend(llama_folder, dtype=dtype)
    assert served._split_head
    served._split_head = separable
    states = []
    decoder = served._model.get_decoder()
    decoder.register_forward_hook(lambda _, args, out: states.append(out.last_hidden_state))
    job = ScoreJob(np.arange(30, dtype=np.uint32), 10, top_k=260)
    [answer] = served.score_batch([job])
    exact = states[0][0, 9:29].double() @ served._model.lm_head.weight.double().T
    expected = exact.log_softmax(dim=-1).detach()
    found = torch.zeros(20, 260, dtype=torch.float64).scatter_(
        1, torch.from_numpy(answer.token_ids.astype(np.int64)),
        torch.from_numpy(answer.logprobs).double(),
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
