"""Time of a training pass over completions of different lengths: padded, grouped by length, packed.

One optimizer step's samples go forward and backward through a small Llama and the fused loss, in
each way once a round: in the data's order, grouped by length, in micro-batches of a token budget,
and each of the latter two packed into one row. The ways take turns, so that a disturbance of the
machine falls on all of them.

    python -m benchmarks.padding --quick --dataset_name gsm8k_train.jsonl
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Cell, Figure, argument_parser, print_report, set_threads
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.micro_batches import group_by_sizes, group_within_budget
from student_trainer.data.rows import load_rows
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence, HardLabels
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution

BYTES_PER_TOKEN = 3.5  # of English and numbers, about, in vocabularies of 32,000 to 150,000
NOTES = (
    "lengths: question and answer of each row at 3.5 bytes a token; the tokens are random.",
    "largest: most positions of a micro-batch, padding included.",
    "time: seconds of one step over those of the data's order; median over rounds.",
)


@dataclass
class Way:
    """A way to group a step, and what it cost."""

    grouped: Callable[[list[int]], list[list[int]]]
    packed: bool
    positions: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def in_order(sizes: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def read_samples(dataset: str, vocab_size: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for _, row in load_rows(dataset, config=None, split="train"):
        prompt, completion = (
            max(1, round(len(row[column].encode()) / BYTES_PER_TOKEN))
            for column in ("question", "answer")
        )
        ids = rng.integers(2, vocab_size, prompt + completion).astype(np.uint32)
        samples.append(Sample(ids, prompt, np.ones(completion, bool), "dataset"))
    return samples


def train(model: LlamaForCausalLM, samples: Sequence[Sample], *, packed: bool) -> int:
    """Run one micro-batch forward and backward; return its positions."""
    scored = [ScoredSample(sample, None) for sample in samples]
    masks = [sample.completion_mask for sample in samples]
    rows = predicting_positions(samples, masks, packed=packed)
    labels = np.concatenate([sample.completion_ids for sample in samples]).astype(np.int64)
    targets = SparseTargets(
        positions=rows,
        teacher=sparse_distribution(scored, model.config.vocab_size),
        divergence=Divergence(0.0),
        normalizer=len(rows),
        vocab_size=model.config.vocab_size,
        labels=HardLabels(torch.from_numpy(labels)),
    )
    inputs = model_inputs(samples, 0, packed=packed)
    model(**inputs, sparse_targets=targets)["loss"].backward()
    return inputs["input_ids"].numel()


def main() -> None:
    parser = argument_parser(__doc__, quick="1 round of 2 micro-batches of 4, 2 layers", threads=2)
    parser.add_argument("--dataset_name", required=True, help="GSM8K, as it is published.")
    parser.add_argument("--batch_size", type=int, help="default 8, with --quick 4")
    parser.add_argument("--accumulation", type=int, help="default 4, with --quick 2")
    parser.add_argument("--max_tokens_per_batch", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, help="default 6, with --quick 2")
    parser.add_argument("--attn_implementation", default="sdpa")
    parser.add_argument("--rounds", type=int, help="default 8, with --quick 1")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else 8)
    batch_size = arguments.batch_size or (4 if arguments.quick else 8)
    accumulation = arguments.accumulation or (2 if arguments.quick else 4)
    set_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.layers or (2 if arguments.quick else 6),
        num_attention_heads=arguments.hidden_size // 32,
        num_key_value_heads=arguments.hidden_size // 64,
        max_position_embeddings=4096,
        attn_implementation=arguments.attn_implementation,
    )
    model = LlamaForCausalLM(config)
    install_sparse_loss(model)
    samples = read_samples(arguments.dataset_name, config.vocab_size)
    sizes = [batch_size] * accumulation
    budget = arguments.max_tokens_per_batch
    order = np.random.default_rng(1).permutation(len(samples))
    ways: dict[str, Way] = {
        "padded, in the data's order": Way(lambda lengths: in_order(sizes), packed=False),
        "padded, by length": Way(lambda lengths: group_by_sizes(lengths, sizes), packed=False),
        "packed, by length": Way(lambda lengths: group_by_sizes(lengths, sizes), packed=True),
        f"padded, {budget} tokens": Way(
            lambda lengths: group_within_budget(lengths, budget, packed=False), packed=False
        ),
        f"packed, {budget} tokens": Way(
            lambda lengths: group_within_budget(lengths, budget, packed=True), packed=True
        ),
    }
    tokens = 0
    for turn in range(rounds + 1):  # the first warms up
        step = [samples[i] for i in order[turn * sum(sizes) :][: sum(sizes)]]
        lengths = [len(sample.token_ids) for sample in step]
        tokens += sum(lengths)
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            way = ways[name]
            model.zero_grad()
            since = time.perf_counter()
            for group in way.grouped(lengths):
                way.positions.append(train(model, [step[i] for i in group], packed=way.packed))
            if turn:
                way.seconds.append(time.perf_counter() - since)
    slowest = ways["padded, in the data's order"].seconds
    rows: list[list[Cell]] = []
    figures: dict[str, Figure] = {}
    for name, way in ways.items():
        padding = 1 - tokens / sum(way.positions)
        passes = len(way.positions) / (rounds + 1)
        ratio = statistics.median(a / b for a, b in zip(way.seconds, slowest, strict=True))
        rows.append([name, padding, passes, max(way.positions), ratio])
        figures[f"padding: {name}"] = round(padding, 4)
        figures[f"time: {name}"] = round(ratio, 4)
    print_report(
        f"{sum(sizes)} samples a step, {batch_size} a micro-batch, "
        f"{arguments.attn_implementation}, {sum(p.numel() for p in model.parameters()):,} weights",
        ["way", "padding", "passes", "largest", "time"],
        rows,
        figures,
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
