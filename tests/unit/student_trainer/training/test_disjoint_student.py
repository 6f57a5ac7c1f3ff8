"""A student that is disjoint from its teacher: one warning, where the divergence is flat."""

import logging
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from student_trainer.losses import Divergence, SparseDistribution, sparse_generalized_jsd
from student_trainer.training.disjoint_student import DisjointStudent, bound


def disjoint(beta, gap):
    """Return divergence, mass on the support and gradient norm of a student ``gap`` nats away."""
    log_p = torch.tensor([[0.0, 0.0] + [-30.0] * 62]).log_softmax(-1)
    logits = torch.tensor([[0.0, 0.0] + [gap] * 62], requires_grad=True)
    teacher = SparseDistribution(
        torch.tensor([[0, 1]]), log_p[:, :2], log_p[:, 2:].logsumexp(-1)
    )  # fmt: skip
    found = sparse_generalized_jsd(logits, teacher, Divergence(beta))
    (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
    statistics = found.statistics
    return (
        float(found.loss.detach()), float(statistics.student_support_mass), float(gradient.norm())
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_between_the_ends_a_disjoint_student_is_at_the_bound_without_a_gradient(beta):
    divergence, mass, norm = disjoint(beta, 12.0)
    assert divergence == pytest.approx(bound(beta), rel=1e-3)
    assert mass < 1e-6
    assert norm < 1e-4
    assert disjoint(0.0, 12.0)[2] > 0.5  # forward KL
    assert bound(0.5) == pytest.approx(math.log(2))


def test_reverse_kl_of_a_disjoint_student_has_no_gradient_either():
    assert disjoint(1.0, 12.0)[2] < 1e-4


def log(callback, tmp_path, mass, divergence, *, main=True, step=1):
    logs = {"train/student_top_k_mass": mass, "train/divergence": divergence,
            "teacher/top_k_mass": 0.95}  # fmt: skip
    state = TrainerState(global_step=step, is_world_process_zero=main)
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    callback.on_log(arguments, state, TrainerControl(), logs={"train/truncated": 1.0})
    callback.on_log(arguments, state, TrainerControl(), logs=logs)


@pytest.mark.parametrize(
    ("beta", "mass", "divergence", "told"),
    [
        (0.5, 5e-8, 0.69, True),
        (0.5, 0.3, 0.6, True),  # its own token, which is in the support, has its mass
        (0.5, 0.3, 0.4, False),
        (0.1, 0.01, 0.1, True),
        (1.0, 0.01, 4.4, True),
        (1.0, 0.3, 4.4, False),
        (0.0, 5e-8, 22.0, False),  # forward KL
    ],
)
def test_it_is_said_where_the_divergence_is_flat(beta, mass, divergence, told, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        log(DisjointStudent(beta), tmp_path, mass, divergence)
    assert [record.message for record in caplog.records] == [
        f"step 1: the student shares few tokens with its teacher (probability {mass:.2g} on the "
        f"teacher's support, divergence {divergence:.3g}), and --beta {beta:g} has little "
        "gradient there: start with --beta 0, and go on from its result"
    ] * told


def test_it_is_said_of_the_first_window_alone_and_by_one_process(tmp_path, caplog):
    callback = DisjointStudent(0.5)
    with caplog.at_level(logging.WARNING):
        log(callback, tmp_path, 0.5, 0.2)
        log(callback, tmp_path, 1e-6, 0.69, step=2)
        log(DisjointStudent(0.5), tmp_path, 1e-6, 0.69, main=False)
    assert not caplog.records
