"""The student's own most probable tokens, which the teacher scores beside its top-k.

Reverse KL and JSD weight tokens by the *student's* probability. Where teacher and student disagree,
those tokens are missing from the teacher's top-k, and their part of the divergence is lost in the
tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.micro_batches import order_by_length
from student_trainer.data.sample import Sample
from student_trainer.model.forward import TopTokens


class TopTokenProposals:
    """A callable that proposes the student's most probable tokens, by forward passes.

    The support may be any set of tokens, so the divergence is exact even if older weights proposed
    it; the pipeline's ``staleness`` bounds their age.

    Args:
        model: the student, after `install_sparse_loss`.
        count: ids for each completion position.
        vocab_size: size of the shared vocabulary; only ids below it are proposed.
        pad_token_id: fills the right of short sequences.
        packed: pack sequences instead of padding them.
        batch_size: sequences in a forward pass. The number of passes depends only on the number of
            samples, so ranks that share a sharded model make equally many.
    """

    def __init__(
        self,
        model: Any,
        *,
        count: int,
        vocab_size: int,
        pad_token_id: int,
        batch_size: int,
        packed: bool = False,
    ) -> None:
        self.model = model
        self.count = count
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.packed = packed

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[NDArray[np.uint32]]:
        """Return for each sample the ids [T, count] at its completion, most probable first."""
        training = self.model.training
        self.model.eval()
        proposed: dict[int, NDArray[np.uint32]] = {}
        order = order_by_length([len(sample.token_ids) for sample in samples])
        try:
            for first in range(0, len(order), self.batch_size):
                group = order[first : first + self.batch_size]
                proposed.update(zip(group, self._batch([samples[i] for i in group]), strict=True))
        finally:
            self.model.train(training)
        return [proposed[index] for index in range(len(samples))]

    def _batch(self, samples: Sequence[Sample]) -> list[NDArray[np.uint32]]:
        device = next(self.model.parameters()).device
        everything = [np.ones_like(sample.completion_mask) for sample in samples]
        inputs = model_inputs(samples, self.pad_token_id, packed=self.packed)
        positions = predicting_positions(samples, everything, packed=self.packed)
        wanted = TopTokens(positions.to(device), self.count, self.vocab_size)
        found = self.model(
            **{name: tensor.to(device) for name, tensor in inputs.items()}, top_tokens=wanted
        )["token_ids"]
        ids = found.cpu().numpy().astype(np.uint32)  # [N, count]
        ends = np.cumsum([len(mask) for mask in everything])[:-1]
        return list(np.split(ids, ends))
