"""Measure a model's perplexity on given completions, and its divergence from a teacher there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from shared.sparse import SparseLogprobs
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.pipeline.targets import ScoredSample, hard_labels, sparse_distribution
from student_trainer.runtime.progress import tracked


@torch.no_grad()
def measure(
    model: Any,
    samples: Sequence[Sample],
    scores: Sequence[SparseLogprobs] | None,
    *,
    divergence: Divergence,
    vocab_size: int,
) -> dict[str, float]:
    """Return ``perplexity`` per completion token and, with a teacher's scores, ``divergence``.

    Args:
        model: as `install_sparse_loss` takes it, which is done here.
        scores: of the samples, at the divergence's temperature; None without a teacher.
        divergence: of the teacher and the model, in nats a token.
        vocab_size: the vocabulary that both share; the rest is left out of the student's softmax.
    """
    install_sparse_loss(model)
    model.eval()
    device = next(model.parameters()).device
    given = [None] * len(samples) if scores is None else scores
    cross_entropy, total, tokens = 0.0, 0.0, 0
    for sample, score in zip(tracked(samples, len(samples), "Measuring"), given, strict=True):
        item = ScoredSample(sample, score)
        rows = predicting_positions([sample], [sample.completion_mask], packed=False)
        targets = SparseTargets(
            positions=rows,
            teacher=sparse_distribution([item], vocab_size),
            divergence=divergence,
            normalizer=1.0,
            vocab_size=vocab_size,
            labels=hard_labels([item], 0.0)[1],
        )
        inputs = model_inputs([sample], 0, packed=False)  # one at a time, so nothing is padded
        outputs = model(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            sparse_targets=targets.to(device),
        )
        cross_entropy += float(outputs["statistics"].cross_entropy.sum())
        total += float(outputs["statistics"].divergence.sum())
        tokens += len(rows)
    found = {"perplexity": math.exp(cross_entropy / tokens)}
    return found if scores is None else {**found, "divergence": total / tokens}
