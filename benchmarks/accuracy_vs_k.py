"""The error of the sparse divergence against k: its value and gradient beside the dense ones.

    python -m benchmarks.accuracy_vs_k --quick
    python -m benchmarks.accuracy_vs_k --real MODEL --layers 12 --data DATA   # a published model

Two kinds of rows: synthetic peaked distributions over 152k tokens, and what a locally trained
student writes, scored densely by its teacher at several points of the student's training. For
k = 1 to 512, five betas, three supports and three treatments of the tail: the relative error of the
mean divergence, and cosine and norm ratio of the gradient with respect to the student's logits, of
all rows together, all in float64. For beta 0 also what k draws from the teacher give: `SAMPLED`.
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import accuracy_real
from benchmarks.accuracy_real import BETAS, STUDENT_TOP_M
from benchmarks.harness import argument_parser, print_report, set_threads
from student_trainer.config.arguments import DataArguments, ModelArguments
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.rows import load_rows
from student_trainer.data.tokenize import tokenize_rows
from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    Tail,
    generalized_jsd,
    sparse_generalized_jsd,
)
from student_trainer.model.load import load_model, load_stop_ids, load_tokenizer
from student_trainer.reporting.svg import write_chart
from student_trainer.rollouts import RolloutRequest, TransformersRollouts

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SUPPORTS = {
    "top-k": "the teacher's top-k",
    "default": "the teacher's top-k and the next token",
    "requested": f"those and the student's top-{STUDENT_TOP_M}",
}
SAMPLED = "sampled"  # k draws from the teacher in place of its top-k; for beta 0 alone
TAILS = ("bucket", "renormalize", "truncate")
STUDENTS = {
    "untrained": "student_init",
    "warmed up": "student_before",
    "after SFT": "student_sft",
    "distilled": "student_distilled",
}
NOTES = (
    "error: |sparse − dense| / dense of the mean divergence. cosine, norm ratio: of the gradient "
    "with respect to the student's logits, sparse against dense. summed: the cosine after adding "
    "up the rows, that of a bias on the logits, where independent errors average out.",
    "tails: bucket is one more outcome; renormalize rescales both sides over the support; truncate "
    "sums over the support alone. The table shows the bucket; --csv writes every number.",
    f"supports: default is top-k and next token; requested adds the student's top {STUDENT_TOP_M}; "
    "sampled is k draws from the teacher, without bias.",
)


@dataclass(frozen=True)
class Case:
    """The rows of one student and its teacher, both dense; ``next_ids`` were sampled.

    Attributes:
        student, teacher: [N, V] float64 logits.
        next_ids: [N] int64.
    """

    name: str
    student: torch.Tensor
    teacher: torch.Tensor
    next_ids: torch.Tensor


@dataclass(frozen=True)
class Result:
    """One combination of rows, beta, support, tail and k, and how near it is to the dense one."""

    case: str
    beta: float
    support: str
    tail: str
    k: int
    relative_error: float
    gradient_cosine: float
    gradient_norm_ratio: float
    summed_cosine: float
    teacher_mass: float
    student_mass: float


def synthetic(rows: int, *, own_favourites: int, vocab_size: int = 151_936) -> Case:
    """Make Zipf-like teachers of different peakedness, and students that are noisy copies.

    With ``own_favourites`` each student holds half of its mass on so many random tokens that the
    teacher ranks anywhere: what reverse KL has to take away.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float64).log()
    slopes = torch.linspace(1.1, 3.0, rows, dtype=torch.float64)  # log-prob falls with log-rank
    teacher = torch.empty(rows, vocab_size, dtype=torch.float64)
    for row, slope in zip(teacher, slopes, strict=True):
        row.copy_((-slope * ranks)[torch.randperm(vocab_size, generator=generator)])
    student = teacher + torch.randn(teacher.shape, generator=generator, dtype=torch.float64)
    if own_favourites:
        favourites = torch.randint(vocab_size, (rows, own_favourites), generator=generator)
        level = student.logsumexp(dim=-1, keepdim=True) - math.log(own_favourites)
        student.scatter_(1, favourites, level.expand(-1, own_favourites))
    next_ids = torch.multinomial(student.softmax(-1), 1, generator=generator)[:, 0]
    name = "synthetic, own favourites" if own_favourites else "synthetic"
    return Case(name, student, teacher, next_ids)


