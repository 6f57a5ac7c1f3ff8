"""The trainer with vLLM's own server as teacher: the same loss as with ours, on the same model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shared.protocol import ScoreSequence
from student_trainer.commands.main import main
from student_trainer.teacher.base import Sampling, ScoreOptions
from student_trainer.teacher.vllm import VllmTeacher
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import dense_logprobs, largest_error, load_model
from tests.support.server import running_server, running_stock_vllm
from tests.support.vllm import VLLM

pytestmark = VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher whose heads vLLM's attention on CPU takes; its output layer is padded.

    As with real models, padding is never the most probable token: the student has no such ids.
    """
    folder = tmp_path_factory.mktemp("teacher")
    save_tokenizer(folder)
    save_model(
        folder, vocab_size=272, seed=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight[260:] = 0.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(folder):
    with running_stock_vllm(folder) as url:
        yield url


@pytest.fixture(scope="module")
def ours(folder):
    with running_server(folder) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("k", [1, 20])
def test_scores_are_those_of_a_plain_forward_pass(stock, folder, tokenizer, k):
    model = load_model(folder)
    rng = np.random.default_rng(0)
    sequences = [
        (rng.integers(0, 272, length).astype(np.uint32), start)
        for length, start in ((255, 3), (40, 39), (17, 1))
    ]
    with VllmTeacher([stock], tokenizer=tokenizer, rows=260, top_k=k, timeout=60) as teacher:
        info = teacher.connect()
        scored = teacher.score(sequences, ScoreOptions(k))
    assert (info.vocab_size, info.max_model_len) == (272, 255)
    for answer, (ids, start) in zip(scored, sequences, strict=True):
        sequence = ScoreSequence(token_ids=ids, completion_start=start)
        assert largest_error(answer, dense_logprobs(model, ids, start, 1.0), sequence) < 1e-4


def test_completions_are_greedy_or_repeat_with_their_seed(stock, folder, tokenizer):
    model = load_model(folder)
    prompts = [np.array([5, 6, 7], np.uint32), np.array([90], np.uint32)]
    cold = Sampling(max_new_tokens=12, temperature=0.0, seed=3, stop_token_ids=[1])
    warm = replace(cold, temperature=1.0)
    with VllmTeacher([stock], tokenizer=tokenizer, rows=260, top_k=1, timeout=60) as teacher:
        teacher.connect()
        greedy = teacher.generate(prompts, cold)
        sampled, again = (teacher.generate(prompts, warm) for _ in range(2))
        stop = int(greedy[0].token_ids[4])
        (stopped,) = teacher.generate(prompts[:1], replace(cold, stop_token_ids=[1, stop]))
    for prompt, completion in zip(prompts, greedy, strict=True):
        whole = np.append(prompt, completion.token_ids)
        best = dense_logprobs(model, whole, len(prompt), 1.0).argmax(axis=1)
        assert completion.token_ids.tolist() == best.tolist()
    assert [c.token_ids.tolist() for c in sampled] == [c.token_ids.tolist() for c in again]
    assert [c.token_ids.tolist() for c in sampled] != [c.token_ids.tolist() for c in greedy]
    first = greedy[0].token_ids.tolist().index(stop)
    assert stopped.token_ids.tolist() == greedy[0].token_ids.tolist()[: first + 1]
    assert stopped.finish_reason == "stop"


METHODS = {
    "supervised KD": {"lmbda": 0},
    "SeqKD": {"lmbda": 0, "seq_kd": "true"},
    "on-policy GKD": {"lmbda": 1},
}


def losses(world, output, **options):
    settings = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "output_dir": output,
        "max_new_tokens": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "max_steps": 4, "top_k_logprobs": 16, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": "true", **options,
    }  # fmt: skip
    assert main(["distill", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["train/loss"] for entry in history if "train/loss" in entry]


@pytest.mark.parametrize(
    ("method", "beta"), [("supervised KD", 0), ("SeqKD", 1), ("on-policy GKD", 0.5)]
)
def test_the_loss_is_that_of_our_own_server(world, stock, ours, tmp_path, method, beta):
    options = {"beta": beta, "request_student_top_m": 0, **METHODS[method]}
    theirs = losses(world, tmp_path / "vllm", teacher_url=stock, teacher_protocol="vllm", **options)
    own = losses(world, tmp_path / "own", teacher_url=ours, **options)
    assert len(theirs) == 4
    np.testing.assert_allclose(theirs, own, atol=1e-4, rtol=0)
    assert len(set(own)) == 4


def test_more_log_probs_than_it_serves_end_the_command_with_the_remedy(
    world, stock, tmp_path, capsys
):
    words = (
        f"--model_name_or_path={world.student} --dataset_name={world.rows} "
        f"--output_dir={tmp_path} --teacher_url={stock} --teacher_protocol=vllm "
        "--top_k_logprobs=64"
    ).split()
    assert main(["distill", *words]) == 2
    assert "--max-logprobs 64" in capsys.readouterr().err
