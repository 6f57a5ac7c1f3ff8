"""A comparison of starts for a student that is disjoint from its teacher: each beta, a real model.

A few of a published model's layers make a student that gives the teacher's tokens almost no
probability. For each start: the gradient's norm before the first step, and the held-out divergences
after a few dozens of steps on the reference answers, at one learning rate. Adam divides by the
gradient's size, so a small gradient is not small steps, but steps in a direction of noise.

    python -m benchmarks.plateau --model ~/.cache/real-models/gemma-3-270m --layers 6 \
      --data DATA --output_dir runs/plateau
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import argument_parser, print_report, set_threads
from benchmarks.real_models import prune
from benchmarks.real_texts import Text, read_texts, training_texts
from student_trainer.losses import Divergence, SparseDistribution, SparseStatistics
from student_trainer.model.forward import SparseTargets, install_sparse_loss

TOP_K = 64
ROWS = 4  # of a step
PROMPT, COMPLETION = 48, 48  # tokens
MEASURED = (0.0, 0.5, 1.0)
NOTES = (
    f"steps of {ROWS} texts, {COMPLETION} tokens each, AdamW, float32 weights and bfloat16 "
    f"products; teacher: top {TOP_K}, next token and tail. Divergences in nats a token, over "
    "support and tail. student mass: on the teacher's support.",
    "A start of two betas takes each for half of the steps.",
)


@dataclass(frozen=True)
class Batch:
    """Token ids [B, L], where a token is predicted, and the teacher there."""

    input_ids: torch.Tensor
    positions: torch.Tensor  # [N], into the flattened [B · L]
    teacher: SparseDistribution


@dataclass(frozen=True)
class Measured:
    """A student on held-out texts: divergences by beta, and its mass on the teacher's support."""

    forward_kl: float
    jsd: float
    reverse_kl: float
    student_mass: float


@torch.no_grad()
def scored(teacher: Any, texts: Sequence[Text], pad: int) -> Batch:
    """Return the texts as one right-padded batch, scored by the teacher."""
    width = max(len(t.prompt) + len(t.completion) for t in texts)
    input_ids = torch.full((len(texts), width), pad)
    positions, following = [], []
    for row, text in enumerate(texts):
        ids = torch.tensor(text.prompt + text.completion)
        input_ids[row, : len(ids)] = ids
        first = len(text.prompt)
        positions += [row * width + place - 1 for place in range(first, len(ids))]
        following += text.completion
    places = torch.tensor(positions)
    hidden = teacher.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = teacher.get_output_embeddings()(hidden.flatten(0, 1)[places]).float()  # [N, V]
    log_p = logits.log_softmax(-1)
    ids = log_p.topk(TOP_K, dim=-1).indices
    next_ids = torch.tensor(following)[:, None]
    repeated = (ids == next_ids).any(1, keepdim=True)
    log_next = log_p.gather(1, next_ids)
    values = torch.cat([log_p.gather(1, ids), log_next], dim=1)
    tail = log_p.scatter(1, torch.cat([ids, next_ids], dim=1), -math.inf).logsumexp(-1)
    ids = torch.cat([ids, next_ids.masked_fill(repeated, -1)], dim=1)
    return Batch(input_ids, places, SparseDistribution(ids, values, tail))


def compared(model: Any, batch: Batch, beta: float) -> tuple[torch.Tensor, SparseStatistics]:
    """Return the mean divergence of a batch by the trainer's own loss, and its statistics."""
    targets = SparseTargets(
        positions=batch.positions,
        teacher=batch.teacher,
        divergence=Divergence(beta),
        normalizer=float(len(batch.positions)),
        vocab_size=model.get_output_embeddings().weight.shape[0],
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=batch.input_ids, use_cache=False, sparse_targets=targets)
    return found["loss"], found["statistics"]


