"""The batch of completions that are being generated, which sequences leave and join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from transformers import DynamicLayer

from shared.text import StopSearch


@dataclass
class RunningBatch:
    """A batch of completions that are being generated.

    Attributes:
        indices: indices of their requests.
        prompts: ids [P] of each prompt.
        tokens: completion tokens so far.
        draws: one uniform for each token that may be generated.
        searches: searches for stop strings; None where there are none.
        mask: [B, W] int64, 1 where a column of the cache holds a token of the sequence.
        cache: of W tokens: all but the last generated one. None before the prefill, or if no cache
            is used.
    """

    indices: list[int]
    prompts: list[NDArray[np.uint32]]
    tokens: list[list[int]]
    draws: list[Any]
    searches: list[StopSearch | None]
    mask: torch.Tensor
    cache: Any

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence, prompt and completion."""
        pairs = zip(self.prompts, self.tokens, strict=True)
        return [len(prompt) + len(ids) for prompt, ids in pairs]

    @property
    def can_join(self) -> bool:
        """The ability to merge with another batch: True if the cache holds only keys and values."""
        return self.cache is None or all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def select(self, kept: list[int]) -> RunningBatch | None:
        """Return the batch with only these sequences, in this order; None if there are none.

        Cache columns that only pad them are dropped.
        """
        if len(kept) == len(self.indices):
            return self
        if not kept:
            return None
        places = torch.tensor(kept, device=self.mask.device)
        self.mask = self.mask[places]
        if self.cache is not None:
            self.cache.reorder_cache(places)  # it also takes fewer sequences
        if self.cache is not None and self.can_join:
            first = int(self.mask.any(dim=0).int().argmax())
            self.mask = self.mask[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
        for name in ("indices", "prompts", "tokens", "draws", "searches"):
            values = getattr(self, name)
            setattr(self, name, [values[place] for place in kept])
        return self

    def merged(self, other: RunningBatch) -> RunningBatch:
        """Return both as one batch, the narrower cache padded on its left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        layers = [[] if batch.cache is None else batch.cache.layers for batch in (self, other)]
        for mine, theirs in zip(*layers, strict=True):
            mine.keys = torch.cat([_pad_left(mine.keys, width), _pad_left(theirs.keys, width)])
            mine.values = torch.cat(
                [_pad_left(mine.values, width), _pad_left(theirs.values, width)]
            )
        masks = [pad(batch.mask, (width - batch.mask.shape[1], 0)) for batch in (self, other)]
        return RunningBatch(
            indices=self.indices + other.indices,
            prompts=self.prompts + other.prompts,
            tokens=self.tokens + other.tokens,
            draws=self.draws + other.draws,
            searches=self.searches + other.searches,
            mask=torch.cat(masks),
            cache=self.cache,
        )


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    """Return keys or values [B, H, W, D] padded on the left to [B, H, width, D]."""
    return pad(states, (0, 0, width - states.shape[-2], 0))
