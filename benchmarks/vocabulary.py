"""Memory and processor time of the gradients of a large vocabulary: in place, and by autograd.

Each way trains in a process of its own: steps of two micro-batches, float32, AdamW, one thread.

    python -m benchmarks.vocabulary --model STUDENT
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import Cell, argument_parser, print_report, run_apart, set_threads
from student_trainer.losses import Divergence, SparseDistribution
from student_trainer.model.forward import SparseTargets, install_sparse_loss

ROWS, PROMPT, COMPLETION, TOP_K = 2, 42, 48, 64
COLUMNS = ("gradients", "peak MiB", "CPU s of a micro-batch")
NOTES = (
    f"{ROWS} rows of {PROMPT} and {COMPLETION} tokens in a micro-batch, two of them a step; the "
    "resident set at its peak, and the median of forward and backward pass.",
)


def main() -> None:
    parser = argument_parser(__doc__, quick="one step instead of three")
    parser.add_argument("--model", type=Path, required=True, help="folder of the student")
    args = parser.parse_args()
    steps = 1 if args.quick else 3
    rows: list[list[Cell]] = []
    found: dict[str, tuple[int, float]] = {}
    for name, in_place in (("autograd", False), ("in place", True)):
        found[name] = run_apart(train, args.model, in_place, steps)
        rows.append([name, str(found[name][0] >> 20), found[name][1]])
    before, now = found["autograd"], found["in place"]
    figures: dict[str, Any] = {
        "benchmark": "vocabulary", "model": args.model.name, "quick": args.quick,
        "autograd_mib": before[0] >> 20, "in_place_mib": now[0] >> 20,
        "autograd_seconds": before[1], "in_place_seconds": now[1],
    }  # fmt: skip
    print_report("Gradients of a large vocabulary", COLUMNS, rows, figures, notes=NOTES)


def train(folder: Path, in_place: bool, steps: int) -> tuple[int, float]:
    """Return the peak resident memory in bytes, and the median seconds of a micro-batch."""
    set_threads(1)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").train()
    install_sparse_loss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    seconds = []
    for _ in range(steps):
        for _ in range(2):
            since = time.process_time()
            model(**micro_batch(vocab_size, in_place))["loss"].backward()
            seconds.append(time.process_time() - since)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), statistics.median(seconds)


def micro_batch(vocab_size: int, in_place: bool) -> dict[str, Any]:
    """Return random rows, whose completions learn from a random teacher of ``TOP_K`` tokens."""
    length, count = PROMPT + COMPLETION, ROWS * COMPLETION
    first = torch.arange(ROWS)[:, None] * length + PROMPT - 1
    positions = (first + torch.arange(COMPLETION)).flatten()  # [N]
    ids = torch.stack([torch.randperm(vocab_size)[:TOP_K] for _ in range(count)])  # [N, k]
    logprobs = torch.randn(count, TOP_K + 1).log_softmax(-1)
    teacher = SparseDistribution(ids, logprobs[:, :-1], logprobs[:, -1])
    return {
        "input_ids": torch.randint(vocab_size, (ROWS, length)),
        "sparse_targets": SparseTargets(
            positions, teacher, Divergence(0.5), 2.0 * count, vocab_size, in_place=in_place
        ),
    }


if __name__ == "__main__":
    main()