@dataclass(frozen=True)
class Written:
    """Completions [T] that a student sampled for held-out prompts [P], and both models."""

    student: Any
    teacher: Any
    texts: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]]

    def case(self, name: str) -> Case:
        """Return the logits of both models at the completions' positions."""
        ids = [(np.concatenate(text), len(text[0])) for text in self.texts]
        ours, theirs = (
            torch.cat([_rows(model, *text) for text in ids])
            for model in (self.student, self.teacher)
        )
        written = np.concatenate([completion for _, completion in self.texts])
        return Case(name, ours, theirs, torch.from_numpy(written.astype(np.int64)))


def sampled_by(folder: Path, name: str, prompts: int) -> Written:
    """Return completions that the student ``name`` of a quickstart folder samples."""
    student_folder, teacher_folder = folder / STUDENTS[name], folder / "teacher_sft"
    arguments = ModelArguments(str(student_folder))
    tokenizer = load_tokenizer(arguments)
    stop_ids = load_stop_ids(arguments, tokenizer)
    rows = load_rows(str(folder / "held_out.jsonl"), config=None, split="train")[:prompts]
    examples = tokenize_rows(
        rows, RowTokenizer(tokenizer, tuple(stop_ids), DataArguments(), 1 << 20)
    )
    student = load_model(arguments)
    teacher = load_model(ModelArguments(str(teacher_folder)))
    engine = TransformersRollouts(
        student,
        stop_ids=stop_ids,
        pad_token_id=stop_ids[0],
        max_new_tokens=40,
        temperature=1.0,
        batch_size=None,
        vocab_size=len(tokenizer),
    )
    requests = [RolloutRequest(e.prompt_ids, ("accuracy", e.index)) for e in examples]
    texts = [
        (examples[index].prompt_ids, rollout.token_ids)
        for group in engine.generate(requests)
        for index, rollout in group
    ]
    return Written(student, teacher, texts)


@torch.no_grad()
def _rows(model: Any, token_ids: NDArray[np.uint32], start: int) -> torch.Tensor:
    logits = model.eval()(torch.from_numpy(token_ids.astype(np.int64))[None]).logits
    completion: torch.Tensor = logits[0, start - 1 : -1].double()
    return completion


