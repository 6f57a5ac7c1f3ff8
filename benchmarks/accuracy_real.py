"""The real rows of `benchmarks.accuracy_vs_k`: a published model and a student of its own layers.

Each state of the student is compared with the teacher on texts of code, arithmetic and prose: on
the reference completions and on what the student writes. The dense gradient over the vocabulary is
computed once a beta; sparse ones on the logits of the support and one more for the rest, whose
tokens all have one factor. So every k of a case costs little.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.harness import print_report
from benchmarks.plateau import PROMPT, ROWS, load, scored, student_of, train
from benchmarks.real_models import prune
from benchmarks.real_texts import Text, read_texts, training_texts
from student_trainer.losses import (
    Divergence,
    SparseDistribution,
    Tail,
    generalized_jsd,
    sparse_generalized_jsd,
)

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
KS = (1, 4, 16, 64, 256, 1024)
STUDENT_TOP_M = 16
COMPLETION = 12  # tokens of a text
TEMPERATURES = (1.0, 2.0)
WAYS: tuple[tuple[str, Tail], ...] = (
    ("default", "bucket"),
    ("default", "renormalize"),
    ("top-k", "bucket"),
    ("requested", "bucket"),
)
NOTES = (
    "support: default is the teacher's top-k and the next token, requested adds the student's top "
    f"{STUDENT_TOP_M}, top-k is without the next token. error, cosine and norm ratio as of "
    "benchmarks.accuracy_vs_k. Weights in bfloat16, logits and arithmetic in float64.",
    "healed: after some steps of forward KL on other texts. P, Q: mean mass on the support.",
)


@dataclass(frozen=True)
class Found:
    """One combination of case, beta, support, tail and k, and how near it is to the dense one."""

    model: str
    state: str
    completions: str
    kind: str
    temperature: float
    beta: float
    support: str
    tail: str
    k: int
    dense: float
    relative_error: float
    gradient_cosine: float
    gradient_norm_ratio: float
    teacher_mass: float
    student_mass: float


@torch.no_grad()
def logits_of(model: Any, text: Text) -> torch.Tensor:
    """Return logits [N, V], float64, of the positions that predict the completion."""
    ids = torch.tensor([text.prompt + text.completion[:-1]])
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    found: torch.Tensor = head(hidden[0, len(text.prompt) - 1 :]).double()
    return found


@torch.no_grad()
def written_by(model: Any, texts: Sequence[Text]) -> list[Text]:
    """Return the texts with completions that the model samples."""
    torch.manual_seed(0)
    found = []
    for text in texts:
        ids = model.generate(
            input_ids=torch.tensor([text.prompt]), max_new_tokens=COMPLETION, do_sample=True,
            top_k=0, top_p=1.0, temperature=1.0,
        )  # fmt: skip
        found.append(replace(text, completion=ids[0, len(text.prompt) :].tolist()))
    return found


def support_of(
    student: torch.Tensor, teacher: torch.Tensor, next_ids: torch.Tensor, k: int, support: str
) -> torch.Tensor:
    """Return ids [N, K] of a support, sorted; −1 where an id would stand twice."""
    ids = teacher.topk(k, dim=-1).indices
    if support != "top-k":
        ids = torch.cat([ids, next_ids[:, None]], dim=1)
    if support == "requested":
        ids = torch.cat([ids, student.topk(STUDENT_TOP_M, dim=-1).indices], dim=1)
    ids = ids.sort(dim=1).values
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids.masked_fill(repeated, -1)


class Positions:
    """The positions of one text at one temperature: student, teacher, and dense gradients.

    Args:
        student, teacher: [N, V] float64 logits.
    """

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> None:
        self.temperature = temperature
        self.log_p = (teacher / temperature).log_softmax(-1)
        self.log_q = (student / temperature).log_softmax(-1)
        q = self.log_q.exp()
        self.squares = q.square().sum(-1)  # [N]
        self.dense: dict[float, tuple[float, torch.Tensor, torch.Tensor]] = {}
        for beta in BETAS:
            logits = student.clone().requires_grad_()
            values = generalized_jsd(logits, teacher, Divergence(beta, temperature))
            (gradient,) = torch.autograd.grad(values.sum(), logits)
            self.dense[beta] = float(values.detach().sum()), gradient, (q * gradient).sum(-1)

    def on(self, ids: torch.Tensor) -> OnSupport:
        """Return what a sparse loss sees of these positions; ids [N, K], −1 pads."""
        valid, clamped = ids >= 0, ids.clamp_min(0)
        named = torch.where(valid, ids, ids.amax(1, keepdim=True))
        tail, rest = (
            one.scatter(1, named, -math.inf).logsumexp(-1) for one in (self.log_p, self.log_q)
        )
        own = self.log_q.gather(1, clamped).masked_fill(~valid, -math.inf)
        places = torch.arange(ids.shape[1]).expand_as(ids).masked_fill(~valid, -1)
        teacher = SparseDistribution(places, self.log_p.gather(1, clamped), tail)
        columns = torch.cat([own, rest[:, None]], dim=1) * self.temperature
        return OnSupport(self, clamped, valid, columns, teacher)


@dataclass(frozen=True)
class OnSupport:
    """The support's logits [N, K] and, as one more column, that of all other tokens together."""

    positions: Positions
    ids: torch.Tensor
    valid: torch.Tensor
    columns: torch.Tensor
    teacher: SparseDistribution

    def compare(self, beta: float, tail: Tail) -> tuple[float, ...]:
        """Return sums over the positions of a sparse loss and of its gradient.

        These are the loss, the product of sparse and dense gradient, the square of the sparse one,
        and both masses. Off the support the gradient is q_v times one factor.
        """
        whole = self.positions
        logits = self.columns.clone().requires_grad_()
        divergence = Divergence(beta, whole.temperature, tail=tail)
        found = sparse_generalized_jsd(logits, self.teacher, divergence)
        (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
        q = (self.columns / whole.temperature).exp()  # [N, K+1]
        factor = gradient[:, -1] / q[:, -1].clamp_min(1e-300)
        on_support = gradient[:, :-1] * self.valid
        _, dense, products = whole.dense[beta]
        own = dense.gather(1, self.ids) * self.valid
        product = (on_support * own).sum(-1) + factor * (products - (q[:, :-1] * own).sum(-1))
        left = (whole.squares - q[:, :-1].square().sum(-1)).clamp_min(0.0)
        square = on_support.square().sum(-1) + factor.square() * left
        masses = found.statistics
        return (
            float(found.loss.detach().sum()), float(product.sum()), float(square.sum()),
            float(masses.teacher_support_mass.sum()), float(masses.student_support_mass.sum()),
        )  # fmt: skip


def compared(
    student: torch.Tensor,
    teacher: torch.Tensor,
    next_ids: torch.Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float] = TEMPERATURES,
) -> Iterator[tuple[tuple[Any, ...], list[float]]]:
    """Yield (temperature, beta, support, tail, k) and sums: see `OnSupport.compare`.

    Before those stand the positions, the dense loss, and the square of its gradient.
    """
    for temperature in temperatures:
        positions = Positions(student, teacher, temperature)
        squares = {b: float(g.square().sum()) for b, (_, g, _) in positions.dense.items()}
        for support in dict.fromkeys(support for support, _ in WAYS):
            for k in ks:
                seen = positions.on(support_of(student, teacher, next_ids, k, support))
                for tail in (tail for other, tail in WAYS if other == support):
                    for beta, (value, _, _) in positions.dense.items():
                        row = [len(next_ids), value, squares[beta], *seen.compare(beta, tail)]
                        yield (temperature, beta, support, tail, k), row


