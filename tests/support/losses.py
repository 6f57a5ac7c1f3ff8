"""The helpers of the divergences' tests: exact sparse teachers and the plain definition."""

import math

import torch

from student_trainer.losses import LossOutput, SparseDistribution, sparse_generalized_jsd

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TAILS = ["bucket", "renormalize"]


def top_k(teacher_logits, k, temperature=1.0):
    """Return the exact sparse teacher of full logits."""
    logprobs = torch.log_softmax(teacher_logits / temperature, dim=-1)
    values, ids = logprobs.topk(k, dim=-1)
    rest = logprobs.scatter(1, ids, -math.inf)
    return SparseDistribution(ids, values, rest.logsumexp(dim=-1))


def plain(logits, teacher, divergence):
    """Return the divergence by its definition, row by row over explicit outcomes, for autograd."""
    beta, temperature, tail = divergence.beta, divergence.temperature, divergence.tail
    values = []
    for row, ids, logprobs, tail_logprob in zip(
        logits, teacher.token_ids, teacher.logprobs, teacher.tail_logprob, strict=True
    ):
        q_all = torch.log_softmax(row / temperature, dim=-1)
        ids, log_p = ids[ids >= 0], logprobs[ids >= 0]
        log_q = q_all[ids]
        if tail == "renormalize":
            log_p, log_q = log_p.log_softmax(dim=-1), log_q.log_softmax(dim=-1)
        elif len(ids) < len(row):
            others = [v for v in range(len(row)) if v not in ids.tolist()]
            log_p = torch.cat([log_p, tail_logprob[None]])
            log_q = torch.cat([log_q, q_all[others].logsumexp(dim=0, keepdim=True)])
        p, q = log_p.exp(), log_q.exp()
        if beta == 0.0:
            values.append((p * (log_p - log_q)).sum())
        elif beta == 1.0:
            values.append((q * (log_q - log_p)).sum())
        else:
            log_m = (beta * p + (1 - beta) * q).log()
            first, second = (p * (log_p - log_m)).sum(), (q * (log_q - log_m)).sum()
            values.append(beta * first + (1 - beta) * second)
    return torch.stack(values)


def value_and_gradient(logits, teacher, divergence, function=sparse_generalized_jsd, **arguments):
    logits = logits.detach().requires_grad_()
    value = function(logits, teacher, divergence, **arguments)
    if isinstance(value, LossOutput):
        value = value.loss
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance, equal_nan=True)