def support_of(
    case: Case, k: int, support: str, proposed: torch.Tensor | None = None
) -> SparseDistribution:
    """Return the exact sparse teacher of a case; no id twice.

    Args:
        proposed: ids [N, m] that "requested" adds; default the student's most probable ones.
    """
    ids = case.teacher.topk(k, dim=-1).indices
    if support != "top-k":
        ids = torch.cat([ids, case.next_ids[:, None]], dim=1)
    if support == "requested":
        own = case.student.topk(STUDENT_TOP_M, dim=-1).indices if proposed is None else proposed
        ids = torch.cat([ids, own], dim=1)
    ids = ids.sort(dim=1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    log_p = case.teacher.log_softmax(dim=-1)
    tail = log_p.scatter(1, ids, -math.inf).logsumexp(dim=-1)
    return SparseDistribution(ids.masked_fill(repeated, -1), log_p.gather(1, ids), tail)


def sampled(case: Case, k: int, seed: int = 0) -> SparseDistribution:
    """Return the estimate from k draws of each row: see `student_trainer.pipeline.targets`."""
    log_p = case.teacher.log_softmax(dim=-1)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(log_p.exp(), k, replacement=True, generator=generator)
    counts = torch.zeros_like(log_p).scatter_add(
        1, draws, torch.ones_like(draws, dtype=log_p.dtype)
    )
    ids = draws.sort(dim=1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    log_shares = (counts / k).log().gather(1, draws)  # of each draw: their mean is −entropy
    offset = (log_p.gather(1, draws) - log_shares).mean(dim=1)
    tail = torch.full_like(offset, -math.inf)
    shares = (counts / k).gather(1, ids).log()
    return SparseDistribution(ids.masked_fill(repeated, -1), shares, tail, offset)


def truncated(logits: torch.Tensor, teacher: SparseDistribution, beta: float) -> torch.Tensor:
    """Return the definition summed over the support alone, as some systems do."""
    valid = teacher.token_ids >= 0
    log_q = logits.log_softmax(dim=-1).gather(1, teacher.token_ids.clamp_min(0))
    log_p = teacher.logprobs
    p, q = (side.exp() * valid for side in (log_p, log_q))
    if beta == 0.0:
        return (p * (log_p - log_q)).sum(1)
    if beta == 1.0:
        return (q * (log_q - log_p)).sum(1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * p * (log_p - log_m) + (1.0 - beta) * q * (log_q - log_m)).sum(1)


def study(
    case: Case, ks: Sequence[int], supports: Sequence[str], tails: Sequence[str]
) -> Iterator[Result]:
    """Yield the result of every combination of one case."""
    teachers = {(k, s): support_of(case, k, s) for k in ks for s in supports}
    drawn = {(k, SAMPLED): sampled(case, k) for k in ks}
    logits = case.student.clone().requires_grad_()
    for beta in BETAS:
        dense = generalized_jsd(logits, case.teacher, Divergence(beta))
        (exact,) = torch.autograd.grad(dense.sum(), logits)
        value = float(dense.detach().mean())
        for (k, support), teacher in (teachers | (drawn if beta == 0.0 else {})).items():
            masses = _masses(logits.detach(), teacher)
            for tail in ("bucket",) if support == SAMPLED else tails:
                rows = _sparse(logits, teacher, beta, tail)
                (gradient,) = torch.autograd.grad(rows.sum(), logits)
                norm = float(gradient.norm())
                whole = cosine(gradient, exact)
                summed = cosine(gradient.sum(dim=0), exact.sum(dim=0))
                error = abs(float(rows.detach().mean()) - value) / value
                ratio = norm / float(exact.norm())
                yield Result(
                    case.name, beta, support, tail, k, error, whole, ratio, summed, *masses
                )


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the cosine of two tensors of one shape."""
    return float((one * other).sum()) / (float(one.norm()) * float(other.norm()) + 1e-300)


def _sparse(
    logits: torch.Tensor, teacher: SparseDistribution, beta: float, tail: str
) -> torch.Tensor:
    if tail == "truncate":
        return truncated(logits, teacher, beta)
    kind: Tail = "bucket" if tail == "bucket" else "renormalize"
    return sparse_generalized_jsd(logits, teacher, Divergence(beta, tail=kind)).loss


def _masses(logits: torch.Tensor, teacher: SparseDistribution) -> tuple[float, float]:
    statistics = sparse_generalized_jsd(logits, teacher, Divergence()).statistics
    masses = (statistics.teacher_support_mass, statistics.student_support_mass)
    return float(masses[0].mean()), float(masses[1].mean())


def figures(results: Sequence[Result]) -> dict[str, float]:
    """Return the worst of all betas at k = 64, tail as a bucket.

    The trained pair on the support that training takes by default at each beta; then other rows and
    supports, with a prefix.
    """
    trained = [name for name in STUDENTS if name != "untrained"]
    groups = {
        "": (None, trained),
        "unrequested_": ("default", trained),
        "untrained_": ("default", ["untrained"]),
        "synthetic_": ("default", ["synthetic"]),
        "own_favourites_": ("default", ["synthetic, own favourites"]),
        "requested_": ("requested", trained),
    }
    found: dict[str, float] = {}
    for prefix, (support, cases) in groups.items():
        kept = [
            r
            for r in results
            if (r.k, r.tail) == (64, "bucket")
            and r.support == (support or ("requested" if r.beta == 1.0 else "default"))
            and r.case in cases
        ]
        found[f"{prefix}min_gradient_cosine_at_64"] = min(r.gradient_cosine for r in kept)
        found[f"{prefix}max_relative_error_at_64"] = max(r.relative_error for r in kept)
    return {name: round(value, 6) for name, value in found.items()}


def plot(results: Sequence[Result], folder: Path) -> None:
    """Draw 1 − cosine against k: by tail, by support, and by point of training."""

    def lines(**fixed: Any) -> list[tuple[float, float]]:
        return [
            (r.k, max(1.0 - r.gradient_cosine, 1e-15))
            for r in results
            if all(getattr(r, name) == value for name, value in fixed.items())
        ]

    for case, name in (
        ("synthetic", "synthetic, V = 152k"),
        ("warmed up", "trained pair, warmed up"),
    ):
        stem = case.replace(" ", "-")
        for beta, what in ((0.0, "forward KL"), (0.5, "JSD"), (1.0, "reverse KL")):
            write_chart(
                folder / f"gradient-by-tail-{stem}-{beta:g}.svg",
                f"1 − gradient cosine, {what}, {name}",
                "k",
                {t: lines(case=case, beta=beta, support="default", tail=t) for t in TAILS},
                floor=1e-6,
            )
    for case, name in (
        ("synthetic, own favourites", "student with favourites of its own"),
        ("distilled", "trained pair, distilled"),
    ):
        write_chart(
            folder / f"gradient-by-support-{case.split(',')[0]}.svg",
            f"1 − gradient cosine, reverse KL, {name}",
            "k",
            {s: lines(case=case, beta=1.0, support=s, tail="bucket") for s in SUPPORTS},
            floor=1e-6,
        )
    write_chart(
        folder / "gradient-by-training.svg",
        "1 − gradient cosine, reverse KL, default support, tail as a bucket",
        "k",
        {name: lines(case=name, beta=1.0, support="default", tail="bucket") for name in STUDENTS},
        floor=1e-6,
    )


def make_quickstart(folder: Path) -> None:
    """Run the quickstart into ``folder`` unless it has been."""
    if not (folder / STUDENTS["distilled"] / "config.json").exists():
        subprocess.run(
            [sys.executable, "-m", "examples.mini_humaneval.quickstart", f"--output_dir={folder}"],
            check=True, stdout=sys.stderr,
        )  # fmt: skip


def main() -> None:
    parser = argument_parser(
        __doc__, quick="fewer rows, k = 16 and 64, two supports, bucket", threads=0
    )
    parser.add_argument(
        "--run_folder",
        type=Path,
        default=Path("runs/quickstart"),
        help="of examples.mini_humaneval.quickstart, which is run first where it is missing",
    )
    parser.add_argument("--csv", type=Path, help="write every number")
    parser.add_argument("--plots", type=Path, help="folder for SVG files")
    real = parser.add_argument_group("a published model, see benchmarks.accuracy_real")
    real.add_argument("--real", type=Path, metavar="MODEL", help="folder of the teacher")
    real.add_argument("--layers", type=int, default=12, help="of it that the student keeps")
    real.add_argument("--data", type=Path, help="folder of HumanEval and GSM8K")
    real.add_argument("--output_dir", type=Path, default=Path("runs/accuracy_real"))
    real.add_argument("--texts", type=int, default=2, help="of each kind")
    real.add_argument("--ks", type=int, nargs="+", default=accuracy_real.KS, help="64 among them")
    real.add_argument(
        "--temperatures", type=float, nargs="+", default=accuracy_real.TEMPERATURES,
        help="1 among them",
    )  # fmt: skip
    real.add_argument(
        "--heal_steps", type=int, default=24, help="of forward KL, for a second state"
    )
    arguments = parser.parse_args()
    if arguments.plots and arguments.quick:
        parser.error("--plots needs all k and supports: drop --quick")
    if arguments.real and not arguments.data:
        parser.error("--real needs --data, a folder with HumanEval.jsonl.gz and gsm8k_*.jsonl")
    set_threads(arguments.threads)
    if arguments.real:
        accuracy_real.run(
            arguments.real, arguments.layers, arguments.data, arguments.output_dir,
            steps=arguments.heal_steps, texts_a_kind=arguments.texts, quick=arguments.quick,
            ks=arguments.ks, temperatures=arguments.temperatures,
        )  # fmt: skip
        return
    make_quickstart(arguments.run_folder)
    prompts, rows = (8, 4) if arguments.quick else (32, 12)
    ks = (16, 64) if arguments.quick else KS
    supports = ("default", "requested") if arguments.quick else tuple(SUPPORTS)
    tails = ("bucket",) if arguments.quick else TAILS
    cases = [synthetic(rows, own_favourites=count) for count in (0, 8)]
    cases += [sampled_by(arguments.run_folder, name, prompts).case(name) for name in STUDENTS]
    results = [result for case in cases for result in study(case, ks, supports, tails)]
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(results[0])))
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)
    if arguments.plots:
        plot(results, arguments.plots)
    shown = [
        r
        for r in results
        if r.support in ("default", SAMPLED) and r.tail == "bucket" and r.k in (16, 64, 256)
    ]
    print_report(
        "Sparse against dense divergence, tail as a bucket",
        ["rows", "beta", "support", "k", "error", "cosine", "norm ratio", "summed", "P on it",
         "Q on it"],
        [
            [r.case, f"{r.beta:g}", r.support, r.k, f"{r.relative_error:.2e}",
             f"{r.gradient_cosine:.5f}", r.gradient_norm_ratio, f"{r.summed_cosine:.5f}",
             f"{r.teacher_mass:.4f}",
             f"{r.student_mass:.4f}"]
            for r in shown
        ],
        {
            "benchmark": "accuracy_vs_k",
            **figures(results),
            "rows": sum(len(case.student) for case in cases),
            "quick": arguments.quick,
        },
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