def study(
    student: Any,
    teacher: Any,
    texts: Sequence[Text],
    ks: Sequence[int],
    temperatures: Sequence[float],
    names: dict[str, Any],
) -> Iterator[Found]:
    """Yield the result of every combination, for each kind of text and for all together."""
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0] * 8)
    for text in texts:
        ours, theirs = logits_of(student, text), logits_of(teacher, text)
        for key, row in compared(ours, theirs, torch.tensor(text.completion), ks, temperatures):
            for kind in (text.kind, "all"):
                sums[kind, *key] = [a + b for a, b in zip(sums[kind, *key], row, strict=True)]
    for key, (count, dense, norm, loss, product, square, p, q) in sums.items():
        yield Found(
            **names, **dict(zip(("kind", "temperature", "beta", "support", "tail", "k"), key,
                                strict=True)),
            dense=dense / count,
            relative_error=abs(loss - dense) / dense,
            gradient_cosine=product / math.sqrt(max(square * norm, 1e-300)),
            gradient_norm_ratio=math.sqrt(square / norm),
            teacher_mass=p / count,
            student_mass=q / count,
        )  # fmt: skip


def default_of(found: Found) -> bool:
    """Return whether a result is of training's defaults, at temperature 1 over all texts."""
    support = "requested" if found.beta == 1.0 else "default"
    return (found.kind, found.temperature, found.support, found.tail, found.k) == (
        "all", 1.0, support, "bucket", 64,
    )  # fmt: skip


