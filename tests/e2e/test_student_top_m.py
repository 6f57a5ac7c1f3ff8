"""The student's own most probable tokens, scored by a served teacher."""

import numpy as np
import pytest
import torch

from student_trainer.config.arguments import ModelArguments
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence, generalized_jsd, sparse_generalized_jsd
from student_trainer.model.forward import install_sparse_loss
from student_trainer.model.load import load_model as load_student
from student_trainer.model.top_tokens import TopTokenProposals
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.e2e.test_distillation import (
    METHODS,
    assert_same_weights,
    distill,
    flags,
    history,
)
from tests.support.reference import dense_logprobs, load_model
from tests.support.trainer_process import train_on_two_ranks

VOCAB_SIZE = 260


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return [
        Sample(
            rng.integers(0, VOCAB_SIZE, length).astype(np.uint32), 3, np.ones(length - 3, bool),
            "student",
        )
        for length in (9, 5)
    ]  # fmt: skip


def test_the_joined_support_is_exact_and_brings_the_divergence_nearer_to_dense(world, samples):
    student = load_student(ModelArguments(str(world.student)))
    own = load_model(world.student)
    install_sparse_loss(student)
    dense = np.concatenate(
        [dense_logprobs(load_model(world.teacher), s.token_ids, 3, 1.0) for s in samples]
    )
    logits = np.concatenate([dense_logprobs(own, s.token_ids, 3, 1.0) for s in samples])
    errors = []
    with SparseGkdTeacher([world.url]) as client:
        client.connect()
        for count in (0, 8, VOCAB_SIZE - 4):  # the last: 256 ids, the server's limit
            requested = None
            if count:
                propose = TopTokenProposals(
                    student, count=count, vocab_size=VOCAB_SIZE, pad_token_id=0, batch_size=2
                )
                requested = propose(samples)
            scores = client.score(
                [(s.token_ids, s.completion_start) for s in samples],
                ScoreOptions(8), requested=requested,
            )  # fmt: skip
            scored = [
                ScoredSample(s, score, None if requested is None else requested[i])
                for i, (s, score) in enumerate(zip(samples, scores, strict=True))
            ]
            teacher = sparse_distribution(scored, VOCAB_SIZE)
            hidden = []
            for row, ids in enumerate(teacher.token_ids.numpy()):
                named = ids[ids >= 0]
                assert len(set(named.tolist())) == len(named)
                assert set(np.argsort(-logits[row])[:count].tolist()) <= set(named.tolist())
                found = teacher.logprobs[row].numpy()[ids >= 0]
                np.testing.assert_allclose(found, dense[row, named], atol=1e-5)
                tail = np.exp(np.delete(dense[row], named)).sum()
                assert float(teacher.tail_logprob[row].exp()) == pytest.approx(tail, abs=1e-6)
                hidden.append(
                    _reverse_kl_within(np.delete(logits[row], named), np.delete(dense[row], named))
                )
            student_logits = torch.from_numpy(logits)
            exact = generalized_jsd(student_logits, torch.from_numpy(dense), Divergence(1.0))
            sparse = sparse_generalized_jsd(student_logits, teacher, Divergence(1.0)).loss
            # The chain rule: what is missing is the divergence within the tail, no more.
            np.testing.assert_allclose((exact - sparse).numpy(), hidden, atol=1e-5)
            errors.append(float((exact - sparse).mean() / exact.mean()))
    assert 0 < errors[2] < errors[1] < errors[0]


def _reverse_kl_within(log_q, log_p):
    """Q_τ·KL(Q(·|τ)‖P(·|τ)) of one row, from the log-probs of all tokens of the tail."""
    log_q, log_p = log_q.astype(np.float64), log_p.astype(np.float64)
    q_tail, p_tail = np.exp(log_q).sum(), np.exp(log_p).sum()
    return float((np.exp(log_q) * (log_q - log_p)).sum() - q_tail * np.log(q_tail / p_tail))


@pytest.mark.parametrize("method", METHODS)
def test_training_with_the_students_own_tokens_lowers_the_divergence(world, tmp_path, method):
    code = distill(
        world, tmp_path, beta=1, request_student_top_m=8, max_steps=20,
        eval_dataset_name=world.held_out, eval_strategy="steps", eval_steps=20,
        eval_on_start="true", **METHODS[method],
    )  # fmt: skip
    assert code == 0
    divergences = [e["eval/divergence"] for e in history(tmp_path) if "eval/divergence" in e]
    assert divergences[1] < 0.9 * divergences[0]


def test_the_students_own_tokens_hold_more_of_its_mass(world, tmp_path):
    """They are the default for reverse KL alone."""
    masses = []
    for options in ({}, {"beta": 1, "request_student_top_m": 0}, {"beta": 1},
                    {"request_student_top_m": 16}):  # fmt: skip
        output = tmp_path / str(len(masses))
        assert distill(world, output, lmbda=1, max_steps=1, **options) == 0
        masses.append(history(output)[0]["train/student_top_k_mass"])
    assert masses[0] == pytest.approx(masses[1], abs=1e-6)
    assert masses[2] == pytest.approx(masses[3], abs=1e-6)
    assert masses[2] > masses[0] + 0.1


@pytest.mark.parametrize("method", ["SeqKD", "on-policy GKD"])
def test_two_processes_with_requested_ids_equal_one(world, tmp_path, method):
    options = {
        **METHODS[method], "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0,
        "request_student_top_m": 8, "beta": 1,
    }  # fmt: skip
    assert distill(world, tmp_path / "one", **options) == 0
    options["per_device_train_batch_size"] = 4
    words = flags(
        world, tmp_path / "two", teacher_url=world.url, top_k_logprobs=16, max_steps=4, **options
    )
    train_on_two_ranks(["distill", *words])
    assert_same_weights(tmp_path / "one", tmp_path / "two", tolerance=5e-5)


def test_more_ids_than_the_teacher_takes_are_refused_before_training(world, tmp_path, capsys):
    assert distill(world, tmp_path / "out", request_student_top_m=257) == 2
    assert "--request_student_top_m 257 is over the teacher's limit of" in capsys.readouterr().err
