"""The error that log-probs in float16 make in the divergence and its gradient.

    python -m benchmarks.logprob_dtype --quick
    python -m benchmarks.logprob_dtype

The rows of `benchmarks.accuracy_vs_k`, k = 64, next token and the student's top 16 requested. Each
teacher answers in float32 and in float16, and its answers become a `SparseDistribution` as the
trainer makes them. Compared are the mean divergence, the gradient with respect to the student's
logits, all rows together, and the divergence of the teacher to itself, which should be 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.accuracy_real import STUDENT_TOP_M
from benchmarks.accuracy_vs_k import Case, sampled_by, synthetic
from benchmarks.harness import argument_parser, print_report, set_threads
from shared.sparse import SparseLogprobs
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence, SparseDistribution, sparse_generalized_jsd
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution

K = 64
BETAS = (0.0, 0.5, 1.0)
NOTES = (
    "rounded: float16 as it is; normalized: then made to sum to one, as the trainer does.",
    "error: |float16 − float32| / float32 of the mean divergence; gradient: the same of its norm; "
    "to itself: largest |D(P‖P)| of a row, in float32 arithmetic; it would be 0 in exact numbers.",
)


@dataclass(frozen=True)
class Result:
    """One comparison of float16 with float32."""

    case: str
    beta: float
    sent: str
    error: float
    gradient_error: float
    gradient_cosine_gap: float
    to_itself: float


def answers(case: Case) -> dict[str, SparseDistribution]:
    """Return the teacher as it arrives, by how its log-probs travelled."""
    log_p = case.teacher.log_softmax(dim=-1)
    top = log_p.topk(K, dim=-1)
    requested = case.student.topk(STUDENT_TOP_M, dim=-1).indices
    named = torch.cat([top.indices, case.next_ids[:, None], requested], dim=1)
    exact = SparseLogprobs(
        token_ids=top.indices.numpy().astype(np.uint32),
        logprobs=top.values.float().numpy(),
        next_token_logprob=log_p.gather(1, case.next_ids[:, None])[:, 0].float().numpy(),
        tail_logprob=log_p.scatter(1, named, -math.inf).logsumexp(dim=-1).float().numpy(),
        requested_logprobs=log_p.gather(1, requested).float().numpy(),
    )
    return {
        "float32": _arrived(case, exact, requested),
        "rounded": _arrived(case, _as(_as(exact, np.float16), np.float32), requested),
        "normalized": _arrived(case, _as(exact, np.float16), requested),
    }


def _as(scores: SparseLogprobs, dtype: type[np.floating]) -> SparseLogprobs:
    assert scores.requested_logprobs is not None
    return scores.model_copy(
        update={
            "logprobs": scores.logprobs.astype(dtype),
            "requested_logprobs": scores.requested_logprobs.astype(dtype),
        }
    )


def _arrived(case: Case, scores: SparseLogprobs, requested: torch.Tensor) -> SparseDistribution:
    rows, vocab_size = case.teacher.shape
    ids = np.append(0, case.next_ids.numpy()).astype(np.uint32)  # after a prompt of one token
    sample = Sample(ids, 1, np.ones(rows, dtype=bool), "dataset")
    scored = ScoredSample(sample, scores, requested.numpy().astype(np.uint32))
    return sparse_distribution([scored], vocab_size)


def compare(case: Case) -> Iterator[Result]:
    """Compare both float16 variants with float32, for each beta."""
    found = answers(case)
    student = case.student.float().requires_grad_()
    for beta in BETAS:
        value, gradient = _loss(student, found["float32"], beta)
        for sent in ("rounded", "normalized"):
            other, moved = _loss(student, found[sent], beta)
            itself = sparse_generalized_jsd(
                case.teacher.float(), found[sent], Divergence(beta)
            ).loss
            cosine = float((moved * gradient).sum() / (moved.norm() * gradient.norm()))
            yield Result(
                case.name,
                beta,
                sent,
                abs(other - value) / value,
                float((moved - gradient).norm() / gradient.norm()),
                1.0 - cosine,
                float(itself.abs().max()),
            )


def _loss(
    student: torch.Tensor, teacher: SparseDistribution, beta: float
) -> tuple[float, torch.Tensor]:
    rows = sparse_generalized_jsd(student, teacher, Divergence(beta)).loss
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return float(rows.detach().double().mean()), gradient.double()


def main() -> None:
    parser = argument_parser(
        __doc__, quick="the synthetic rows, 4 instead of 12; needs no run", threads=0
    )
    parser.add_argument(
        "--run_folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="of examples.mini_humaneval.quickstart, which must have run",
    )
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    rows = 4 if arguments.quick else 12
    cases = [synthetic(rows, own_favourites=count) for count in (0, 8)]
    if not arguments.quick:
        cases += [
            sampled_by(arguments.run_folder, name, 32).case(name)
            for name in ("warmed up", "distilled")
        ]
    results = [result for case in cases for result in compare(case)]
    kept = [result for result in results if result.sent == "normalized"]
    print_report(
        f"Log-probs as float16 against float32, k = {K}, student's top {STUDENT_TOP_M} requested",
        ["rows", "beta", "float16", "error", "gradient", "1 - cosine", "to itself"],
        [
            [r.case, f"{r.beta:g}", r.sent, f"{r.error:.1e}", f"{r.gradient_error:.1e}",
             f"{r.gradient_cosine_gap:.1e}", f"{r.to_itself:.1e}"]
            for r in results
        ],
        {
            "benchmark": "logprob_dtype",
            "max_relative_error": max(r.error for r in kept),
            "max_gradient_error": max(r.gradient_error for r in kept),
            "max_gradient_cosine_gap": max(r.gradient_cosine_gap for r in kept),
            "max_divergence_to_itself": max(r.to_itself for r in kept),
        },
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
