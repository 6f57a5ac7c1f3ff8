"""The dense divergence as the paper writes it, differentiated by autograd."""

from __future__ import annotations

import math

import torch

from student_trainer.losses.deprecated import former_parameters
from student_trainer.losses.divergence import Divergence


@former_parameters
def generalized_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    divergence: Divergence,
) -> torch.Tensor:
    """Return the generalized Jensen-Shannon divergence over the full vocabulary.

    D_β = β·KL(P‖M) + (1−β)·KL(Q‖M) with M = βP + (1−β)Q, P the teacher and Q the student at the
    temperature; D_0 = KL(P‖Q) and D_1 = KL(Q‖P). There is no T² factor. D is discontinuous at
    both ends: near 0 and 1 the interior form tends to 0.

    Args:
        student_logits: [N, V], any floating dtype; the arithmetic is float32 at least.
        teacher_logits: [N, V].
        divergence: its temperature divides both logits; every token is in the support, so its tail
            makes no difference.

    Returns:
        [N], nats.

    Raises:
        ValueError: shapes differ.

    Source: GKD, arXiv 2306.13649, section 2 and appendix A.
    """
    beta, temperature = divergence.beta, divergence.temperature
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        raise ValueError(
            f"student and teacher logits must both be [N, V], got {list(student_logits.shape)} "
            f"and {list(teacher_logits.shape)}"
        )
    dtype = compute_dtype(student_logits)
    log_q = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)  # [N, V]
    log_p = torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)  # [N, V]
    if beta == 0.0:
        return _kl(log_p, log_q)
    if beta == 1.0:
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """Return KL(A‖B) [N], computed as c + Σ A·(log A/B − c) with c = log A/B of A's heaviest token.

    This equals Σ A·(log A/B) because Σ A = 1, and its gradient does not cancel where c is large.
    """
    ratio = log_a - log_b
    c = ratio.detach().gather(1, log_a.argmax(dim=-1, keepdim=True))  # [N, 1]
    c = torch.where(c.isfinite(), c, 0.0)
    return c[:, 0] + (log_a.exp() * (ratio - c)).sum(dim=-1)