def figures(results: Sequence[Found]) -> dict[str, float]:
    """Return the worst cosine and error over states and completions: of all betas, and of each."""
    kept = [one for one in results if default_of(one)]
    found = {
        "min_gradient_cosine_at_64_real": min(one.gradient_cosine for one in kept),
        "max_relative_error_at_64_real": max(one.relative_error for one in kept),
    }
    for beta in BETAS:
        cosines = [one.gradient_cosine for one in kept if one.beta == beta]
        found[f"min_gradient_cosine_at_64_real_beta_{beta:g}"] = min(cosines)
    return {name: round(value, 6) for name, value in found.items()}


def heal(pruned: Path, out: Path, teacher: Any, texts: Sequence[Text], pad: int) -> None:
    """Train a pruned student by forward KL, a step of `ROWS` texts, and save it in bfloat16.

    Embedding and output layer stay the teacher's: pruning left them whole, and AdamW's state of
    a large vocabulary would take most of the memory.
    """
    model = student_of(pruned)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.requires_grad_(False)
    batches = [scored(teacher, texts[i : i + ROWS], pad) for i in range(0, len(texts), ROWS)]
    train(model, batches, [0.0], 1e-4)
    model.to(torch.bfloat16).save_pretrained(out)


def write(results: Sequence[Found], file: Path) -> None:
    """Write results as JSON, a line each; of single kinds of text only those of k = 64."""
    kept = [asdict(one) for one in results if one.kind == "all" or one.k == 64]
    lines = [
        json.dumps([float(f"{x:.5g}") if isinstance(x, float) else x for x in one.values()])
        for one in kept
    ]
    columns = json.dumps(list(kept[0]))
    file.write_text(f'{{"columns": {columns},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n")


def run(
    model: Path,
    layers: int,
    data: Path,
    output: Path,
    *,
    steps: int,
    texts_a_kind: int,
    quick: bool,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> None:
    """Compare a model with students of its layers; write every number into ``output``.

    Args:
        steps: of forward KL that make a second state of the student, unless ``output`` has it; 0
            for none.
    """
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    students = {"pruned": output / f"{model.name}-{layers}"}
    if not students["pruned"].exists():
        prune(model, students["pruned"], layers, "float32")
    teacher = load(model, "bfloat16")
    healed = output / f"{model.name}-{layers}-healed"
    if healed.exists() or (steps and not quick):
        students["healed"] = healed
        if not healed.exists():
            texts = training_texts(data, tokenizer, ROWS * steps, prompt_tokens=PROMPT,
                                   completion_tokens=48)  # fmt: skip
            heal(students["pruned"], students["healed"], teacher, texts, tokenizer.pad_token_id)
    texts = read_texts(data, tokenizer, texts_a_kind, prompt_tokens=PROMPT,
                       completion_tokens=COMPLETION)  # fmt: skip
    results: list[Found] = []
    for state, folder in students.items():
        student = load(folder, "bfloat16")
        for source, some in (("dataset", texts), ("student", written_by(student, texts))):
            about = f"{model.name}, {layers} layers"
            names: dict[str, Any] = {"model": about, "state": state, "completions": source}
            results += study(student, teacher, some, (16, 64) if quick else ks, temperatures, names)
            write(results, output / f"accuracy-{model.name}-{layers}.json")
    shown = [one for one in results if one.kind == "all" and one.k == 64
             and one.temperature == 1.0 and one.support != "top-k"]  # fmt: skip
    print_report(
        f"{model.name} and {layers} of its layers: sparse against dense, k = 64, T = 1",
        ["student", "completions", "beta", "support", "tail", "dense", "error", "cosine",
         "norm ratio", "P", "Q"],
        [
            [one.state, one.completions, f"{one.beta:g}", one.support, one.tail, one.dense,
             f"{one.relative_error:.2e}", f"{one.gradient_cosine:.5f}", one.gradient_norm_ratio,
             f"{one.teacher_mass:.4f}", f"{one.student_mass:.4f}"]
            for one in shown
        ],
        {"benchmark": "accuracy_vs_k", "model": model.name, **figures(results), "quick": quick},
        notes=NOTES,
    )  # fmt: skip
