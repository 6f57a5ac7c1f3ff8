"""Measure a model's perplexity on given completions, and its divergence from a teacher there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shared.sparse import SparseLogprobs
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.micro_batches import group_within_budget
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.pipeline.targets import ScoredSample, hard_labels, sparse_distribution
from student_trainer.runtime.progress import counted

# Padded tokens of a forward pass, from which more together are no faster: reading all weights then
# takes a small share of it. A CPU is busy from few tokens on, and padding costs it as much as text.
CPU_PASS_TOKENS, GPU_PASS_TOKENS = 512, 4096


@torch.no_grad()
def measure(
    model: Any,
    samples: Sequence[Sample],
    scores: Sequence[SparseLogprobs] | None,
    *,
    divergence: Divergence,
    vocab_size: int,
    pass_tokens: int | None = None,
) -> dict[str, float]:
    """Return ``perplexity`` per completion token and, with a teacher's scores, ``divergence``.

    Without a single completion token both are left out.

    Args:
        model: as `install_sparse_loss` takes it, which is done here.
        scores: of the samples, at the divergence's temperature; None without a teacher.
        divergence: of the teacher and the model, in nats a token.
        vocab_size: the vocabulary that both share; the rest is left out of the student's softmax.
        pass_tokens: padded tokens of a forward pass; None for the device's own number. A longer
            sample is alone.
    """
    install_sparse_loss(model)
    model.eval()
    device = next(model.parameters()).device
    given = [None] * len(samples) if scores is None else scores
    items = [
        ScoredSample(sample, score)
        for sample, score in zip(samples, given, strict=True)
        if sample.completion_mask.any()
    ]
    if pass_tokens is None:
        pass_tokens = CPU_PASS_TOKENS if device.type == "cpu" else GPU_PASS_TOKENS
    lengths = [len(item.sample.token_ids) for item in items]
    cross_entropy, total, tokens = 0.0, 0.0, 0
    with counted(len(items), "Measuring") as count:
        for group in group_within_budget(lengths, pass_tokens, packed=False):
            inputs = _inputs([items[index] for index in group], divergence, vocab_size, device)
            statistics = model(**inputs)["statistics"]
            cross_entropy += float(statistics.cross_entropy.double().sum())
            total += float(statistics.divergence.double().sum())
            tokens += len(statistics.divergence)
            count(len(group))
    if not tokens:
        return {}
    found = {"perplexity": math.exp(cross_entropy / tokens)}
    return found if scores is None else {**found, "divergence": total / tokens}


def _inputs(
    items: Sequence[ScoredSample], divergence: Divergence, vocab_size: int, device: torch.device
) -> dict[str, Any]:
    """Return the inputs of the forward pass that compares the model with its teacher on items."""
    samples = [item.sample for item in items]
    masks = [sample.completion_mask for sample in samples]
    targets = SparseTargets(
        positions=predicting_positions(samples, masks, packed=False),
        teacher=sparse_distribution(items, vocab_size),
        divergence=divergence,
        normalizer=1.0,
        vocab_size=vocab_size,
        labels=hard_labels(items, 0.0)[1],
    )
    inputs = model_inputs(samples, 0, packed=False)  # the padding is masked, any valid id will do
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    return {**moved, "sparse_targets": targets.to(device)}
