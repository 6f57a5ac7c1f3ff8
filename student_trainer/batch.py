"""Samples -> tensors: right-padded inputs, and which hidden states predict which tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from student_trainer.data import Sample


def padded_inputs(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, [B, L] int64, padded on the right."""
    sequences = [torch.from_numpy(sample.token_ids.astype(np.int64)) for sample in samples]
    ones = [torch.ones_like(ids) for ids in sequences]
    return {
        "input_ids": pad_sequence(sequences, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


def predicting_rows(samples: Sequence[Sample], masks: Sequence[NDArray[np.bool_]]) -> torch.Tensor:
    """[N] int64: flat index b·L + position of the hidden state that predicts each masked token.

    Args:
        masks: for each sample, which of its completion tokens [T].
    """
    width = max(len(sample.token_ids) for sample in samples)
    rows = [
        row * width + sample.completion_start - 1 + np.flatnonzero(mask)
        for row, (sample, mask) in enumerate(zip(samples, masks, strict=True))
    ]
    return torch.from_numpy(np.concatenate(rows))