@torch.no_grad()
def measure(model: Any, batches: Sequence[Batch]) -> Measured:
    sums = dict.fromkeys((*MEASURED, "mass"), 0.0)
    tokens = 0
    for batch in batches:
        for beta in MEASURED:
            loss, statistics = compared(model, batch, beta)
            sums[beta] += float(loss) * len(batch.positions)
        sums["mass"] += float(statistics.student_support_mass.sum())
        tokens += len(batch.positions)
    return Measured(*(value / tokens for value in sums.values()))


def gradient_norm(model: Any, batch: Batch, beta: float) -> float:
    model.zero_grad()
    compared(model, batch, beta)[0].backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    model.zero_grad()
    return math.sqrt(squares)


def train(model: Any, batches: Sequence[Batch], betas: Sequence[float], rate: float) -> list[float]:
    """Learn each batch once, the betas in turn for equal parts; return each step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        beta = betas[step * len(betas) // len(batches)]
        loss, _ = compared(model, batch, beta)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def load(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def student_of(folder: Path) -> Any:
    model = load(folder)
    install_sparse_loss(model)
    return model


def main() -> None:
    parser = argument_parser(__doc__, quick="fewer steps", threads=0)
    parser.add_argument("--model", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--layers", type=int, required=True, help="of it that the student keeps")
    parser.add_argument("--data", type=Path, required=True, help="folder of HumanEval and GSM8K")
    parser.add_argument("--output_dir", type=Path, required=True, help="students and results.json")
    parser.add_argument("--steps", type=int, help="default 48, with --quick 16")
    parser.add_argument(
        "--starts",
        nargs="+",
        default=["0", "0.5", "0,0.5", "1", "0,1", "0.9", "0.1"],
        help="betas, each or several by commas for equal parts of the steps",
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    steps = arguments.steps or (16 if arguments.quick else 48)
    folder = arguments.output_dir / f"{arguments.model.name}-{arguments.layers}"
    if not folder.exists():
        prune(arguments.model, folder, arguments.layers, "float32")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    pad = tokenizer.pad_token_id or 0
    teacher = load(arguments.model, "bfloat16")
    sizes = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION}
    held = read_texts(arguments.data, tokenizer, ROWS, **sizes)  # of each kind
    texts = training_texts(arguments.data, tokenizer, ROWS * steps, **sizes)
    held_out, batches = (
        [scored(teacher, some[i : i + ROWS], pad) for i in range(0, len(some), ROWS)]
        for some in (held, texts)
    )
    del teacher
    model = student_of(folder)
    before = measure(model, held_out)
    norms = {beta: gradient_norm(model, batches[0], beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)}
    del model
    results: dict[str, Any] = {
        "benchmark": "plateau",
        "model": arguments.model.name,
        "layers": arguments.layers,
        "steps": steps,
        "learning_rate": arguments.learning_rate,
        "gradient_norm": {f"{beta:g}": norm for beta, norm in norms.items()},
        "before": asdict(before),
        "after": {},
    }
    for name in arguments.starts:
        model = student_of(folder)
        betas = [float(beta) for beta in name.split(",")]
        losses = train(model, batches, betas, arguments.learning_rate)
        after = measure(model, held_out)
        results["after"][name] = {**asdict(after), "losses": [round(x, 4) for x in losses]}
        (arguments.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        if betas == [0.0]:  # a second state of the student for benchmarks.accuracy_real
            healed = arguments.output_dir / f"{arguments.model.name}-{arguments.layers}-healed"
            model.to(torch.bfloat16).save_pretrained(healed)
        del model
    rows = [["none", *asdict(before).values()]]
    for name, found in results["after"].items():
        rows.append([f"beta {name}", *(found[key] for key in asdict(before))])
    print_report(
        f"{arguments.model.name}, {arguments.layers} layers, after {steps} steps",
        ["training", "forward KL", "JSD", "reverse KL", "student mass"],
        [[name, *(f"{value:.3g}" for value in values)] for name, *values in rows],
        {"benchmark": "plateau", "quick": arguments.quick,
         "forward_kl_before": before.forward_kl,
         **{f"forward_kl_after_{name}": found["forward_kl"]
            for name, found in results["after"].items()}},
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
