"""The builder of micro-batches: inputs of one forward pass, and the teacher's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.losses import Divergence
from student_trainer.model.forward import SparseTargets
from student_trainer.pipeline.targets import ScoredSample, hard_labels, sparse_distribution
from student_trainer.training.plan import TrainingPlan

MicroBatch = dict[str, Any]


@dataclass(frozen=True)
class MicroBatchBuilder:
    """A builder of micro-batches.

    Attributes:
        pad_token_id: fills the right of short sequences.
        packed: sequences stand in one row instead.
    """

    plan: TrainingPlan
    pad_token_id: int
    packed: bool

    def training(self, scored: Sequence[ScoredSample], normalizer: float) -> MicroBatch:
        """Build a micro-batch to learn from.

        Args:
            normalizer: learned tokens of the whole optimizer step, over ranks and micro-batches.
        """
        return self._build(scored, normalizer, self.plan.method.divergence, self.plan.sft_weight)

    def held_out(self, scored: Sequence[ScoredSample]) -> MicroBatch:
        """Build a micro-batch whose loss is the sum of the divergences.

        The tail is always the exact one, so that runs can be compared.
        """
        return self._build(scored, 1.0, replace(self.plan.method.divergence, tail="bucket"), 0.0)

    def _build(
        self,
        scored: Sequence[ScoredSample],
        normalizer: float,
        divergence: Divergence,
        sft_weight: float,
    ) -> MicroBatch:
        samples = [item.sample for item in scored]
        masks = [sample.completion_mask for sample in samples]
        weights, labels = hard_labels(scored, sft_weight)
        return {
            **model_inputs(samples, self.pad_token_id, packed=self.packed),
            "sparse_targets": SparseTargets(
                positions=predicting_positions(samples, masks, packed=self.packed),
                teacher=sparse_distribution(scored, self.plan.vocab_size),
                divergence=divergence,
                normalizer=normalizer,
                vocab_size=self.plan.vocab_size,
                weights=weights,
                labels=labels,
                kernel=self.plan.kernel,
                taught=[
                    (item.teacher, int(mask.sum()))
                    for item, mask in zip(scored, masks, strict=True)
                ],
            ),
        }
