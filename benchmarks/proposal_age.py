"""The gradient with ids that older weights proposed, beside the dense one.

    python -m benchmarks.proposal_age --run_folder runs/quickstart

A student of the quickstart writes completions and proposes its most probable tokens at each
position. Then it trains on other completions, by dense reverse KL, and after some steps the sparse
gradient at the old completions is compared with the dense one: with the old proposals, with those
of the present weights, and without any. So it tells whether `--request_student_top_m` needs
proposals as fresh as the weights, or whether those that come with a completion will do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.accuracy_real import STUDENT_TOP_M
from benchmarks.accuracy_vs_k import (
    STUDENTS,
    Case,
    Written,
    cosine,
    make_quickstart,
    sampled_by,
    support_of,
)
from benchmarks.harness import Cell, Figure, argument_parser, print_report, set_threads
from student_trainer.losses import Divergence, generalized_jsd, sparse_generalized_jsd

AGES = (0, 1, 2, 4, 8)  # steps
BETAS = (0.5, 0.9, 1.0)
K = 64
NOTES = (
    f"cosine of the sparse gradient to the dense one, k = {K}, next token, tail as a bucket; the "
    f"student proposes {STUDENT_TOP_M} ids a position",
    "a step: AdamW, dense reverse KL on half of the completions; the other half is compared",
)


def cosines(case: Case, proposed: torch.Tensor, beta: float) -> dict[str, float]:
    """Return the gradient's cosine to the dense one by what is proposed: none, old or present."""
    logits = case.student.clone().requires_grad_()
    dense = generalized_jsd(logits, case.teacher, Divergence(beta)).sum()
    (exact,) = torch.autograd.grad(dense, logits)
    supports = {
        "none": support_of(case, K, "default"),
        "old": support_of(case, K, "requested", proposed),
        "present": support_of(case, K, "requested"),
    }
    found = {}
    for name, support in supports.items():
        sparse = sparse_generalized_jsd(logits, support, Divergence(beta)).loss.sum()
        (gradient,) = torch.autograd.grad(sparse, logits)
        found[name] = cosine(gradient, exact)
    return found


def train(written: Written, optimizer: torch.optim.Optimizer) -> None:
    """Make one step of dense reverse KL to the teacher on the completions."""
    loss = torch.zeros(())
    for prompt, completion in written.texts:
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
        student = written.student.train()(ids).logits[0, len(prompt) - 1 : -1]
        with torch.no_grad():
            teacher = written.teacher(ids).logits[0, len(prompt) - 1 : -1]
        loss = loss + generalized_jsd(student, teacher, Divergence(1.0)).sum()
    optimizer.zero_grad()
    (loss / sum(len(completion) for _, completion in written.texts)).backward()
    optimizer.step()


def main() -> None:
    parser = argument_parser(__doc__, quick="8 prompts, ages 0 and 1", threads=0)
    parser.add_argument(
        "--run_folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="of examples.mini_humaneval.quickstart, which is run first where it is missing",
    )
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="default 3e-3")
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    make_quickstart(arguments.run_folder)
    prompts, ages = (8, AGES[:2]) if arguments.quick else (64, AGES)
    rows: list[list[Cell]] = []
    summary: dict[str, Figure] = {"benchmark": "proposal_age"}
    for name in ("warmed up", "distilled"):
        torch.manual_seed(0)
        whole = sampled_by(arguments.run_folder, name, prompts)
        learned, compared = (
            Written(whole.student, whole.teacher, whole.texts[half::2]) for half in (0, 1)
        )
        proposed = compared.case(name).student.topk(STUDENT_TOP_M, dim=-1).indices
        optimizer = torch.optim.AdamW(whole.student.parameters(), lr=arguments.learning_rate)
        for age in range(max(ages) + 1):
            if age in ages:
                case = compared.case(name)
                for beta in BETAS:
                    found = cosines(case, proposed, beta)
                    rows.append([name, age, f"{beta:g}", *(f"{v:.5f}" for v in found.values())])
                    for kind, value in found.items():
                        summary[f"{kind}_{STUDENTS[name]}_beta{beta:g}_age{age}"] = round(value, 6)
            train(learned, optimizer)
    print_report(
        "Proposals of older weights",
        ["student", "steps", "beta", "none", "old", "present"],
        rows,
        summary,
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
