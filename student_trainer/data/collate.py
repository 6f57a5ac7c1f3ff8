"""The collation of samples: padded or packed input tensors, and the positions that predict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from student_trainer.data.sample import Sample


def model_inputs(
    samples: Sequence[Sample], pad_token_id: int, *, packed: bool
) -> dict[str, torch.Tensor]:
    """Return the inputs of the model's forward pass, all int64.

    Padded: input_ids and attention_mask [B, L], padded on the right. Packed: input_ids and
    position_ids [1, ΣL], one sequence after another; position_ids restart at 0 for each sequence.
    """
    sequences = [torch.from_numpy(sample.token_ids.astype(np.int64)) for sample in samples]
    if packed:
        positions = [torch.arange(len(ids)) for ids in sequences]
        return {"input_ids": torch.cat(sequences)[None], "position_ids": torch.cat(positions)[None]}
    ones = [torch.ones_like(ids) for ids in sequences]
    return {
        "input_ids": pad_sequence(sequences, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


def predicting_positions(
    samples: Sequence[Sample], masks: Sequence[NDArray[np.bool_]], *, packed: bool
) -> torch.Tensor:
    """Return the position whose hidden state predicts each selected token, [N] int64.

    A position is an index into the flattened inputs of `model_inputs`.

    Args:
        masks: for each sample, True for the selected completion tokens [T].
    """
    lengths = [len(sample.token_ids) for sample in samples]
    # A sequence starts at b·L in padded inputs, and after the previous one in packed inputs.
    starts = np.cumsum([0, *lengths]) if packed else max(lengths) * np.arange(len(lengths) + 1)
    positions = [
        start + sample.completion_start - 1 + np.flatnonzero(mask)
        for start, sample, mask in zip(starts[:-1], samples, masks, strict=True)
    ]
    return torch.from_numpy(np.concatenate(positions))
